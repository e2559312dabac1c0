"""What the losses of pairs share: the log-ratios of winner and loser, and what is logged of them."""

from __future__ import annotations

import torch
from torch import Tensor

from diffalign.losses import log_ratio
from diffalign.methods.base import Loss, Noised, Run, errors, weight_at

SATURATED = 5.0  # |h| beyond which a pair gives almost no gradient


def pair_errors(run: Run, batch: Noised, beta: float, timestep_weight: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(rho_w [B], rho_l [B], m [2B], r [2B]): see `diffalign.losses`; the timestep's weight is inside rho."""
    m, r = errors(run, batch)
    return *log_ratios(run, batch, m, r, beta, timestep_weight), m, r


def log_ratios(
    run: Run, batch: Noised, m: Tensor, r: Tensor, beta: float, timestep_weight: str
) -> tuple[Tensor, Tensor]:
    """(rho_w, rho_l), each [B], of errors m and r [2B], winners first."""
    rho_w, rho_l = (weight_at(run, batch.t, timestep_weight) * log_ratio(m, r, beta)).chunk(2)
    return rho_w, rho_l


def pair_loss(run: Run, batch: Noised, value: Tensor, h: Tensor, m: Tensor, r: Tensor, **more: Tensor) -> Loss:
    """The loss `value` [B] of pairs with logit h [B], logged as `pair_metrics` says, and with whatever is added."""
    return Loss(value, run.process.fraction(batch.t).chunk(2)[0], pair_metrics(h, m, r) | more)


def pair_metrics(h: Tensor, m: Tensor, r: Tensor) -> dict[str, Tensor]:
    """What every pair method logs, per pair and detached: the logit, ties counted half in accuracy, both errors.

    `d_w` above 0 while `accuracy` rises is likelihood displacement: the winner gets less likely, the loser even less.
    """
    with torch.no_grad():
        (m_w, m_l), (r_w, r_l) = m.detach().chunk(2), r.chunk(2)
        h = h.detach()
        return {
            "h": h,
            "accuracy": (h > 0).float() + 0.5 * (h == 0).float(),
            "saturated": (h.abs() > SATURATED).float(),
            "d_w": m_w - r_w,
            "d_l": m_l - r_l,
            "m_w": m_w,
            "m_l": m_l,
            "r_w": r_w,
            "r_l": r_l,
        }
