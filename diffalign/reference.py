"""Who the policy is compared with, so that no objective can tell the two apart.

A reference is made after the adapter is attached and before the first step. Those that move look at the policy's
weights after each step, and run the policy's own network with the weights they keep: same kernels, no second copy of
what is frozen.
"""

from __future__ import annotations

import contextlib
import copy
import random
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol, final

import torch
from torch import Tensor

from diffalign.pipelines.base import LatentPipeline
from diffalign.pipelines.compiling import compile_blocks, compiled
from diffalign.pipelines.lora import without_adapters
from diffalign.sampling import Condition, Policy

REFERENCES: dict[str, str] = {
    "adapter_off": "diffalign.reference:adapter_off",
    "frozen_copy": "diffalign.reference:frozen_copy",
    "none": "diffalign.reference:none",
    "ema": "diffalign.reference:ema",
    "sync": "diffalign.reference:sync",
    "stages": "diffalign.reference:stages",
    "pool": "diffalign.reference:pool",
}
MOVING = frozenset({"ema", "sync", "stages", "pool"})  # which of them change during a run

POOL_SIZE = 8

Weights = dict[str, Tensor]
MakeReference = Callable[..., "Reference | None"]  # of pipe=


class Reference(Protocol):
    """A policy that may move between steps."""

    def __call__(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor: ...

    def after_step(self, step: int) -> None:
        """Looks at the policy, which has made this many steps."""
        ...

    def tensors(self) -> Weights:
        """What a checkpoint must hold beside the policy's weights."""
        ...

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Goes on from what `tensors` gave."""
        ...


@final
class Fixed:
    """A reference that stays as it is."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy

    def __call__(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        return self.policy(x_t, t, condition)

    def after_step(self, step: int) -> None:
        """Nothing moves."""

    def tensors(self) -> Weights:
        return {}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Nothing is kept."""


def adapter_off(pipe: LatentPipeline) -> Fixed:
    """The same weights with the adapter off: no second copy, and exactly the starting point of a fresh LoRA."""
    return Fixed(without_adapters(pipe))


def frozen_copy(pipe: LatentPipeline) -> Fixed:
    """A copy of the network as it is now: for full fine-tuning, or to stay close to an `init_lora`."""
    frozen = copy.copy(pipe)
    frozen.network = copy.deepcopy(pipe.network).requires_grad_(False).eval()
    if compiled(pipe.network):  # a copy is not; both are to run the same kernels
        compile_blocks(frozen.network)
    return Fixed(frozen.predict)


def none(pipe: LatentPipeline) -> None:
    """Nobody: for methods that compare with nothing, such as SFT."""


def ema(pipe: LatentPipeline, decay: float = 0.995, every: int = 1) -> Reference:
    """An exponential moving average of the policy, updated every so many steps.

    Raises:
        ValueError: a decay outside [0, 1], or `every` below 1.
    """
    if not 0 <= decay <= 1:
        raise ValueError(f"reference.decay: expected a number in [0, 1], got {decay}")

    def move(kept: Weights, policy: Weights) -> None:
        for name, value in policy.items():
            kept[name].lerp_(value, 1 - decay)

    return Following(pipe, _every(every), move)


def sync(pipe: LatentPipeline, every: int = 40) -> Reference:
    """The policy as it was at the last multiple of `every` steps (online DPO, SPIN).

    Raises:
        ValueError: `every` below 1.
    """
    return Following(pipe, _every(every), _replace)


def stages(pipe: LatentPipeline, steps: list[int]) -> Reference:
    """The policy as it was at the start of the stage: it is taken anew after each of these numbers of steps.

    Raises:
        ValueError: no steps, or one below 1.
    """
    if not isinstance(steps, list) or not steps or not all(type(s) is int and s > 0 for s in steps):
        raise ValueError(f"reference.steps: expected a list such as [500, 1000], got {steps!r}")
    return Following(pipe, lambda step: step in steps, _replace)


def pool(pipe: LatentPipeline, every: int = 30, size: int = POOL_SIZE, seed: int = 0) -> Reference:
    """A random one of the policy's past checkpoints, another every so many steps (SePPO, arXiv 2410.05255).

    Args:
        every: steps between two checkpoints, and for how long one is the reference.
        size: most that are kept; the oldest but the start is then forgotten. Each is as large as what is trained.
        seed: of the choice.

    Raises:
        ValueError: `every` or `size` below 1.
    """
    if size < 1:
        raise ValueError(f"reference.size: expected room for one checkpoint at least, got {size}: an empty pool has no "
                         f"reference to offer")  # fmt: skip
    _every(every)
    return Pool(pipe, every, size, seed)


def trained_weights(pipe: LatentPipeline) -> dict[str, torch.nn.Parameter]:
    """The parameters in training, by name."""
    return {name: p for name, p in pipe.network.named_parameters() if p.requires_grad}


@contextlib.contextmanager
def with_weights(parameters: Mapping[str, torch.nn.Parameter], values: Mapping[str, Tensor]) -> Iterator[None]:
    """Other values behind the same parameters, put back whatever happens.

    The storage is exchanged and nothing is copied, so a backward pass through earlier calls still finds its weights.
    """
    own = {name: parameter.data for name, parameter in parameters.items()}
    for name, parameter in parameters.items():
        parameter.data = values[name]
    try:
        yield
    finally:
        for name, parameter in parameters.items():
            parameter.data = own[name]


@final
class Following:
    """One set of kept weights, which `move` brings up to the policy's whenever `when` says so."""

    def __init__(
        self, pipe: LatentPipeline, when: Callable[[int], bool], move: Callable[[Weights, Weights], None]
    ) -> None:
        self.pipe, self.when, self.move = pipe, when, move
        self.parameters = trained_weights(pipe)
        self.kept = _copied(self.parameters)

    @torch.no_grad()
    def __call__(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        with with_weights(self.parameters, self.kept):
            return self.pipe.predict(x_t, t, condition)

    def after_step(self, step: int) -> None:
        if self.when(step):
            self.move(self.kept, {name: p.detach() for name, p in self.parameters.items()})

    def tensors(self) -> Weights:
        return self.kept

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        self.kept = {name: tensors[name].to(p.device, p.dtype) for name, p in self.parameters.items()}


@final
class Pool:
    """Past checkpoints, of which one at a time is the reference."""

    def __init__(self, pipe: LatentPipeline, every: int, size: int, seed: int) -> None:
        self.pipe, self.every, self.size, self.seed = pipe, every, size, seed
        self.parameters = trained_weights(pipe)
        self.kept: dict[int, Weights] = {0: _copied(self.parameters)}  # by the step they are of
        self.chosen = 0

    @torch.no_grad()
    def __call__(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        with with_weights(self.parameters, self.kept[self.chosen]):
            return self.pipe.predict(x_t, t, condition)

    def after_step(self, step: int) -> None:
        if step % self.every:
            return
        # chosen before the newest is added: the reference of iteration k is one of the checkpoints 0 .. k-1
        self.chosen = random.Random(f"{self.seed}/{step}").choice(sorted(self.kept))
        self.kept[step] = _copied(self.parameters)
        past = [old for old in sorted(self.kept) if old not in (0, self.chosen)]
        while len(self.kept) > self.size and past:
            del self.kept[past.pop(0)]

    def tensors(self) -> Weights:
        held = {f"{step}/{name}": value for step, weights in self.kept.items() for name, value in weights.items()}
        return held | {"chosen": torch.tensor([self.chosen])}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        self.chosen, self.kept = int(tensors["chosen"].item()), {}
        for key, value in tensors.items():
            if key != "chosen":
                of, _, name = key.partition("/")
                like = self.parameters[name]
                self.kept.setdefault(int(of), {})[name] = value.to(like.device, like.dtype)


def _every(every: int) -> Callable[[int], bool]:
    if every < 1:
        raise ValueError(f"reference.every: expected a number of steps of at least 1, got {every}")
    return lambda step: step % every == 0


def _replace(kept: Weights, policy: Weights) -> None:
    for name, value in policy.items():
        kept[name].copy_(value)


def _copied(parameters: Mapping[str, Any]) -> Weights:
    return {name: parameter.detach().clone() for name, parameter in parameters.items()}
