"""One Inversion-DPO LoRA step as this package takes it, for `make bench-gpu`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from benchmarks.steps import BETA, Cached, Ours, Subject
from diffalign.methods.base import Loss, Noised, Run, computed
from diffalign.methods.inversion_dpo import InversionDPO


class Inverted(Ours):
    """4 of the 40 steps of each trajectory, each with a backward pass of its own, and then the optimizer's step.

    Args:
        kept: the reference's trajectories are computed once per seed and then looked up, in memory; a run reads them
            from disk.
        rule: other settings of the method.
    """

    def __init__(
        self, subject: Subject, cached: Cached, checkpointing: bool = False, kept: bool = False,
        rule: InversionDPO | None = None,
    ) -> None:  # fmt: skip
        super().__init__(subject, cached, checkpointing)
        self.rule = rule or InversionDPO(beta=BETA)
        self.kept: dict[int, Tensor] | None = {} if kept else None

    def run(self, seed: int) -> Run:
        def remember(what: str, rows: Mapping[str, Tensor], compute: Callable[[], Tensor]) -> Tensor:
            if self.kept is None:
                return computed(what, rows, compute)
            if seed not in self.kept:
                self.kept[seed] = compute()
            return self.kept[seed]

        times = self.subject.pipe.times
        return replace(super().run(seed), times=times, remember=remember)

    def loss(self, seed: int) -> Tensor:
        """Of all microbatches, whose graphs are then all alive: for parity."""
        run = self.run(seed)
        with self.subject.autocast():
            losses = [self.rule.loss(run, noised) for noised in self._prepared(run)]
        return torch.stack([loss.value.mean() for loss in losses]).mean()

    def __call__(self, seed: int) -> None:
        run = self.run(seed)
        with self.subject.autocast():
            prepared = self._prepared(run)
            for noised in prepared:
                loss: Loss = self.rule.loss(run, noised)
                (loss.value.mean() / len(prepared)).backward()
        torch.nn.utils.clip_grad_norm_(self.subject.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def _prepared(self, run: Run) -> list[Noised]:
        return list(self.rule.prepare(run, self.cached.batch(run.generator, self.subject.device)))
