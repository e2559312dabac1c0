"""What a method is, and the steps that several of them take.

A method is a frozen dataclass of hyper-parameters with `prepare` (no gradient: noise, invert, roll out, score) and
`loss` (gradient: one value per sample, and what to log). It knows no device, no loop and no model family.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from diffalign.losses import squared_error
from diffalign.process import NoiseProcess, moved, target
from diffalign.sampling import Condition, Policy, concatenate


class Need(enum.Enum):
    """What a method cannot run without; the trainer refuses a bad combination before anything loads."""

    PAIRS = "preference pairs (data)"
    PROMPTS = "prompts"
    REWARD = "a reward"
    REWARD_GRADIENT = "a reward with gradients"
    REFERENCE = "a reference"
    SNAPSHOTS = "past checkpoints"
    STOCHASTIC_SAMPLER = "a stochastic sampler"


@dataclass(frozen=True)
class Run:
    """What a method is given: two policies of one type, the process, and the step's own generator (on the CPU)."""

    policy: Policy
    reference: Policy | None
    process: NoiseProcess
    parametrization: str
    generator: torch.Generator


@dataclass(frozen=True)
class PairBatch:
    """B preference pairs: latents [B, ...], one condition for both members, and P(the winner is the better one) [B]."""

    winner: Tensor
    loser: Tensor
    condition: Condition
    label: Tensor


@dataclass(frozen=True)
class Noised:
    """Samples at a time: x_t, the target y, both [N, ...], t [N], the condition, and label [B] as in `PairBatch`.

    For pairs N = 2B: all winners, then all losers. `reference_errors` [N], where they are known from an earlier pass
    over these very samples, spare the reference's pass: same kernels, precision and batch shape, or the logit is noise.
    """

    x_t: Tensor
    y: Tensor
    t: Tensor
    condition: Condition
    label: Tensor
    reference_errors: Tensor | None = None


@dataclass(frozen=True)
class Loss:
    """value [B] to differentiate; metrics: name -> [B], detached; `time` [B] in [0, 1], what they are binned by."""

    value: Tensor
    time: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)


class Method(Protocol):
    """The contract; `methods/dpo.py` is the example to read."""

    needs: ClassVar[frozenset[Need]]

    def prepare(self, run: Run, batch: PairBatch) -> Sequence[Noised]:
        """Microbatches to take the loss of, made under no_grad."""
        ...

    def loss(self, run: Run, batch: Noised) -> Loss:
        """Per-sample value and metrics."""
        ...


def noise_together(
    run: Run, members: Sequence[Tensor], condition: Condition, label: Tensor, time_range: tuple[float, float]
) -> Noised:
    """Noises several latents [B, ...] of the same prompts with one t and one eps per row, shared by all members.

    Sharing t and eps is variance reduction: what differs between winner and loser is then only the picture.
    """
    first = members[0]
    count, device = len(first), first.device
    t = moved(run.process.training_times(count, run.generator, *time_range), device)
    eps = moved(torch.randn(first.shape, generator=run.generator), device)
    x0 = torch.cat([m.float() for m in members])
    t, eps = t.repeat(len(members)), eps.repeat(len(members), *[1] * (eps.ndim - 1))
    return Noised(
        x_t=run.process.add_noise(x0, eps, t),
        y=target(run.parametrization, x0, eps, *run.process.coefficients(t)),
        t=t,
        condition=concatenate(*[condition] * len(members)),
        label=label,
    )


def errors(run: Run, batch: Noised) -> tuple[Tensor, Tensor]:
    """(m, r) [N]: squared errors of policy (with gradient) and reference (without), on identical inputs."""
    r = reference_errors(run, batch) if batch.reference_errors is None else batch.reference_errors
    return squared_error(run.policy(batch.x_t, batch.t, batch.condition), batch.y), r


@torch.no_grad()
def reference_errors(run: Run, batch: Noised) -> Tensor:
    """r [N]: what `Noised.reference_errors` may hold when the same samples come again.

    Raises:
        ValueError: the run has no reference.
    """
    if run.reference is None:
        raise ValueError("this method compares the policy with a reference, and the run has none; "
                         "set reference: {name: adapter_off} or {name: frozen_copy}")  # fmt: skip
    return squared_error(run.reference(batch.x_t, batch.t, batch.condition), batch.y)
