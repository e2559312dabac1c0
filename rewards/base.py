"""What a reward is, how its inputs are told apart, and the weighted sum of several.

PIL pictures and uint8 tensors are scored by the exact recipe, without gradient: the number that a paper reports.
Float tensors are scored by the differentiable recipe: the number whose gradient trains.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from PIL import Image
from torch import Tensor

from diffalign.rewards.prepared import once, shared
from diffalign.rewards.preprocess import to_pictures

Images = Tensor | Sequence[Image.Image]
ScorePictures = Callable[[Sequence[Image.Image], Sequence[str]], Tensor]
ScorePixels = Callable[[Tensor, Sequence[str]], Tensor]

log = logging.getLogger(__name__)

ROUNDING = 1e-4  # how far above 1 or below 0 a pixel may be before it counts as a wrong range


CHECKED = ("official code, small weights", "official code, no weights", "published number", "formula only")


@dataclass(frozen=True)
class Card:
    """What a reward says of itself, on its class, so that it can be listed without any weights.

    Args:
        unit: what a score is measured in, as the paper has it.
        range: bounds that no score leaves; infinite where there is none.
        source: where weights or rule come from: hub id and file, or paper.
        code: licence of the code that the port follows.
        weights: licence of the weights; "none" for a rule.
        differentiable: whether float pixels get a gradient.
        side: pixels of the square that the network reads; None for a reward without one.
        across_prompts: whether scores of pictures of different prompts may be compared.
        checked: a row of `CHECKED`, what the port was compared with.
        compares: whether a score follows from comparison with the other pictures of the prompt in the same call, which
            then has to hold all of them.
    """

    unit: str
    range: tuple[float, float]
    source: str
    code: str
    weights: str
    differentiable: bool
    side: int | None
    across_prompts: bool
    checked: str
    compares: bool = False


class Reward(Protocol):
    """Scores pictures against their prompts; higher is better, in the unit of the paper that it comes from."""

    @property
    def name(self) -> str:
        """Its key in `diffalign.rewards.REWARDS`."""

    @property
    def card(self) -> Card:
        """What it is; an object's own may be more precise than its class's."""

    def __call__(self, images: Images, prompts: Sequence[str]) -> Tensor:
        """Scores [B], fp32, on the device of the pixels (CPU for PIL).

        Args:
            images: B PIL pictures of any sizes, or pixels [B, 3, H, W] or clips [B, F, 3, H, W] (the mean over
                frames), uint8 or float in [0, 1].
            prompts: one per picture or clip, or a single one for all.

        Raises:
            ValueError: counts that differ, another shape, type or range of values, or a gradient asked of a reward
                that has none.
        """


@runtime_checkable
class Explains(Protocol):
    """A reward that says why it gave no score."""

    @property
    def reasons(self) -> Sequence[str]:
        """Of the latest call, one per picture; "" where there is a score."""


def dispatch(
    name: str, images: Images, prompts: Sequence[str], *, exact: ScorePictures, differentiable: ScorePixels | None
) -> Tensor:
    """The body of most rewards: checks the inputs, picks the recipe, averages over frames. Scores [B].

    Args:
        exact: scores [N] of N PIL pictures and N prompts; called without gradient.
        differentiable: scores [N] of fp32 pixels [N, 3, H, W]; None for a reward without gradient.

    Raises:
        ValueError: see `Reward.__call__`.
    """
    once(check_images, images)
    prompts = each_prompt(prompts, len(images))
    if not isinstance(images, Tensor):
        with full_precision(), torch.no_grad():
            return exact(images, prompts).float().cpu()
    if differentiable is None and images.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"reward {name!r} has no gradient, but pixels that require one were given; pass pixels.detach()"
        )
    frames = 1 if images.ndim == 4 else images.shape[1]
    flat_prompts = [prompt for prompt in prompts for _ in range(frames)]
    if differentiable is not None and images.is_floating_point():
        with full_precision():
            scores = differentiable(once(_floats, images), flat_prompts)
    else:
        with full_precision(), torch.no_grad():
            scores = exact(once(_pictures, images), flat_prompts)
    return scores.float().to(images.device).view(-1, frames).mean(1)


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """No autocast inside: a training loop in bf16 would move scores by more than what they are to tell apart."""
    with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
        yield


def check_images(images: Images) -> None:
    """
    Raises:
        ValueError: not a non-empty sequence of PIL pictures, nor pixels [B, 3, H, W] or [B, F, 3, H, W], uint8 or
            float in [0, 1].
    """
    if isinstance(images, Tensor):
        _check_pixels(images)
        return
    if isinstance(images, Image.Image) or not isinstance(images, Sequence):
        raise ValueError(
            f"expected a tensor or a list of PIL pictures, got {type(images).__name__}; wrap one in a list"
        )
    others = [type(image).__name__ for image in images if not isinstance(image, Image.Image)]
    if others:
        raise ValueError(f"expected a list of PIL pictures, got {others[0]} in it; stack tensors with torch.stack")
    if not images:
        raise ValueError("expected at least one picture, got none")


def each_prompt(prompts: Sequence[str], count: int) -> Sequence[str]:
    """The prompt of each of `count` pictures; a single one is that of all.

    Raises:
        ValueError: neither `count` strings nor one.
    """
    if isinstance(prompts, str):
        raise ValueError(f"expected a list of {count} prompts, got one string; write [prompt]")
    if len(prompts) not in (1, count):
        raise ValueError(
            f"expected one prompt per picture, or one for all, got {len(prompts)} prompts for {count} pictures"
        )
    others = [prompt for prompt in prompts if not isinstance(prompt, str)]
    if others:
        raise ValueError(f"expected prompts that are strings, got {type(others[0]).__name__}: {others[0]!r}")
    return prompts if len(prompts) == count else [*prompts] * count


def flatten_frames(images: Tensor) -> tuple[Tensor, int]:
    """([B * F, 3, H, W], F) of clips [B, F, 3, H, W]; pictures [B, 3, H, W] have one frame."""
    if images.ndim == 4:
        return images, 1
    return images.flatten(0, 1), images.shape[1]


def _floats(images: Tensor) -> Tensor:
    return flatten_frames(images)[0].float()


def _pictures(images: Tensor) -> list[Image.Image]:
    return to_pictures(flatten_frames(images)[0])


def _check_pixels(pixels: Tensor) -> None:
    shape = list(pixels.shape)
    if pixels.ndim not in (4, 5) or shape[-3] != 3 or 0 in shape:
        raise ValueError(f"expected pixels [B, 3, H, W] or [B, F, 3, H, W], got {shape}")
    if pixels.dtype == torch.uint8:
        return
    if not pixels.is_floating_point():
        raise ValueError(f"expected uint8 pixels in 0..255 or float pixels in [0, 1], got {pixels.dtype}")
    low, high = torch.stack(pixels.detach().aminmax()).tolist()  # read from the device in one go
    if not (low >= -ROUNDING and high <= 1 + ROUNDING):  # NaN fails as well
        raise ValueError(
            f"expected float pixels in [0, 1], got values from {low:.4g} to {high:.4g}; "
            f"map [-1, 1] with x / 2 + 0.5, then clamp(0, 1)"
        )


class Weighted:
    """A weighted sum of rewards, itself a reward. `terms` keeps what each gave in the latest call, unweighted.

    Rewards with the same recipe share one resize of each picture, and with it the gradient through it.

    A weight of 0 is allowed: that reward is only logged, without gradient, as a held-out reward should be.

    Args:
        rewards: name for the log -> (reward, weight).

    Raises:
        ValueError: no reward, or a weight that is not a finite number.
    """

    name = "weighted"

    def __init__(self, rewards: Mapping[str, tuple[Reward, float]]) -> None:
        if not rewards:
            raise ValueError("expected at least one reward, got none")
        self.rewards = {name: reward for name, (reward, _) in rewards.items()}
        self.weights = {name: _finite(name, weight) for name, (_, weight) in rewards.items()}
        self.terms: dict[str, Tensor] = {}
        optimized = [reward for name, reward in self.rewards.items() if self.weights[name]]
        self.card = Card(
            unit="weighted sum",
            range=self._range(),
            source=_joined(reward.card.source for reward in self.rewards.values()),
            code=_joined(reward.card.code for reward in self.rewards.values()),
            weights=_joined(reward.card.weights for reward in self.rewards.values()),
            differentiable=bool(optimized) and all(reward.card.differentiable for reward in optimized),
            side=None,
            across_prompts=all(reward.card.across_prompts for reward in optimized),
            checked="formula only",
            compares=any(reward.card.compares for reward in self.rewards.values()),
        )

    def __call__(self, images: Images, prompts: Sequence[str]) -> Tensor:
        """sum_k w_k r_k, [B]; see `Reward.__call__`."""
        with shared():
            scores = {name: self._score(name, images, prompts) for name in self.rewards}
        self.terms = {name: score.detach() for name, score in scores.items()}
        # one that is only logged is left out: where its score is missing, 0 times NaN would be NaN
        counted = [self.weights[name] * score for name, score in scores.items() if self.weights[name]]
        return torch.stack(counted).sum(0) if counted else torch.zeros_like(next(iter(scores.values())))

    def _score(self, name: str, images: Images, prompts: Sequence[str]) -> Tensor:
        if self.weights[name]:
            return self.rewards[name](images, prompts)
        with torch.no_grad():
            return self.rewards[name](images, prompts)

    def _range(self) -> tuple[float, float]:
        bounds = [
            sorted(self.weights[name] * bound for bound in reward.card.range)
            for name, reward in self.rewards.items()
            if self.weights[name]  # 0 times infinity is not a number
        ]
        return sum(low for low, _ in bounds), sum(high for _, high in bounds)


class CutPrompts:
    """Says in the log, once, that a prompt is longer than a reward's text encoder reads."""

    def __init__(self, name: str) -> None:
        self.name, self._told = name, False

    def __call__(self, too_long: Sequence[str]) -> None:
        """Args: too_long: the prompts of which only a part is read; none says nothing."""
        if too_long and not self._told:
            self._told = True
            log.warning("%s: the prompt %r... is longer than the text encoder reads; the rest of it is ignored "
                        "(said once, also true of other prompts)", self.name, too_long[0][:60])  # fmt: skip


def _joined(values: Iterable[str]) -> str:
    return "; ".join(dict.fromkeys(values))


def _finite(name: str, weight: float) -> float:
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not -float("inf") < weight < float("inf"):
        raise ValueError(f"rewards.{name}: expected a finite number as weight, got {weight!r}")
    return float(weight)
