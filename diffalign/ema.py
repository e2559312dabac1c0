"""Averaged weights beside the ones in training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import final

import torch
from torch import Tensor

from diffalign.distributed import placed_like


@final
class Ema:
    """Exponential moving averages of named parameters, fp32 like these; without a decay there are none."""

    def __init__(self, parameters: Mapping[str, torch.nn.Parameter], decay: float | None) -> None:
        self.parameters, self.decay = parameters, decay or 0.0
        self.values: dict[str, Tensor] = {n: p.detach().clone() for n, p in parameters.items()} if decay else {}

    def update(self, steps: int) -> None:
        """After the step that makes them `steps`: early ones are forgotten faster, or the start would stay in it."""
        if self.values:
            decay = min(self.decay, (1 + steps) / (10 + steps))
            trained = [parameter.detach() for parameter in self.parameters.values()]
            torch._foreach_lerp_(list(self.values.values()), trained, 1 - decay)

    def restore(self, values: Mapping[str, Tensor]) -> None:
        """Goes on from whole tensors, which every rank has."""
        self.values = {name: placed_like(values[name], parameter) for name, parameter in self.parameters.items()}

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The averages in place of the weights, if there are any."""
        kept = {name: self.parameters[name].detach().clone() for name in self.values}
        self._put(self.values)
        try:
            yield
        finally:
            self._put(kept)

    @torch.no_grad()
    def _put(self, values: Mapping[str, Tensor]) -> None:
        for name, value in values.items():
            self.parameters[name].copy_(value)
