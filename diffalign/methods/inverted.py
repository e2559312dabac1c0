"""Pictures noised by inversion instead of by a draw: what InPO, SmPO and Inversion-DPO share."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from diffalign.inversion import MODES, inversion_stepper, invert_each, levels_of, walks
from diffalign.methods.base import Batch, Noised, Run, reference_of
from diffalign.methods.checks import check_choice, check_not_negative, check_positive, check_times
from diffalign.process import FewTimes, moved, per_sample, target
from diffalign.sampling import Condition, Stepper, concatenate

MODELS = ("policy", "reference")


@dataclass(frozen=True)
class Inversion:
    """How `noised_by_inversion` walks; the keywords of InPO and SmPO, who explain them."""

    steps: int
    mode: str
    model: str
    refine: int
    average: bool
    eta: float
    time_low: float
    time_high: float

    def __post_init__(self) -> None:
        check_positive(steps=self.steps)
        check_not_negative(renoise=self.refine, eta=self.eta)
        check_choice("mode", self.mode, MODES)
        check_choice("model", self.model, MODELS)
        check_times(self.time_low, self.time_high)


@torch.no_grad()
def noised_by_inversion(run: Run, batch: Batch, how: Inversion, aux: dict[str, Tensor] | None = None) -> Noised:
    """All members at a time that each pair shares, with the noise that leads from there to the picture as target."""
    x0, condition = torch.cat([m.float() for m in batch.members]), concatenate(*batch.conditions)
    levels = grid(run, how.steps)
    tau = run.process.training_times(len(batch.label), run.generator, how.time_low, how.time_high)
    tau = nearest(levels_inside(run, levels, how.time_low, how.time_high), tau) if how.mode == "snap" else tau
    walk = walks(levels, tau.repeat(len(batch.members)), how.mode)
    network = run.policy if how.model == "policy" else reference_of(run)

    def step_of(some: Condition) -> Stepper:
        return inversion_stepper(network, run.process, run.parametrization, some, refine=how.refine,
                                 average=how.average, clean=True, eta=how.eta)  # fmt: skip

    seeds = torch.randint(2**62, (len(x0),), generator=run.generator).tolist() if how.eta else []
    x_t = invert_each(
        step_of, x0, condition, walk, waves=how.steps + (how.mode == "exact") if run.together else 0,
        generators=[torch.Generator().manual_seed(seed) for seed in seeds] or None,
    )  # fmt: skip
    t = moved(walk.t, x0.device)
    return Noised(x_t, implied_target(run, x0, x_t, t), t, condition, batch.label, aux=aux or {})


def implied_target(run: Run, x0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """y [N, ...] of the noise (x_t - alpha x0) / sigma that leads from x_t at t [N] to x0."""
    alpha, sigma = run.process.coefficients(t)
    eps = (x_t - per_sample(alpha, x0) * x0) / per_sample(sigma, x0)
    return target(run.parametrization, x0, eps, alpha, sigma)


def grid(run: Run, steps: int) -> Tensor:
    """[S + 1] ascending levels on the CPU: those of the sampler's steps, or the times that alone are trained."""
    levels = levels_of(run.times(steps))
    if isinstance(run.process, FewTimes):
        return torch.cat([levels[:1], run.process.times.cpu().float().sort().values])
    return levels


def levels_inside(run: Run, levels: Tensor, low: float, high: float) -> Tensor:
    """Those of the levels, the clean end apart, that lie in a part of the noise axis.

    Raises:
        ValueError: none does.
    """
    shares = run.process.fraction(levels[1:])
    inside = levels[1:][(shares >= low) & (shares <= high)]
    if not len(inside):
        raise ValueError(f"none of the {len(shares)} levels of the inversion lies in the trained part of the noise "
                         f"axis, {low} to {high}: they lie at {', '.join(f'{s:.3f}' for s in shares.tolist())}; change "
                         f"method.time_low and time_high, or take more method.steps")  # fmt: skip
    return inside


def nearest(levels: Tensor, tau: Tensor) -> Tensor:
    """[B] of the levels, the nearest to each tau [B]."""
    return levels[(levels - tau[:, None]).abs().argmin(1)]
