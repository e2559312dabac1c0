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

from diffalign.data.example import Example

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

    def refuse(self, known: Known) -> None:
        """Raises ValueError where this selection cannot work with these examples."""
        ...


@dataclass(frozen=True)
class Everything:
    """All examples, always."""

    every: ClassVar[int] = 0
    draws: ClassVar[int] = 0

    def chosen(self, step: int, known: Known) -> Tensor | None:
        return None

    def refuse(self, known: Known) -> None:
        """Works with any."""


@dataclass(frozen=True)
class Curriculum:
    """The examples with the largest score gaps first, then more and more: Curriculum-DPO, arXiv 2405.13637.

    Stage k of `parts` has the k / parts share with the largest gaps; from the last stage on all of them. What counts
    as all may be narrowed, as the paper does for Pick-a-Pic (PickScore gaps above 0.02, the top 150,000).

    Args:
        parts: number of stages.
        every: optimizer steps of a stage.
        least_gap: examples whose score gap is below this are never drawn.
        most: at most so many are, those with the largest gaps.

    Raises:
        ValueError: fewer than one of parts, every or most, or a negative gap; with the data, gaps that are all the
            same, so that there is no order, or none as large as least_gap.
    """

    draws: ClassVar[int] = 0

    parts: int = 6
    every: int = 500
    least_gap: float = 0.0
    most: int | None = None

    def __post_init__(self) -> None:
        if self.parts < 1 or self.every < 1:
            raise ValueError(f"selection: expected parts and every of at least 1, got {self.parts}, {self.every}")
        if self.least_gap < 0 or (self.most is not None and self.most < 1):
            raise ValueError(f"selection: expected least_gap of at least 0 and most of at least 1, got "
                             f"{self.least_gap}, {self.most}")  # fmt: skip

    def chosen(self, step: int, known: Known) -> Tensor | None:
        stage = min(step // self.every + 1, self.parts)
        kept = self._kept(known.gaps)
        return kept[: math.ceil(len(kept) * stage / self.parts)].sort().values

    def refuse(self, known: Known) -> None:
        gaps = known.gaps
        if not len(self._kept(gaps)):
            raise ValueError(f"selection: no example has a score gap of least_gap {self.least_gap}, the largest is "
                             f"{gaps.max().item():.3g}")  # fmt: skip
        if self.parts > 1 and (gaps == gaps[0]).all():
            raise ValueError(f"selection: a curriculum orders examples by the gap of their scores, and all gaps here "
                             f"are {gaps[0].item():.3g}: give the data scores (`diffalign label` does, by a reward), "
                             f"or set selection: {{name: all}}")  # fmt: skip

    def _kept(self, gaps: Tensor) -> Tensor:
        order = torch.sort(gaps, descending=True, stable=True).indices
        return order[: int((gaps >= self.least_gap).sum())][: self.most]


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

    def refuse(self, known: Known) -> None:
        """Whether the method has a logit is seen at the first batch."""


MOMENTUM = 0.5  # of a new measurement against the ones before: a policy that confirms itself should not run away


@final
class Chooser:
    """A selection and what is known of the training examples.

    Raises:
        ValueError: a selection that cannot work with these examples.
    """

    def __init__(self, selection: Selection, examples: Sequence[Example]) -> None:
        self.selection = selection
        # of a prompt alone there are no scores
        self.known = Known(torch.tensor([max(e.scores, default=0.0) - min(e.scores, default=0.0) for e in examples]))
        selection.refuse(self.known)
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
