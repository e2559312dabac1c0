"""Weights beside the ones in training: averages, and the best so far."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
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

    def in_place(self) -> AbstractContextManager[None]:
        """The averages in place of the weights, if there are any."""
        return _in_place(self.parameters, self.values)


@final
class Best:
    """The weights of the validation with the best held-out accuracy, and whether it is time to stop.

    Without accuracy (a method that ranks nothing) the least held-out loss counts. Without a patience nothing is kept.
    """

    def __init__(self, parameters: Mapping[str, torch.nn.Parameter], patience: int | None) -> None:
        self.parameters, self.patience = parameters, patience
        self.values: dict[str, Tensor] = {}
        self.score, self.step, self.worse = -math.inf, 0, 0

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        """After a validation, while the weights that were validated are in place."""
        score = metrics.get("validation/accuracy", -metrics.get("validation/loss", math.inf))
        if self.patience is None:
            return
        if score > self.score:
            self.score, self.step, self.worse = score, step, 0
            self.values = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        else:
            self.worse += 1

    @property
    def over(self) -> bool:
        """Whether `patience` validations in a row were no better."""
        return self.patience is not None and self.worse >= self.patience

    def counters(self) -> list[float]:
        """What a checkpoint must hold beside `values`."""
        return [self.score if self.values else 0.0, self.step, self.worse]

    def restore(self, values: Mapping[str, Tensor], counters: Sequence[float]) -> None:
        """Goes on from whole tensors, which every rank has."""
        self.values = {name: placed_like(values[name], parameter) for name, parameter in self.parameters.items()}
        self.score, self.step, self.worse = counters[0], int(counters[1]), int(counters[2])

    def in_place(self) -> AbstractContextManager[None]:
        """The best weights in place of the last ones, if any were kept."""
        return _in_place(self.parameters, self.values)


@contextmanager
def _in_place(parameters: Mapping[str, torch.nn.Parameter], values: Mapping[str, Tensor]) -> Iterator[None]:
    kept = {name: parameters[name].detach().clone() for name in values}
    _put(parameters, values)
    try:
        yield
    finally:
        _put(parameters, kept)


@torch.no_grad()
def _put(parameters: Mapping[str, torch.nn.Parameter], values: Mapping[str, Tensor]) -> None:
    for name, value in values.items():
        parameters[name].copy_(value)
