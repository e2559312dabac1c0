"""Which training examples a run draws from: all, the easy ones first, or those whose margin is clear.

A selection is a pure function of the step and of what is known of the examples; `Chooser` holds what is known. So a
resumed run goes on with the same examples.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol, final

import torch
from torch import Tensor

from diffalign.data.views import Example

SELECTIONS: dict[str, str] = {
    "all": "diffalign.selection:Everything",
    "curriculum": "diffalign.selection:Curriculum",
    "margin": "diffalign.selection:ByMargin",
}


@dataclass(frozen=True)
class Known:
    """Of the N training examples: score gaps [N], and the mean and standard error of their logits [N], if measured."""

    gaps: Tensor
    margins: Tensor | None = None
    deviations: Tensor | None = None


class Selection(Protocol):
    """The contract; `draws` is how many (t, eps) a margin is the mean of, 0 for a selection that needs none."""

    @property
    def every(self) -> int:
        """Steps between two looks; 0 for a selection that never changes."""
        ...

    @property
    def draws(self) -> int: ...

    def chosen(self, step: int, known: Known) -> Tensor | None:
        """[n] ascending indices of the examples to draw from at a step, or None for all of them."""
        ...


@dataclass(frozen=True)
class Everything:
    """All examples, always."""

    every: ClassVar[int] = 0
    draws: ClassVar[int] = 0

    def chosen(self, step: int, known: Known) -> Tensor | None:
        return None


@dataclass(frozen=True)
class Curriculum:
    """The examples with the largest score gaps first, then more and more: Curriculum-DPO, arXiv 2405.13637.

    Stage k of `parts` has the k / parts share with the largest gaps; from the last stage on all of them.

    Args:
        parts: number of stages.
        every: optimizer steps of a stage.

    Raises:
        ValueError: fewer than one of either.
    """

    draws: ClassVar[int] = 0

    parts: int = 6
    every: int = 500

    def __post_init__(self) -> None:
        if self.parts < 1 or self.every < 1:
            raise ValueError(f"selection: expected parts and every of at least 1, got {self.parts}, {self.every}")

    def chosen(self, step: int, known: Known) -> Tensor | None:
        stage = min(step // self.every + 1, self.parts)
        if stage == self.parts:
            return None
        order = torch.sort(known.gaps, descending=True, stable=True).indices
        return order[: math.ceil(len(order) * stage / self.parts)].sort().values


@dataclass(frozen=True)
class ByMargin:
    """The examples that the policy itself ranks as their labels do, by a clear margin: SeRA, arXiv 2410.09362.

    An example's margin is its logit h against the reference, less its standard error, averaged with what it was
    before; the largest `keep` share stays. Before the first measurement everything is drawn.

    Deviations from the paper, which is about language models: a diffusion logit at one (t, eps) is very noisy, so a
    margin is a mean over `draws` of them and its standard error is subtracted.

    Args:
        keep: share of the examples that stay.
        every: optimizer steps between two measurements; one takes draws * 4 network evaluations per pair.
        draws: draws of (t, eps), the same for all examples.

    Raises:
        ValueError: a value outside its range.
    """

    keep: float = 0.7
    every: int = 500
    draws: int = 8

    def __post_init__(self) -> None:
        if not 0 < self.keep <= 1 or self.every < 1 or self.draws < 2:
            raise ValueError(f"selection: expected keep in (0, 1], every of at least 1 and draws of at least 2, "
                             f"got {self.keep}, {self.every}, {self.draws}")  # fmt: skip

    def chosen(self, step: int, known: Known) -> Tensor | None:
        if known.margins is None or known.deviations is None:
            return None
        sure = known.margins - known.deviations
        return torch.sort(sure, descending=True, stable=True).indices[: math.ceil(len(sure) * self.keep)].sort().values


MOMENTUM = 0.5  # of a new measurement against the ones before: a policy that confirms itself should not run away


@final
class Chooser:
    """A selection and what is known of the training examples."""

    def __init__(self, selection: Selection, examples: Sequence[Example]) -> None:
        self.selection = selection
        self.known = Known(torch.tensor([max(e.scores) - min(e.scores) for e in examples]))
        self._kept: dict[int, tuple[int, ...] | None] = {}

    def chosen(self, step: int) -> tuple[int, ...] | None:
        """Indices to draw from at a step, or None for all."""
        stage = step // self.selection.every if self.selection.every else 0
        if stage not in self._kept:
            found = self.selection.chosen(step, self.known)
            self._kept = {stage: None if found is None else tuple(found.tolist())}
        return self._kept[stage]

    def due(self, step: int) -> bool:
        """Whether the margins are to be measured after this many steps."""
        return bool(self.selection.draws) and step > 0 and step % self.selection.every == 0

    def update(self, logits: Tensor) -> None:
        """logits: [draws, N] h of every example."""
        mean, deviation = logits.mean(0), logits.std(0) / math.sqrt(len(logits))
        if self.known.margins is not None:
            mean = MOMENTUM * mean + (1 - MOMENTUM) * self.known.margins
        self.known, self._kept = Known(self.known.gaps, mean, deviation), {}

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint must hold."""
        if self.known.margins is None or self.known.deviations is None:
            return {}
        return {"margins": self.known.margins, "deviations": self.known.deviations}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Goes on from what `tensors` gave."""
        self.known, self._kept = Known(self.known.gaps, tensors["margins"], tensors["deviations"]), {}
