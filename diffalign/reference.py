"""Who the policy is compared with, so that no objective can tell the two apart.

A row of `REFERENCES` takes the section's keywords, checks them, and gives a function that makes the reference of a
pipeline: after the adapter is attached and before the first step. Those that move look at the policy's weights after
each step, and run the policy's own network with the weights they keep: same kernels, no second copy of what is frozen.
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
MakeReference = Callable[[LatentPipeline], "Reference | None"]


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
    """A reference that stays as it is; `network` is what computes it, less what is in training."""

    def __init__(self, policy: Policy, network: torch.nn.Module) -> None:
        self.policy, self.network = policy, network

    def __call__(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        return self.policy(x_t, t, condition)

    def after_step(self, step: int) -> None:
        """Nothing moves."""

    def tensors(self) -> Weights:
        return {}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Nothing is kept."""


def adapter_off() -> MakeReference:
    """The same weights with the adapter off: no second copy, and exactly the starting point of a fresh LoRA."""
    return lambda pipe: Fixed(without_adapters(pipe), pipe.network)


def frozen_copy() -> MakeReference:
    """A copy of the network as it is at the start: for full fine-tuning, or to stay close to an `init_lora`."""
    return _frozen


def _frozen(pipe: LatentPipeline) -> Fixed:
    frozen = copy.copy(pipe)
    frozen.network = copy.deepcopy(pipe.network).requires_grad_(False).eval()
    if compiled(pipe.network):  # a copy is not; both are to run the same kernels
        compile_blocks(frozen.network)
    return Fixed(frozen.predict, frozen.network)


def none() -> MakeReference:
    """Nobody: for methods that compare with nothing, such as SFT."""
    return lambda pipe: None


def ema(decay: float = 0.995, every: int = 1, rise: float | None = None) -> MakeReference:
    """An exponential moving average of the policy, updated every so many steps.

    With `rise` the decay is rise * (number of updates) until it reaches `decay`: a policy that draws for itself may
    follow quickly at first (DiffusionNFT).

    Raises:
        ValueError: a decay outside [0, 1], `every` below 1, or a `rise` that is not above 0.
    """
    if not 0 <= decay <= 1:
        raise ValueError(f"reference.decay: expected a number in [0, 1], got {decay}")
    if rise is not None and not rise > 0:
        raise ValueError(f"reference.rise: expected a number above 0, or leave it out, got {rise}")

    def move(kept: Weights, policy: Weights, step: int) -> None:
        now = decay if rise is None else min(decay, rise * (step // every))
        for name, value in policy.items():
            kept[name].lerp_(value, 1 - now)

    when = _every(every)
    return lambda pipe: Following(pipe, when, move)


def sync(every: int = 40) -> MakeReference:
    """The policy as it was at the last multiple of `every` steps (online DPO, SPIN).

    Raises:
        ValueError: `every` below 1.
    """
    when = _every(every)
    return lambda pipe: Following(pipe, when, _replace)


def stages(steps: list[int]) -> MakeReference:
    """The policy as it was at the start of the stage: it is taken anew after each of these numbers of steps.

    Raises:
        ValueError: no steps, or one below 1.
    """
    if not isinstance(steps, list) or not steps or not all(type(s) is int and s > 0 for s in steps):
        raise ValueError(f"reference.steps: expected a list such as [500, 1000], got {steps!r}")
    return lambda pipe: Following(pipe, lambda step: step in steps, _replace)


def pool(every: int = 30, size: int = POOL_SIZE, seed: int = 0) -> MakeReference:
    """A random one of the policy's past checkpoints, another every so many steps (SePPO, arXiv 2410.05255).

    The choice is among those before the newest, which is the policy itself at that moment; so for the first two
    stretches it is the start. No training code was released, and the paper's counting allows both readings.

    Args:
        every: steps between two checkpoints, and for how long one is the reference.
        size: most that are kept; the oldest but the start and the one in use is then forgotten. Each is as large as
            what is trained.
        seed: of the choice.

    Raises:
        ValueError: `every` or `size` below 1.
    """
    if size < 1:
        raise ValueError(f"reference.size: expected room for one checkpoint at least, got {size}: an empty pool has no "
                         f"reference to offer")  # fmt: skip
    _every(every)
    return lambda pipe: Pool(pipe, every, size, seed)


def trained_weights(pipe: LatentPipeline) -> dict[str, torch.nn.Parameter]:
    """The parameters in training, by name."""
    return {name: p for name, p in pipe.network.named_parameters() if p.requires_grad}


@contextlib.contextmanager
def with_weights(parameters: Mapping[str, torch.nn.Parameter], values: Mapping[str, Tensor]) -> Iterator[None]:
    """Other values behind the same parameters, put back whatever happens.

    The storage is exchanged and nothing is copied, so a backward pass through earlier calls still finds its weights.
    """
    own = {name: parameter.data for name, parameter in parameters.items()}
    _put(parameters, values)
    try:
        yield
    finally:
        _put(parameters, own)


def _put(parameters: Mapping[str, torch.nn.Parameter], values: Mapping[str, Tensor]) -> None:
    """Autocast remembers a parameter's 16-bit copy by the parameter: what it remembers is of the old values."""
    for name, parameter in parameters.items():
        parameter.data = values[name]
    torch.clear_autocast_cache()


@contextlib.contextmanager
def evaluating(network: torch.nn.Module) -> Iterator[None]:
    """The network without dropout, as a reference and as what draws pictures; in its own mode again afterwards."""
    if not network.training:
        yield
        return
    network.eval()
    try:
        yield
    finally:
        network.train()


@final
class Following:
    """One set of kept weights, which `move` brings up to the policy's whenever `when` says so."""

    def __init__(
        self, pipe: LatentPipeline, when: Callable[[int], bool], move: Callable[[Weights, Weights, int], None]
    ) -> None:
        self.pipe, self.when, self.move = pipe, when, move
        self.parameters = trained_weights(pipe)
        self.kept = _copied(self.parameters)

    @torch.no_grad()
    def __call__(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        with evaluating(self.pipe.network), with_weights(self.parameters, self.kept):
            return self.pipe.predict(x_t, t, condition)

    def after_step(self, step: int) -> None:
        if self.when(step):
            self.move(self.kept, {name: p.detach() for name, p in self.parameters.items()}, step)

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
        with evaluating(self.pipe.network), with_weights(self.parameters, self.kept[self.chosen]):
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


def _replace(kept: Weights, policy: Weights, step: int) -> None:
    for name, value in policy.items():
        kept[name].copy_(value)


def _copied(parameters: Mapping[str, Any]) -> Weights:
    return {name: parameter.detach().clone() for name, parameter in parameters.items()}
