"""Inversion-DPO: Li et al. 2025, Precise and Efficient Post-Training via DDIM inversion, arXiv 2507.11554.

    z_0 .. z_N   the reference's inversion of a picture; eps_k its direction, with which z_k became z_k+1 at level l_k+1

    transition   m_k = |eps_theta(z_k+1, l_k+1) - eps_k|^2, r_k the reference's     L = softplus((beta / 2) (d_w - d_l))
                 d   = weight_k (m_k - r_k)
    x0           the same with InPO's target (z_k+1 - alpha x0) / sigma instead of eps_k
    as_released  q_k = |eps_theta(z_k, l_k+1) - eps_ref(z_k, l_k+1)|^2, Q = mean_k weight_k q_k,
                 L   = softplus(-(beta / 2) (Q_w - Q_l))

eps_k is by construction the noise with which the sampler, standing at z_k+1, comes back to z_k. What it would predict
there is eps(z_k+1), so `transition` asks which of the two makes the picture's own path more likely, the policy or the
reference: the ratio of the two chains' likelihoods, term by term. weight_k = 1 / (2 alphas_cumprod) of level l_k+1, the
paper's, on the error of eps; on rectified flows dt_k N / sum dt on the error of the velocity.

Deviations from the released code (MIGHTYEZ/Inversion-DPO, train_ddim.py), each on purpose:
- its q is a distance to the reference itself: at the start the loss is ln 2 and its gradient exactly 0, so training
  moves by rounding alone; and with its sign the winner is what is driven away from the reference. `transition` is the
  default, `as_released` is kept for comparison and does not train in exact arithmetic;
- a few steps of each trajectory per visit (`sampled`), each a logit of its own; there all N in one, whose graphs are
  all kept;
- no guidance by default; there 2 in inversion and training (`guidance`);
- the first step starts at the picture, see `diffalign.inversion.departure`; there the first level is time 0, at which
  their step leads nowhere;
- the reference's trajectories are kept on disk (`cache`), and for that a picture is the mean of its posterior;
- their ranks do not exchange gradients, since the unwrapped network is called.

Levels at which nothing of the picture is left (alpha = 0, zero terminal SNR) are not trained: weight_k is infinite.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from diffalign.inversion import departure, inversion_stepper, invert, transition_target
from diffalign.losses import log_ratio, soft_ce, squared_error
from diffalign.methods.base import Batch, Loss, Need, Noised, Run, reference_of
from diffalign.methods.checks import check_choice, check_not_negative, check_positive, check_times
from diffalign.methods.inverted import grid, implied_target, levels_inside
from diffalign.methods.pairs import pair_loss, pair_metrics
from diffalign.process import moved, time_weight
from diffalign.sampling import Condition, Policy, concatenate, guided

OBJECTIVES = ("transition", "x0", "as_released")
NEGATIVE = "negative."  # how the empty prompt's condition is named in `aux`


@dataclass(frozen=True)
class InversionDPO:
    """DPO on the transitions of the reference's inversion.

    Args:
        beta: the leash. d is a small number here, the error of one step's linearization: look at `h_abs` in the log,
            which should come to about 1, and not at other methods' betas.
        objective: transition | x0 | as_released.
        steps: N, levels of the inversion.
        sampled: steps of each trajectory that a visit trains, without repetition.
        renoise: of x0, further evaluations per step that correct it (the fixed point in `diffalign.inversion`). With
            transition they are refused: after an exact inversion eps_k is what the reference says at z_k+1, and there
            is nothing to learn at the start.
        guidance: of reference and policy, in inversion and training; 1 is none.
        cache: keep trajectories. A picture takes 4 (N + 1) bytes per element of its latent: 10.7 MB with SDXL at 1024
            pixels and N = 40, 43 MB with SD3. Worth it from the second visit on; needs posterior: mean.
        time_low, time_high: the part of the noise axis to train on, 0 clean and 1 pure noise.

    Raises:
        ValueError: a value outside its range.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({Need.PAIRS, Need.REFERENCE, Need.FIXED_REFERENCE})
    view: ClassVar[str] = "pairs"

    beta: float = 2000.0
    objective: str = "transition"
    steps: int = 40
    sampled: int = 4
    renoise: int = 0
    guidance: float = 1.0
    cache: bool = True
    time_low: float = 0.0
    time_high: float = 1.0

    def __post_init__(self) -> None:
        check_positive(beta=self.beta)
        check_not_negative(guidance=self.guidance)
        check_choice("objective", self.objective, OBJECTIVES)
        check_times(self.time_low, self.time_high)
        if not 1 <= self.sampled <= self.steps:
            raise ValueError(f"method.sampled: expected 1 to method.steps, which is {self.steps}, got {self.sampled}")
        if self.renoise < 0 or (self.renoise and self.objective == "transition"):
            raise ValueError(f"method.renoise: expected 0 with objective transition, whose signal is what renoise "
                             f"takes away, and at least 0 with others, got {self.renoise}")  # fmt: skip

    @torch.no_grad()
    def prepare(self, run: Run, batch: Batch) -> Sequence[Noised]:
        levels = grid(run, self.steps)
        states = self._trajectories(run, batch, levels)
        inside = levels_inside(run, levels, self.time_low, self.time_high)
        if run.parametrization != "flow":  # whose weight is finite where nothing of the picture is left
            inside = inside[run.process.coefficients(inside)[0] > 0]
            if not len(inside):
                raise ValueError("method.time_low: between it and method.time_high lies no level at which anything of "
                                 "the picture is left; set it lower, or method.steps higher")  # fmt: skip
        first = int((levels[1:] < inside[0]).sum())
        order = torch.rand(len(batch.label), len(inside), generator=run.generator).argsort(1)
        chosen = first + order[:, : self.sampled]  # [B, k]: another choice for each pair
        made = [self._noised(run, batch, levels, states, chosen[:, k]) for k in range(chosen.shape[1])]
        return [_joined(made)] if self.objective == "as_released" else made

    def loss(self, run: Run, batch: Noised) -> Loss:
        policy = self._guided(run.policy, _negative(batch))
        m = squared_error(policy(batch.x_t, batch.t, batch.condition), batch.y)
        weight = batch.aux["weight"].T.reshape(-1).repeat(2)
        if self.objective == "as_released":
            return self._as_released(run, batch, weight * m)
        r = batch.reference_errors if batch.reference_errors is not None else self._reference_errors(run, batch)
        rho_w, rho_l = (weight * log_ratio(m, r, self.beta)).chunk(2)
        h = rho_w - rho_l
        return pair_loss(run, batch, soft_ce(h, batch.label), h, m, r)

    def _as_released(self, run: Run, batch: Noised, q: Tensor) -> Loss:
        pairs = len(batch.label)
        total = q.view(2, -1, pairs).mean(1).flatten()
        q_w, q_l = total.chunk(2)
        h = 0.5 * self.beta * (q_w - q_l)
        time = run.process.fraction(batch.t).view(2, -1, pairs).mean((0, 1))
        return Loss(F.softplus(-h), time, pair_metrics(h, total, torch.zeros_like(total)))

    @torch.no_grad()
    def _reference_errors(self, run: Run, batch: Noised) -> Tensor:
        reference = self._guided(reference_of(run), _negative(batch))
        return squared_error(reference(batch.x_t, batch.t, batch.condition), batch.y)

    def _trajectories(self, run: Run, batch: Batch, levels: Tensor) -> Tensor:
        """[2B, N + 1, ...] fp32: the states of all members, winners first."""
        x0, condition = torch.cat([m.float() for m in batch.members]), concatenate(*batch.conditions)
        negative = {} if self.guidance == 1 else concatenate(*[batch.negative] * len(batch.members))

        def compute() -> Tensor:
            step = inversion_stepper(self._guided(reference_of(run), negative), run.process, run.parametrization,
                                     condition, refine=self.renoise, clean=True)  # fmt: skip
            states = invert(step, x0, levels, record=True).states
            assert states is not None
            return states

        if not self.cache:
            return compute()
        what = f"inversion {run.parametrization} {levels.tolist()} renoise {self.renoise} guidance {self.guidance}"
        rows = {"x0": x0, **condition, **{NEGATIVE + name: value for name, value in negative.items()}}
        return run.remember(what, rows, compute)

    def _noised(self, run: Run, batch: Batch, levels: Tensor, states: Tensor, k: Tensor) -> Noised:
        """All members at z_k+1, or as_released at z_k, of step k [B], the same for the members of a pair."""
        members, device = len(batch.members), states.device
        at = moved(k, device).repeat(members)
        row = torch.arange(len(at), device=device)
        before, after, x0 = states[row, at], states[row, at + 1], states[:, 0]
        axis = moved(levels, device)
        t, s = axis[at], axis[at + 1]
        condition = concatenate(*batch.conditions)
        aux = {"weight": self._weight(run, levels, k).to(device)[:, None]}
        if self.guidance != 1:
            aux |= {NEGATIVE + name: value for name, value in batch.negative.items()}
        if self.objective == "as_released":
            negative = _tiled(batch.negative, members) if self.guidance != 1 else {}
            y = self._guided(reference_of(run), negative)(before, s, condition)
            return Noised(before, y, s, condition, batch.label, aux=aux)
        if self.objective == "x0":
            y = implied_target(run, x0, after, s)
        else:
            now, then = departure(run.process, t, clean=True), run.process.coefficients(s)
            y = transition_target(run.parametrization, before, after, now, then)
        return Noised(after, y, s, condition, batch.label, aux=aux)

    def _weight(self, run: Run, levels: Tensor, k: Tensor) -> Tensor:
        """[B] on the error of the network's own target."""
        if run.parametrization == "flow":
            return (levels.diff() * (len(levels) - 1) / (levels[-1] - levels[0]))[k]
        alpha, sigma = run.process.coefficients(levels[k + 1])
        return time_weight("eps", run.parametrization, alpha, sigma) / (2 * alpha.square())

    def _guided(self, policy: Policy, negative: Condition) -> Policy:
        if self.guidance != 1 and not negative:
            raise ValueError("method.guidance: there is no empty prompt in this batch to guide away from; set it to 1")
        return guided(policy, negative, self.guidance)


def _negative(batch: Noised) -> Condition:
    """The empty prompt's condition for each of the samples [N, ...]."""
    found = {name[len(NEGATIVE):]: value for name, value in batch.aux.items() if name.startswith(NEGATIVE)}  # fmt: skip
    return _tiled(found, len(batch.x_t) // len(batch.label))


def _tiled(condition: Condition, times: int) -> Condition:
    return {name: value.repeat(times, *[1] * (value.ndim - 1)) for name, value in condition.items()}


def _joined(parts: Sequence[Noised]) -> Noised:
    """Steps of the same pairs as one microbatch [2 k B]: all steps of the winners, then all of the losers."""

    def stacked(values: Sequence[Tensor]) -> Tensor:
        halves = [value.chunk(2) for value in values]
        return torch.cat([half[member] for member in range(2) for half in halves])

    first = parts[0]
    return Noised(
        stacked([p.x_t for p in parts]),
        stacked([p.y for p in parts]),
        stacked([p.t for p in parts]),
        {name: stacked([p.condition[name] for p in parts]) for name in first.condition},
        first.label,
        aux=first.aux | {"weight": torch.cat([p.aux["weight"] for p in parts], 1)},
    )
