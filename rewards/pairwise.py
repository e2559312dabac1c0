"""Which of two pictures or clips is better, and the share of wins inside a group of them of one prompt.

    winrate_i = (1 / |J_i|) sum_{j in J_i} w_ij,    w_ij = 1 if i wins against j, 1/2 for a tie, else 0

over the J_i of the others against which i was judged. Pref-GRPO, arXiv 2508.20751, has G - 1 below the sum; its
released code gives half a win to both where an answer cannot be read, and we leave such a pair out.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol, final

import torch
from PIL import Image
from torch import Tensor

from diffalign.answers import Asker, in_order
from diffalign.data.clips import contact_sheet
from diffalign.rewards import load_rewards
from diffalign.rewards.base import Card, Images, dispatch
from diffalign.rewards.clips import Shown, dispatch_clips, spread, together
from diffalign.rewards.judge import load_asker
from diffalign.rewards.judge_parse import PAIR_PARSERS
from diffalign.rewards.judge_templates import load_template
from diffalign.rewards.missing import MISSING, tell_missing
from diffalign.table import build

PREFERENCES: dict[str, str] = {
    "vlm": "diffalign.rewards.pairwise:VLMPreference",
    "reward": "diffalign.rewards.pairwise:RewardPreference",
}
TIE = 0.5
SHEET = 8  # frames of a clip that a judge of pictures is shown

log = logging.getLogger(__name__)


class Preference(Protocol):
    """Says which of two pictures or clips is better for a prompt."""

    @property
    def workers(self) -> int:
        """How many pairs it takes at once; 1 for one that is not to be called from several threads."""

    def prefer(self, a: Shown, b: Shown, prompt: str) -> float:
        """1 if `a` is better, 0 if `b` is, 0.5 for a tie, NaN where there is no verdict."""


@final
class VLMPreference:
    """A vision-language model, asked in both orders, for it favors a place; where it contradicts itself there is a tie.

    Of a clip it is shown one picture of some of its frames, see `sheet_of`, and the template should say so, as
    "vlm-clip-pair" does.

    If one of the two answers is missing, so is the verdict: the other one alone may be no more than the place. Why is
    in the log.

    Args:
        judge: who is asked; see `VLM`.
        template: "vlm-pair", "vlm-clip-pair", "unifiedreward-pair", or a json file like those in assets/judges.
        device: of a judge that runs here.

    Raises:
        ValueError: a section or a template that does not fit; when called, an endpoint that was never reached.
    """

    def __init__(
        self,
        *,
        judge: Asker | Mapping[str, Any],
        template: str | Path = "vlm-pair",
        device: torch.device | str = "cpu",
    ) -> None:
        self.asker, self.template = load_asker(judge, device), load_template(template, PAIR_PARSERS)

    @property
    def workers(self) -> int:
        return self.asker.workers

    def prefer(self, a: Shown, b: Shown, prompt: str) -> float:
        """1 if `a` is better, 0 if `b` is, 0.5 for a tie or a contradiction, NaN where an answer is missing."""
        a, b = sheet_of(a), sheet_of(b)
        first = self._first_wins(a, b, prompt)
        if math.isnan(first):
            return MISSING
        swapped = 1 - self._first_wins(b, a, prompt)
        return swapped if math.isnan(swapped) or swapped == first else TIE

    def _first_wins(self, a: Image.Image, b: Image.Image, prompt: str) -> float:
        answer = self.asker.ask([a, b], self.template.question(prompt))
        reason = answer.reason
        if answer.text is not None:
            try:
                return self.template.parse(answer.text, self.template.scale)
            except ValueError as error:
                reason = str(error)
        log.info("a pair has no verdict: %s", reason)
        return MISSING


@final
class RewardPreference:
    """Rewards as a judge of pairs: the picture or clip with the larger weighted sum wins.

    Args:
        rewards: as in a run's `rewards`: {"pickscore": 1.0}.
        margin: a smaller difference than this is a tie, in the sum's unit.
        device: where they live.

    Raises:
        ValueError: rewards that are not to be had, or a negative margin.
    """

    workers: ClassVar[int] = 1

    def __init__(self, *, rewards: Mapping[str, Any], margin: float = 0.0, device: torch.device | str = "cpu") -> None:
        if not margin >= 0:
            raise ValueError(f"preference.margin: expected a number of at least 0, got {margin}")
        self.rewards, self.margin = load_rewards(rewards, device=device), margin

    def prefer(self, a: Shown, b: Shown, prompt: str) -> float:
        """1 if `a` is better, 0 if `b` is, 0.5 for a tie, NaN where one has no score."""
        first, second = self.rewards(together([a, b]), [prompt] * 2).tolist()
        if math.isnan(first) or math.isnan(second):
            return MISSING
        return TIE if abs(first - second) <= self.margin else float(first > second)


@final
class WinRate:
    """The share of wins against the other pictures or clips of the same prompt within the call.

    G pictures cost G (G - 1) / 2 verdicts, and with a `VLMPreference` twice as many requests. Only pictures that are
    given together are compared: a batch is to hold whole groups. A picture without any verdict is NaN, as is one that
    is alone with its prompt; `reasons` says why, of the latest call.

    Args:
        preference: a section {"judge": {...}} of `VLMPreference`, one with a `name`: reward for `RewardPreference`, or
            a dotted path, or an object with `prefer`.
        device: of a judge that runs here.

    Raises:
        ValueError: a section that does not fit; when called, an endpoint that was never reached.
    """

    name: ClassVar[str] = "winrate"
    card: ClassVar[Card] = Card(
        unit="share of wins",
        range=(0.0, 1.0),
        source="arXiv 2508.20751",
        code="Apache-2.0",
        weights="the model's own",
        differentiable=False,
        side=None,
        across_prompts=False,
        checked="formula only",
        compares=True,
    )

    def __init__(self, *, preference: Preference | Mapping[str, Any], device: torch.device | str = "cpu") -> None:
        self.preference: Preference = (
            build(PREFERENCES, {"name": "vlm", **preference}, what="preference", device=device)
            if isinstance(preference, Mapping)
            else preference
        )
        self.reasons: list[str] = []

    def __call__(self, images: Images, prompts: Sequence[str]) -> Tensor:
        """Scores [B]; see `Reward.__call__`."""
        if isinstance(images, Tensor) and images.ndim == 5:
            scores = dispatch_clips(self.name, images, prompts, self._score, differentiable=False)
        else:
            scores = dispatch(self.name, images, prompts, exact=self._score, differentiable=None)
        tell_missing(self.name, self.reasons)
        return scores

    def _score(self, pictures: Sequence[Shown], prompts: Sequence[str]) -> Tensor:
        pairs = same_prompt_pairs(prompts)
        wins = in_order(
            lambda pair: self.preference.prefer(pictures[pair[0]], pictures[pair[1]], prompts[pair[0]]),
            pairs,
            self.preference.workers,
        )
        rates = win_rates(len(pictures), pairs, wins)
        asked = [sum(i in pair for pair in pairs) for i in range(len(pictures))]
        self.reasons = [_reason(rate, pairs_of) for rate, pairs_of in zip(rates, asked, strict=True)]
        return torch.tensor(rates)


def sheet_of(shown: Shown) -> Image.Image:
    """A picture as it is, of a clip some of its frames, four in a row."""
    if not isinstance(shown, Tensor):
        return shown
    return contact_sheet(shown[spread(len(shown), SHEET)].permute(0, 2, 3, 1).cpu().numpy(), columns=4)


def same_prompt_pairs(prompts: Sequence[str]) -> list[tuple[int, int]]:
    """(i, j), i < j, of all pictures that share a prompt."""
    groups = defaultdict(list)
    for i, prompt in enumerate(prompts):
        groups[prompt].append(i)
    return [pair for group in groups.values() for pair in itertools.combinations(group, 2)]


def win_rates(count: int, pairs: Sequence[tuple[int, int]], wins: Sequence[float]) -> list[float]:
    """The share of wins of each of `count` pictures; NaN for one without a verdict.

    Args:
        wins: of each pair (i, j): 1 if i is better, 0 if j is, 0.5 for a tie, NaN for no verdict, which is left out.
    """
    verdicts: list[list[float]] = [[] for _ in range(count)]
    for (i, j), win in zip(pairs, wins, strict=True):
        if not math.isnan(win):
            verdicts[i].append(win)
            verdicts[j].append(1 - win)
    return [sum(given) / len(given) if given else MISSING for given in verdicts]


def _reason(rate: float, pairs: int) -> str:
    if not math.isnan(rate):
        return ""
    return f"none of its {pairs} pairs was judged" if pairs else "no other picture of its prompt in the call"
