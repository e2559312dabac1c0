"""f-DPO: the log-ratio seen through the divergence that holds the policy to its reference (arXiv 2309.16240).

A link of h = psi(rho_w) - psi(rho_l) in place of rho_w - rho_l; psi is f'(u) of the divergence at u = exp(rho), without
constants, which cancel. The forms with exp are clamped at |rho| = `CLAMP`, beyond which they have no gradient: a beta
in the thousands makes rho of the order of 1, and a sample that is far beyond would else be all of the batch.
"""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

CLAMP = 10.0

Divergence = Callable[[Tensor, float], Tensor]  # (rho [B], alpha) -> psi [B]


def reverse_kl(rho: Tensor, alpha: float = 0.0) -> Tensor:
    """psi = rho: plain DPO; not clamped."""
    return rho


def forward_kl(rho: Tensor, alpha: float = 0.0) -> Tensor:
    """psi = -exp(-rho)."""
    return -(-_clamped(rho)).exp()


def js(rho: Tensor, alpha: float = 0.0) -> Tensor:
    """psi = log sigmoid(rho): Jensen-Shannon, bounded gradients."""
    return F.logsigmoid(_clamped(rho))


def alpha_divergence(rho: Tensor, alpha: float) -> Tensor:
    """psi = exp((alpha - 1) rho) / (alpha - 1): alpha 0 is forward_kl, and the limit alpha -> 1 is reverse_kl."""
    rho = _clamped(rho)
    return rho if alpha == 1 else ((alpha - 1) * rho).exp() / (alpha - 1)


def _clamped(rho: Tensor) -> Tensor:
    return rho.clamp(-CLAMP, CLAMP)


DIVERGENCES: dict[str, Divergence] = {
    "reverse_kl": reverse_kl,
    "forward_kl": forward_kl,
    "js": js,
    "alpha": alpha_divergence,
}
