"""From a picture to the noise that a sampler would have drawn it from: DDIM inversion, and Euler's on rectified flows.

    x_s = A x_t + C d        t < s, one step towards noise; d is the direction that the network gives

    variance preserving      d = eps:       A = alpha_s / alpha_t,  C = sigma_s - A sigma_t    (arXiv 2010.02502)
    rectified flow           d = velocity:  A = 1,                  C = s - t

The network is asked at the level that a step lands on (`told="landing"`): there the sampler will ask it on its way
back, and it is never asked at the clean end, for which it was not trained. With `refine` the step is repeated from
where it led: x <- A x_t + C d(x, s). That is a fixed-point iteration for the exact inverse of the sampler's own step,
and each evaluation gains one order, so an image -> noise -> image round trip of N steps is off by O(N^-(1 + refine)).
With `average` the directions are averaged instead (ReNoise, arXiv 2403.14602, as SmPO takes it), which is nearer to the
true path and not to the sampler's: the round trip stays O(1 / N).

Round trips of N(1, 0.5^2) under its exact predictor, latent RMSE in fp32 (tests/test_inversion.py):

    steps                               20        50        200
    epsilon, refine 0                   8.7e-2    3.8e-2    1.0e-2
    epsilon, refine 1, average          5.1e-2    2.0e-2    5.1e-3
    epsilon, refine 1                   1.3e-2    2.4e-3    1.6e-4
    epsilon, refine 3                   3.5e-4    1.2e-5    5.5e-7      what stays is rounding
    flow, refine 0                      3.9e-2    1.4e-2    3.5e-3
    flow, refine 3                      1.8e-5    7.2e-7    4.7e-7
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from diffalign.process import NoiseProcess, endpoints, moved, per_sample, target
from diffalign.sampling import Condition, Generators, Policy, Stepper, Trajectory, draw, sample
from diffalign.transition import Coefficients, Gaussian

TOLD = ("landing", "leaving")
MODES = ("snap", "exact", "round_up")


def line(kind: str, now: Coefficients, then: Coefficients) -> tuple[Tensor, Tensor]:
    """(A, C) [B] of x_s = A x_t + C d, for what a network of this parametrization gives directions in."""
    (alpha_t, sigma_t), (alpha_s, sigma_s) = now, then
    if kind == "flow":
        return torch.ones_like(alpha_t), sigma_s - sigma_t
    return alpha_s / alpha_t, sigma_s - alpha_s / alpha_t * sigma_t


def pivot(kind: str) -> str:
    """The parametrization in which directions are given: the velocity of a flow, else the noise."""
    return "flow" if kind == "flow" else "epsilon"


def departure(process: NoiseProcess, t: Tensor, clean: bool) -> Coefficients:
    """(alpha, sigma) [B] at t; with `clean`, (1, 0) at the end of a variance-preserving process.

    Stable Diffusion's sampler ends at alphas_cumprod[0], not at the data. To return to where it would have ended, start
    there; to ask which noise leads to a picture, start from the picture: a field that says k everywhere then gives back
    k, and the first level, which may be time 0, is a step at all.
    """
    alpha, sigma = process.coefficients(t)
    if not clean:
        return alpha, sigma
    return torch.where(t < 0, torch.ones_like(alpha), alpha), torch.where(t < 0, torch.zeros_like(sigma), sigma)


def inversion_stepper(
    policy: Policy,
    process: NoiseProcess,
    kind: str,
    condition: Condition,
    *,
    refine: int = 0,
    average: bool = False,
    told: str = "landing",
    clean: bool = False,
    eta: float = 0.0,
) -> Stepper:
    """A step towards noise, for `diffalign.sampling.sample` along ascending times.

    Args:
        refine: evaluations beside the first; they are asked at the landing level, where the step before led.
        average: take the mean of all directions, not the last one.
        told: landing | leaving: the level at which the first evaluation is asked; never the clean end.
        clean: the start is data, see `departure`.
        eta: noise on top, times the posterior std of the forward chain (InPO's released code has 0.1).

    Raises:
        ValueError: another `told`, or a negative `refine`.
    """
    if told not in TOLD or refine < 0:
        raise ValueError(f"expected told of {', '.join(TOLD)} and refine of at least 0, got {told!r}, {refine}")

    def step(x_t: Tensor, t: Tensor, s: Tensor) -> Gaussian:
        now, then = departure(process, t, clean), process.coefficients(s)
        a, c = (per_sample(factor, x_t) for factor in line(kind, now, then))
        at = s if told == "landing" else torch.where(process.fraction(t) > 0, t, s)
        x, directions = x_t, []
        for _ in range(1 + refine):
            y = policy(x, at, condition)
            directions.append(y if kind == "flow" else endpoints(kind, y, x, *process.coefficients(at)).eps)
            d = torch.stack(directions).mean(0) if average else directions[-1]
            x, at = a * x_t + c * d, s
        return Gaussian(x, eta * _posterior_std(now, then) if eta else torch.zeros_like(now[0]))

    return step


def _posterior_std(now: Coefficients, then: Coefficients) -> Tensor:
    (alpha_t, sigma_t), (alpha_s, sigma_s) = now, then
    return sigma_t / sigma_s * (sigma_s.square() - (alpha_s / alpha_t * sigma_t).square()).clamp(min=0).sqrt()


def levels_of(times: Tensor) -> Tensor:
    """[N + 1] ascending on the CPU, the clean end first, of the times [N + 1] that a sampler walks."""
    return times.flip(0).cpu()


def invert(step: Stepper, x0: Tensor, levels: Tensor, record: bool = False) -> Trajectory:
    """Walks all of x0 [B, ...] up the levels [N + 1]; with `record`, its states [B, N + 1, ...] too.

    Raises:
        ValueError: levels that do not ascend.
    """
    if not (levels.diff() > 0).all():
        raise ValueError(f"expected ascending times, from the picture to noise, got {levels.tolist()}")
    return sample(step, x0, moved(levels, x0.device), record=record)


def direction(kind: str, x_t: Tensor, x_s: Tensor, now: Coefficients, then: Coefficients) -> Tensor:
    """[B, ...]: the d whose step leads from x_t to x_s, and so from x_s back to x_t."""
    a, c = (per_sample(factor, x_t) for factor in line(kind, now, then))
    return (x_s - a * x_t) / c


def transition_target(kind: str, x_t: Tensor, x_s: Tensor, now: Coefficients, then: Coefficients) -> Tensor:
    """[B, ...]: what a network must say at (x_s, s) for the sampler to step from there to x_t.

    By way of x_t, whose alpha is above 0 also where that of x_s is not.
    """
    ends = endpoints(pivot(kind), direction(kind, x_t, x_s, now, then), x_t, *now)
    return target(kind, *ends, *then)


@dataclass(frozen=True)
class Walk:
    """Where each of B samples goes: `path` [B, S + 1] ascending times, of which the first `counts` [B] steps are its
    own (then its last time is repeated), and `t` [B], the time that its sample is declared to be at. On the CPU."""

    path: Tensor
    counts: Tensor
    t: Tensor


def walks(levels: Tensor, tau: Tensor, mode: str = "snap") -> Walk:
    """Walks from the clean end up to times tau [B].

    snap: to the nearest level, which then is t. exact: over the levels below tau, and with a last, shorter step onto
    tau. round_up: to the first level that is not below tau (the last one, if none is), while t stays tau. That is what
    InPO's released code does with the scheduler it is pinned to: its samples are noisier than declared, by half at
    small tau. It is there for comparison.

    Raises:
        ValueError: another mode.
    """
    if mode not in MODES:
        raise ValueError(f"expected a mode of {', '.join(MODES)}, got {mode!r}")
    tau = tau.to(levels.dtype)
    grid = levels[1:]
    below = (grid < tau[:, None]).sum(1)
    if mode == "exact":
        counts, last, t = below + 1, tau, tau
    else:
        nearest = (grid - tau[:, None]).abs().argmin(1)
        place = nearest if mode == "snap" else below.clamp(max=len(grid) - 1)
        counts, last = place + 1, grid[place]
        t = last if mode == "snap" else tau
    places = torch.arange(int(counts.max()) + 1).expand(len(tau), -1)
    common = levels[places.clamp(max=len(levels) - 1)]
    return Walk(torch.where(places < counts[:, None], common, last[:, None]), counts, t)


def invert_each(
    step_of: Callable[[Condition], Stepper],
    x0: Tensor,
    condition: Condition,
    walk: Walk,
    *,
    generators: Generators | None = None,
    waves: int = 0,
) -> Tensor:
    """[B, ...]: each of x0 [B, ...] at the end of its own walk.

    The k-th steps of all samples that have one are one call of the network: as many calls as the longest walk has
    steps, and no evaluation beside those that single walks take.

    Args:
        step_of: a stepper for some of the samples, from their conditions.
        generators: one per sample, where steps draw noise.
        waves: least number of calls. Above the longest walk a sample is evaluated for nothing; for processes that must
            call a network equally often.
    """
    order = walk.counts.argsort(descending=True, stable=True)
    on = moved(order, x0.device)
    x, condition = x0[on], {name: value[on] for name, value in condition.items()}
    path, counts = moved(walk.path[order], x0.device), walk.counts[order]
    drawn = None if generators is None else [generators[i] for i in order.tolist()]
    for k in range(max(int(counts[0]), waves)):
        count = int((counts > k).sum())
        some, column = max(count, 1), min(k, path.shape[1] - 2)
        step = step_of({name: value[:some] for name, value in condition.items()})
        law = step(x[:some], path[:some, column], path[:some, column + 1])
        noise = None if drawn is None else draw(x.shape[1:], drawn[:some], x)
        x = torch.cat([law.sample(noise)[:count], x[count:]])
    return x[moved(order.argsort(), x0.device)]
