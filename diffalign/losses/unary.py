"""Losses of single pictures, and of pairs without a reference. fp32 in, [B] out, no reduction."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Utility = Callable[[Tensor], Tensor]  # u [B] -> loss [B], falling in u


def kahneman_tversky(u: Tensor) -> Tensor:
    """1 - sigmoid(u): a gain flattens out, and so does a loss."""
    return 1 - torch.sigmoid(u)


def loss_averse(u: Tensor) -> Tensor:
    """-log sigmoid(u): concave utility, what is badly wrong pulls at full strength."""
    return F.softplus(-u)


def risk_seeking(u: Tensor) -> Tensor:
    """log sigmoid(-u): convex utility, what is right already pulls most; unbounded below."""
    return -F.softplus(u)


UTILITIES: dict[str, Utility] = {"kto": kahneman_tversky, "loss_averse": loss_averse, "risk_seeking": risk_seeking}


def liked_or_not(gain: Tensor, baseline: Tensor, label: Tensor, beta: float) -> Tensor:
    """u = y beta (g - z), y = 1 where label is 1 and -1 where it is 0: Diffusion-KTO, arXiv 2404.04465.

    gain: [B] r - m; baseline: z, 0 or above. There is no 1/2 here as in `log_ratio`: beta 1000 is 2000 of a pair.
    """
    return (2 * label - 1) * beta * (gain - baseline)


def falling(error: Tensor, scale: float) -> Tensor:
    """phi(m) = s m / (exp(s m) - 1), by expm1, and 1 at m = 0, where the plain form is 0 / 0 (MaPO)."""
    x = scale * error
    small = x.abs() < 1e-6
    safe = torch.where(small, torch.ones_like(x), x)
    return torch.where(small, 1 - x / 2, safe / torch.expm1(safe))


def margin_aware(m_w: Tensor, m_l: Tensor, scale: float, steepness: float) -> Tensor:
    """ell = T (phi(m_w) - phi(m_l)): MaPO's logit, arXiv 2406.06424."""
    return steepness * (falling(m_w, scale) - falling(m_l, scale))


def gated_residual(residual: Tensor, repulsion: Tensor, gate: Tensor) -> Tensor:
    """mean over elements of (R - g P)^2: DSPO. residual, repulsion: [B, ...]; gate: [B]. fp32."""
    gate = gate.reshape(-1, *[1] * (residual.ndim - 1))
    return (residual.float() - gate * repulsion.float()).square().flatten(1).mean(1)
