"""Preference losses as pure functions of per-sample numbers: fp32 in, [B] out, no reduction.

Symbols, for a pair of winner w and loser l at one (t, eps):
    m      mean squared error of the policy's prediction          r    the same for the reference
    d      m - r, the excess error; negative when the policy fits the sample better than the reference does
    rho    -(beta / 2) d, the log-ratio of the sample              h    rho_w - rho_l, the logit of the pair

beta follows Diffusion-DPO's code (arXiv 2311.12908, eq. 14): T, the weight and 1/D are inside it and the error is a
mean over elements, so a beta in the thousands is usual and a larger one keeps the policy closer to the reference.

Here are the numbers that all share and the links of pairs; `divergences`, `listwise`, `unary` and `parts` are beside.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Link = Callable[[Tensor, Tensor, float], Tensor]  # (rho_w [B], rho_l [B], label smoothing) -> loss [B]


def squared_error(prediction: Tensor, target: Tensor) -> Tensor:
    """[B]: mean over all elements of (prediction - target)^2, in fp32."""
    return (prediction.float() - target.float()).square().flatten(1).mean(1)


def log_ratio(error: Tensor, reference_error: Tensor, beta: float) -> Tensor:
    """rho = -(beta / 2) (m - r)."""
    return -0.5 * beta * (error - reference_error)


def winner_preserving_scale(residual_w: Tensor, residual_l: Tensor, mu: float) -> Tensor:
    """[B] in [0, 1], detached: what the loser's gradient is multiplied with (Diffusion-SDPO, arXiv 2511.03317).

    With g = 2 (prediction - target) / D of winner and loser: min(1, (1 - mu) |g_w|^2 / <g_w, g_l>) where <g_w, g_l> is
    above 0, else 1: to first order in the outputs a step then never raises the winner's error. Per sample; the released
    code has one number for the batch.
    """
    g_w, g_l = (residual.detach().float().flatten(1) for residual in (residual_w, residual_l))
    along = (g_w * g_l).sum(1)
    bound = (1 - mu) * g_w.square().sum(1) / torch.where(along > 0, along, torch.ones_like(along))
    return torch.where(along > 0, bound.clamp(max=1.0), torch.ones_like(along))


def scaled_gradient(value: Tensor, scale: Tensor) -> Tensor:
    """The same value with `scale` times its gradient."""
    return value.detach() + scale * (value - value.detach())


def sigmoid(rho_w: Tensor, rho_l: Tensor, smoothing: float = 0.0) -> Tensor:
    """(1 - e) softplus(-h) + e softplus(h): Diffusion-DPO, with label smoothing e = cDPO."""
    h = rho_w - rho_l
    return (1 - smoothing) * F.softplus(-h) + smoothing * F.softplus(h)


def robust(rho_w: Tensor, rho_l: Tensor, smoothing: float) -> Tensor:
    """[(1 - e) softplus(-h) - e softplus(h)] / (1 - 2 e): unbiased under labels flipped with probability e < 1/2."""
    h = rho_w - rho_l
    return ((1 - smoothing) * F.softplus(-h) - smoothing * F.softplus(h)) / (1 - 2 * smoothing)


def hinge(rho_w: Tensor, rho_l: Tensor, smoothing: float = 0.0) -> Tensor:
    """max(0, 1 - h)."""
    return F.relu(1 - (rho_w - rho_l))


def ipo(rho_w: Tensor, rho_l: Tensor, smoothing: float = 0.0) -> Tensor:
    """(h - 1/2)^2: IPO on the scaled logit, with the same optimum as the raw form at a size that fp32 can carry."""
    return (rho_w - rho_l - 0.5).square()


def exo(rho_w: Tensor, rho_l: Tensor, smoothing: float) -> Tensor:
    """KL(Bernoulli(sigmoid(h)) || Bernoulli(1 - e)), e in (0, 1): EXO, DMPO. Least at h = logit(1 - e), so bounded."""
    h = rho_w - rho_l
    target = torch.tensor(1 - smoothing, dtype=h.dtype, device=h.device)
    log_p, log_q = F.logsigmoid(h), F.logsigmoid(-h)
    return log_p.exp() * (log_p - target.log()) + log_q.exp() * (log_q - (1 - target).log())


def nca(rho_w: Tensor, rho_l: Tensor, smoothing: float = 0.0) -> Tensor:
    """softplus(-rho_w) + [softplus(rho_w) + softplus(rho_l)] / 2: keeps the winner's own log-ratio from falling."""
    return F.softplus(-rho_w) + 0.5 * (F.softplus(rho_w) + F.softplus(rho_l))


def soft_ce(h: Tensor, p: Tensor) -> Tensor:
    """p softplus(-h) + (1 - p) softplus(h): the cross entropy to a probability p [B] that the winner is the better."""
    return p * F.softplus(-h) + (1 - p) * F.softplus(h)


def smpo(h: Tensor, p: Tensor, gamma: float) -> Tensor:
    """softplus(-gamma (2 p - 1) h): SmPO (arXiv 2506.02698) as released, a pair's logit scaled by how clear it is."""
    return F.softplus(-gamma * (2 * p - 1) * h)


def win_probability(scores: Tensor, score_range: float) -> Tensor:
    """[B] in [0, 1]: sigmoid((s_w - s_l) / range) of scores [B, K], the winner's first and the loser's last."""
    return torch.sigmoid((scores[:, 0] - scores[:, -1]) / score_range)


def flip_sign(d_w: Tensor, flip: str) -> Tensor:
    """s [B] of SePPO's anchor-based flip (arXiv 2410.05255), from the winner's excess error d_w [B]; detached.

    sign: +1 where the policy fits the winner no worse than the reference does, else -1 (the opponent is imitated too);
    indicator: 0 in place of -1 (it is ignored); none: always +1.
    """
    better = (d_w.detach() <= 0).to(d_w.dtype)
    return {"sign": 2 * better - 1, "indicator": better, "none": torch.ones_like(better)}[flip]


FLIPS = ("sign", "indicator", "none")


def ranking_hinge(d_expert: Tensor, d_policy: Tensor, margin: float) -> Tensor:
    """max(0, d_E - d_P + margin) of two excess errors [B]: Diffusion-DRO, arXiv 2510.18353."""
    return F.relu(d_expert - d_policy + margin)


LINKS: dict[str, Link] = {
    "sigmoid": sigmoid,
    "robust": robust,
    "hinge": hinge,
    "ipo": ipo,
    "exo": exo,
    "nca": nca,
}
NEEDS_SMOOTHING = frozenset({"exo"})  # no finite value without it
