"""D3PO: Yang et al. 2023, Using Human Feedback to Fine-tune Diffusion Models without Any Reward Model, 2311.13231.

    L = softplus(-beta (q_w - q_l)),   q = clamp(lp - lp_ref, log(1 - c), log(1 + c))

of every step of two walks of one prompt from one noise; the better picture is the winner at each of its steps.

lp_ref is the rollout's own log-probability as long as policy and reference are the same weights, and else one replay of
the rollout by the reference: four evaluations of the network per pair and step become two.

`mode: shared` takes all pairs of a group from one evaluation of each picture: seven pictures have 21 pairs, which are
42 evaluations of the policy in `mode: pairs`, the paper's, and 7 here, with the same gradient. A tie is no pair.

Deviations from the released code (yk7333/d3po): the last step is deterministic; pairs that are ties are not evaluated.

Once |lp - lp_ref| has left the clamp a step has no gradient, in either direction, as there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from diffalign.episodes import Episodes, Explorer, every_step, explore, replayed, share
from diffalign.losses.policy import pairs_of, step_preferences
from diffalign.methods.base import Batch, Loss, Need, Noised, Run
from diffalign.methods.checks import check_choice, check_group, check_positive
from diffalign.methods.paid import logged, seen, with_reference

MODES = ("shared", "pairs")


@dataclass(frozen=True)
class D3PO:
    """Diffusion-DPO on the steps of the policy's own walks, ranked by a reward or by people.

    Args:
        beta: of the logit. lp is a mean over elements and q is clamped, so the sigmoid is hardly bent: beta is little
            more than a scale of the gradient.
        clip: c.
        mode: shared | pairs: which microbatches are made; the gradient is the same. Several processes are to call the
            network equally often, and ties are not equally many on all: there it is shared.
        updates: optimizer steps on one rollout, each on its own share of the prompts.
        steps, guidance, dynamics, noise_level, group, same_start, window, window_start, at_once, store: how pictures
            are drawn, see `diffalign.episodes.Explorer`; shared takes whole groups at once, however large.

    Metrics: `reward`, `missing`, `same` as in `ddpo`; `pairs` of a prompt; `outside`, the share of pictures whose q is
    clamped.

    Raises:
        ValueError: a value outside its range.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({Need.PROMPTS, Need.REWARD, Need.REFERENCE})
    view: ClassVar[str] = "prompts"

    beta: float = 0.1
    clip: float = 0.1
    mode: str = "shared"
    updates: int = 1
    steps: int = 20
    guidance: float = 5.0
    dynamics: str = "auto"
    noise_level: float | None = None
    group: int = 2
    same_start: bool = True
    window: int = 0
    window_start: int | None = None
    at_once: int = 8
    store: str = "float32"

    def __post_init__(self) -> None:
        check_positive(beta=self.beta, updates=self.updates, at_once=self.at_once)
        check_choice("mode", self.mode, MODES)
        check_group(self.group)
        if not 0 < self.clip < 1:
            raise ValueError(f"method.clip: expected a number between 0 and 1, got {self.clip}")
        _ = self.explorer  # checks its own

    @property
    def explorer(self) -> Explorer:
        # a microbatch of `shared` has whole groups, and the rollout is drawn as it will be replayed
        return Explorer.of(self, at_once=max(self.at_once, self.group))

    def prepare(self, run: Run, batch: Batch) -> Sequence[Noised]:
        how = self.explorer

        def draw() -> tuple[Episodes, dict[str, Tensor]]:
            episodes = explore(run, run.policy, batch, how)
            return with_reference(run, episodes, how), seen(run, episodes.scores, how.groups)

        part = share(len(batch.prompts), self.updates, run.step % self.updates)
        episodes, aux = run.held(self.updates, draw)
        rows, score = slice(part.start * self.group, part.stop * self.group), episodes.scores.total
        better, worse = pairs_of(score[rows].view(-1, self.group))
        if self.mode == "pairs" and len(better) and not run.together:
            return self._pairs(episodes, rows.start + better, rows.start + worse, aux)
        # a prompt's pairs are summed up, and the loss is a mean over prompts
        scale = torch.full_like(score, (part.stop - part.start) / max(1, len(better)))
        return every_step(episodes, rows, how, aux | {"score": score, "scale": scale})

    def _pairs(self, episodes: Episodes, better: Tensor, worse: Tensor, aux: dict[str, Tensor]) -> list[Noised]:
        """All steps of winners, and below them of their losers."""
        made, size = [], max(1, self.at_once // 2)
        for pair in zip(better.split(size), worse.split(size), strict=True):
            won = torch.stack([torch.ones_like(part) for part in pair]).float()
            known = {"score": won * torch.tensor([[1.0], [0.0]], device=won.device), "scale": torch.ones_like(won)}
            for step in range(len(episodes.times) - 1):
                batch = replayed(episodes, torch.cat(pair), step, aux)
                made.append(replace(batch, aux=batch.aux | {"pair": won.flatten()}
                                    | {name: value.flatten() for name, value in known.items()}))  # fmt: skip
        return made

    def loss(self, run: Run, batch: Noised) -> Loss:
        q = self.explorer.law(run, run.policy, batch).log_prob(batch.y) - batch.aux["log_prob"]

        def grouped(values: Tensor) -> Tensor:
            """[B] -> [P, G]."""
            return values.view(2, -1).T if "pair" in batch.aux else values.view(-1, self.group)

        scores, outside = grouped(batch.aux["score"]), (q.detach().expm1().abs() > self.clip).float()
        total, count = step_preferences(grouped(q), scores, self.beta, self.clip)
        shown = {"outside": outside, **logged(batch)}
        metrics = {name: grouped(value).mean(1) for name, value in shown.items()} | {"pairs": count.float()}
        time = grouped(run.process.fraction(batch.t))[:, 0]
        return Loss(grouped(batch.aux["scale"])[:, 0] * total, time, metrics)
