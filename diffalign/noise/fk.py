"""FK steering: Singhal et al. 2025, A General Framework for Inference-time Scaling and Steering of Diffusion Models,
arXiv 2501.06848.

Particles of a prompt walk together by a random sampler. Every few steps the picture that each is heading for is scored,
and particles are drawn again with the weights

    diff  exp(lam (r - r before))     max  exp(lam max(r, the path's largest))     add  exp(lam sum of the path's)

The best particle of the end is the picture. Weights are taken in the log, and drawn systematically, which has less
variance than multinomial draws. The last correction of max and add, which makes their target exp(lam r), is left out:
it would change the odds of the end's particles, and the best is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from diffalign.methods.checks import check_choice, check_positive
from diffalign.noise.objective import Objective
from diffalign.noise.seen import Seen
from diffalign.sampling import predicted_endpoints
from diffalign.transition import ddim


@dataclass(frozen=True)
class FKSteering:
    """Any rewards will do; the model must walk several steps.

    Args:
        particles: k, of each prompt.
        strength: lam, per unit of the rewards' sum.
        potential: diff | max | add.
        every: steps from one scoring to the next.
        first, last: scored between these shares of the walk; before, nothing is to be seen yet, and after, particles
            that are drawn twice hardly part again.
        eta: of the random steps, DDPM's noise being 1.
        adaptive: draw again only where the effective number of particles is below k / 2; until then weights multiply.

    Raises:
        ValueError: a value outside its range.
    """

    particles: int = 4
    strength: float = 10.0
    potential: str = "diff"
    every: int = 4
    first: float = 0.2
    last: float = 0.8
    eta: float = 1.0
    adaptive: bool = False

    def __post_init__(self) -> None:
        check_positive("optimize_noise", particles=self.particles, every=self.every, eta=self.eta)
        check_choice("potential", self.potential, POTENTIALS, "optimize_noise")
        if not 0 <= self.first <= self.last <= 1:
            raise ValueError(f"optimize_noise.first, last: expected 0 <= first <= last <= 1, got {self.first}, "
                             f"{self.last}")  # fmt: skip

    def check(self, objective: Objective) -> None:
        """Raises ValueError for a walk of one step."""
        if objective.steps < 2:
            raise ValueError("method 'fk' steers a walk on its way, and this one has a single step: set "
                             "sampling_steps, such as 20")  # fmt: skip

    def search(self, objective: Objective, noise: Tensor) -> Iterator[Seen]:
        prompts, k = len(noise), self.particles
        owners = [prompt for prompt in range(prompts) for _ in range(k)]
        chain = torch.cat([noise[:, None], objective.fresh(objective.steps)], 1)
        others = [objective.fresh(objective.steps + 1) for _ in range(k - 1)]
        chains = torch.stack([chain, *others], 1).flatten(0, 1)  # [B k, N + 1, ...]
        x, said = chains[:, 0], torch.zeros(0, prompts, k, device=noise.device)
        weights = torch.zeros(prompts, k, device=noise.device)  # logarithms, since the last draw
        for number in range(objective.steps):
            x, x0 = self._stepped(objective, x, chains[:, number + 1], number, owners)
            if self._scored(number, objective.steps):
                ahead = objective.decoded(chains, x0, owners, ends=False)
                yield from of_each(ahead, k)
                said = torch.cat([said, worst_for_missing(ahead.scores.total.view(1, prompts, k))])
                weights = weights + self.strength * POTENTIALS[self.potential](said)
                kept, weights = self._drawn(weights, objective.generators)
                said = said.gather(2, kept.expand_as(said))
                rows = (kept + k * torch.arange(prompts, device=kept.device)[:, None]).flatten()
                # a particle's past is its ancestor's, its future stays its own
                past = torch.arange(objective.steps + 1, device=rows.device) <= number + 1
                chains = torch.where(past.view(1, -1, *[1] * (x.ndim - 1)), chains[rows], chains)
                x = x[rows]
        yield from of_each(objective.decoded(chains, x, owners, ends=True), k)

    def _stepped(
        self, objective: Objective, x: Tensor, noise: Tensor, number: int, owners: list[int]
    ) -> tuple[Tensor, Tensor]:
        """(x after this step, the picture that it was heading for), each [B k, ...]."""
        now, then = objective.times[number], objective.times[number + 1]
        moved, seen = [], []
        with torch.no_grad():
            for rows, some in objective.parts(len(x), owners):
                t, s = now.expand(len(some)), then.expand(len(some))
                ends = predicted_endpoints(objective.guided(some), objective.process, objective.kind, x[rows], t,
                                           objective.of(some, objective.condition))  # fmt: skip
                coefficients = objective.process.coefficients
                law = ddim(ends, coefficients(t), coefficients(s), self.eta)
                moved.append(law.sample(noise[rows]))
                seen.append(ends.x0)
        return torch.cat(moved), torch.cat(seen)

    def _scored(self, number: int, steps: int) -> bool:
        inside = self.first <= number / steps <= self.last
        return inside and number % self.every == 0 and number < steps - 1

    def _drawn(self, weights: Tensor, generators: tuple[torch.Generator, ...]) -> tuple[Tensor, Tensor]:
        """(which particle of its prompt each is from now on, the logarithms of their weights from now on), [B, k]."""
        shares, k = torch.softmax(weights, 1), weights.shape[1]
        starts = torch.stack([torch.rand(1, generator=generator) for generator in generators]).to(weights.device)
        kept, even = systematic(shares, starts), torch.zeros_like(weights)
        if not self.adaptive:
            return kept, even
        enough = 1 / shares.square().sum(1, keepdim=True) >= k / 2
        return torch.where(enough, torch.arange(k, device=kept.device), kept), torch.where(enough, weights, even)


# scores at every scoring so far [S, B, k], each particle with its ancestors' -> log-weights over lam [B, k]
POTENTIALS: dict[str, Callable[[Tensor], Tensor]] = {
    "diff": lambda said: said[-1] - said[-2] if len(said) > 1 else said[-1],
    "max": lambda said: said.amax(0),
    "add": lambda said: said.sum(0),
}


def systematic(weights: Tensor, starts: Tensor) -> Tensor:
    """[B, k] which of k each becomes, by weights [B, k] that sum to 1 and one draw [B, 1] in [0, 1).

    One of weight w comes floor(k w) or ceil(k w) times; with equal weights all stay what they are.
    """
    k = weights.shape[1]
    places = (torch.arange(k, device=weights.device) + starts) / k
    return torch.searchsorted(weights.cumsum(1), places, right=True).clamp(max=k - 1)


def worst_for_missing(scores: Tensor) -> Tensor:
    """[..., k] with the prompt's lowest score in the place of one that is missing, 0 where all are."""
    known = scores.isfinite()
    lowest = torch.where(known, scores, torch.full_like(scores, torch.inf)).amin(-1, keepdim=True)
    return torch.where(known, scores, torch.where(lowest.isfinite(), lowest, torch.zeros_like(lowest)))


def of_each(seen: Seen, k: int) -> Iterator[Seen]:
    """k looks at B prompts, of rows that lie prompt by prompt."""
    for particle in range(k):
        yield seen.rows(torch.arange(particle, len(seen.noise), k, device=seen.noise.device))
