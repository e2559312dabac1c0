"""Losses of ranked lists: K pictures of one prompt at once. fp32 in, [B] out, no reduction."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def share_of_wins(scores: Tensor) -> Tensor:
    """phi [B, K] in [0, 1] of scores [B, K]: the share of the other pictures that each one beats (RankDPO, one reward).

    Ties beat nobody, so equal scores have equal phi.
    """
    wins = (scores[:, :, None] > scores[:, None, :]).float().sum(2)
    return wins / max(scores.shape[1] - 1, 1)


def calibrated(scores: Tensor) -> Tensor:
    """R_ca [B, K] in (0, 1): mean over the other pictures j of sigmoid(R_i - R_j) (CaPO, arXiv 2502.02588)."""
    against = torch.sigmoid(scores[:, :, None] - scores[:, None, :])
    own = torch.diagonal(against, dim1=1, dim2=2)
    return (against.sum(2) - own) / max(scores.shape[1] - 1, 1)


def rank_weights(phi: Tensor, order_by: Tensor) -> Tensor:
    """W [B, K, K] of RankDPO: |2^phi_i - 2^phi_j| |1 / log(1 + rank_i) - 1 / log(1 + rank_j)|, natural logarithm.

    Args:
        phi: [B, K], how good each picture is.
        order_by: [B, K], ranks are its descending order, from 1: phi itself, or what the model believes.
    """
    order = order_by.argsort(dim=1, descending=True, stable=True)
    places = torch.arange(1, phi.shape[1] + 1, device=phi.device).expand_as(order)
    rank = torch.empty_like(order).scatter_(1, order, places)
    gain, discount = torch.exp2(phi), 1 / torch.log(1 + rank.to(phi.dtype))
    return (gain[:, :, None] - gain[:, None, :]).abs() * (discount[:, :, None] - discount[:, None, :]).abs()


def rank_preference(rho: Tensor, phi: Tensor, weights: Tensor) -> Tensor:
    """[B]: sum over pairs with phi_i > phi_j of W_ij softplus(-(rho_i - rho_j)): RankDPO, arXiv 2410.18013.

    rho, phi: [B, K]; weights: [B, K, K]. Pictures with equal phi are no pair.
    """
    margins = rho[:, :, None] - rho[:, None, :]
    better = (phi[:, :, None] > phi[:, None, :]).to(rho.dtype)
    return (better * weights * F.softplus(-margins)).sum((1, 2))


def share_ordered(rho: Tensor, phi: Tensor) -> Tensor:
    """[B] in [0, 1]: of the pairs with different phi, the share that rho orders the same way; equal rho count half."""
    better = (phi[:, :, None] > phi[:, None, :]).to(rho.dtype)
    margins = rho[:, :, None] - rho[:, None, :]
    right = (margins > 0).to(rho.dtype) + 0.5 * (margins == 0).to(rho.dtype)
    return (better * right).sum((1, 2)) / better.sum((1, 2)).clamp(min=1)
