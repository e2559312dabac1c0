"""DNO: Tang et al. 2024, Inference-Time Alignment of Diffusion Models with Direct Noise Optimization, arXiv 2405.18881.

All noise of a random walk is optimized, the start and that of every step, by gradients through the whole walk:

    min over z of  -R(picture of z) + w P(z)

P is large where z is no longer a likely draw: of z as m rows of k = 4 numbers in random order, M1 the norm of the rows'
mean and M2 the spectral norm of their covariance minus 1,

    P = -min(-m M1^2 / 2k, -log 2) - min(-m max(sqrt(1 + M2) - 1 - sqrt(k / m), 0)^2 / 2, -log 2)

as a mean over permutations; it hardly has a gradient while z looks random.

Choices of our own: a black box's gradient is estimated at the walk's end, in latents, of which there are fewer than
pixels (`Objective.estimated_slope`); w is not known, and 1 here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffalign.methods.checks import check_choice, check_not_negative, check_positive
from diffalign.noise.objective import Objective
from diffalign.noise.refusals import refuse_black_boxes
from diffalign.noise.reno import clipped, usable
from diffalign.noise.seen import Seen

WIDTH = 4  # k


@dataclass(frozen=True)
class DNO:
    """Gradient ascent on all noise of a random walk.

    Args:
        steps: iterations; the first looks at the plain picture, and the last does not take a step any more.
        lr: of AdamW, whose other settings are torch's.
        grad_clip: norm that a picture's gradient is cut to.
        regularization: w.
        permutations: orders in which P is taken, in every iteration.
        eta: of the walk, above 0; 1 is DDPM's noise.
        gradient: exact | estimated, from `draws` more looks at every picture, each moved by `size` standard deviations.
        draws, size: of estimated.

    Raises:
        ValueError: a value outside its range.
    """

    steps: int = 50
    lr: float = 0.01
    grad_clip: float = 1.0
    regularization: float = 1.0
    permutations: int = 100
    eta: float = 1.0
    gradient: str = "exact"
    draws: int = 16
    size: float = 0.01

    def __post_init__(self) -> None:
        check_positive("optimize_noise", steps=self.steps, lr=self.lr, grad_clip=self.grad_clip, eta=self.eta,
                       permutations=self.permutations, draws=self.draws, size=self.size)  # fmt: skip
        check_not_negative("optimize_noise", regularization=self.regularization)
        check_choice("gradient", self.gradient, ("exact", "estimated"), "optimize_noise")

    def check(self, objective: Objective) -> None:
        """Raises ValueError for rewards without a gradient, if that is to be exact."""
        if self.gradient == "exact":
            refuse_black_boxes("dno", objective.rewards)

    def search(self, objective: Objective, noise: Tensor) -> Iterator[Seen]:
        z = torch.cat([noise[:, None], objective.fresh(objective.steps)], 1).float()
        optimizer = torch.optim.AdamW([z], self.lr)
        for _ in range(self.steps - 1):
            if self.gradient == "exact":
                seen, slope = objective.slope(z, eta=self.eta)
            else:
                seen, slope = objective.estimated_slope(z, self.eta, self.draws, self.size)
            yield seen
            unlikely = self.regularization * self._unlikely_slope(z, objective.generators)
            z.grad = clipped(unlikely - usable(slope), self.grad_clip)
            optimizer.step()
        yield objective.look(z.clone(), eta=self.eta)

    def _unlikely_slope(self, z: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        if not self.regularization:
            return torch.zeros_like(z)
        with torch.enable_grad():
            leaf = z.detach().requires_grad_()
            orders = torch.stack([orders_of(z[0].numel(), self.permutations, g) for g in generators])
            (slope,) = torch.autograd.grad(improbability(leaf, orders.to(z.device)).sum(), leaf)
        return slope


def orders_of(count: int, permutations: int, generator: torch.Generator) -> Tensor:
    """[permutations, count] random orders."""
    return torch.stack([torch.randperm(count, generator=generator) for _ in range(permutations)])


def improbability(z: Tensor, orders: Tensor) -> Tensor:
    """[B]: P of z [B, ...] as the mean over orders [B, permutations, D], D the elements of a row.

    What is left when D is not a multiple of 4 is another few numbers in every order.
    """
    flat = z.flatten(1)
    m = flat.shape[1] // WIDTH
    rows = flat[:, None].expand(-1, orders.shape[1], -1).gather(2, orders)[..., : m * WIDTH].unflatten(-1, (m, WIDTH))
    off_mean = rows.mean(2).square().sum(-1)
    off_covariance = rows.mT @ rows / m - torch.eye(WIDTH, device=z.device)
    spread = torch.linalg.eigvalsh(off_covariance).abs().amax(-1)
    beyond = ((1 + spread).sqrt() - 1 - math.sqrt(WIDTH / m)).clamp(min=0)
    bounds = (-m * off_mean / (2 * WIDTH), -m * beyond.square() / 2)
    return -torch.stack([bound.clamp(max=-math.log(2)) for bound in bounds]).sum(0).mean(1)
