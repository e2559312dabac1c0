"""What noise is worth: the picture that a frozen model makes of it, what rewards say of that, and the gradient.

    z -> walk of the sampler -> latents -> VAE -> pixels in [0, 1] -> sum of weight times reward

Prompts are encoded once, by the model here and by the rewards themselves (`diffalign.rewards.texts`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint as recompute

from diffalign.noise.seen import Seen, stacked
from diffalign.process import NoiseProcess, per_sample
from diffalign.rewards.base import Weighted
from diffalign.rewards.prepared import shared
from diffalign.sampling import Condition, Policy, Stepper, carries, ddim_stepper, draw, guided, sample
from diffalign.scores import Scores, scores_of


@dataclass(frozen=True)
class Memory:
    """What a gradient keeps, and what it computes a second time instead.

    Args:
        network: steps of the network are recomputed in the backward pass.
        vae: so is the decoder.
        apart: rewards are differentiated one after the other, so that only one of their graphs is there at a time.
        at_once: pictures at a time, where the caller does not say.
    """

    network: bool
    vae: bool
    apart: bool
    at_once: int


MEMORY = {
    "fast": Memory(network=False, vae=False, apart=False, at_once=8),
    "balanced": Memory(network=False, vae=True, apart=False, at_once=8),
    "low": Memory(network=True, vae=True, apart=True, at_once=1),
}


class Counted:
    """A policy that counts the rows that it is asked for."""

    def __init__(self, policy: Policy) -> None:
        self.policy, self.rows = policy, 0

    def __call__(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        self.rows += len(x_t)
        return self.policy(x_t, t, condition)


class Search(Protocol):
    """A method: how it goes about it. Its fields are its keywords."""

    def check(self, objective: Objective) -> None:
        """Raises ValueError if it does not go with this model or these rewards."""

    def search(self, objective: Objective, noise: Tensor) -> Iterator[Seen]:
        """What it looks at, B rows at a time, from the noise [B, C, h, w] of the plain pictures on."""


@dataclass(frozen=True)
class Objective:
    """Of B prompts.

    Attributes:
        prompts: B of them.
        rewards: their weighted sum is what is to be large.
        policy, process, kind: the network, and what it predicts.
        condition, negative: [B, ...] of the prompts and of the empty one.
        guidance: 1 is none.
        times: [N + 1] of the walk, from noise to picture.
        shape: of one latent.
        decode: latents -> pixels around [0, 1].
        generators: one per prompt, all noise of a prompt is drawn from its own.
        memory, at_once: how a gradient is computed, and how many pictures at a time.
    """

    prompts: tuple[str, ...]
    rewards: Weighted
    policy: Counted
    process: NoiseProcess
    kind: str
    condition: Condition
    negative: Condition
    guidance: float
    times: Tensor
    shape: tuple[int, ...]
    decode: Callable[[Tensor], Tensor]
    generators: tuple[torch.Generator, ...]
    memory: Memory
    at_once: int

    @property
    def steps(self) -> int:
        """Of the walk."""
        return len(self.times) - 1

    @property
    def together(self) -> int:
        """How many pictures of each prompt fit into one call."""
        return max(1, self.at_once // len(self.prompts))

    def fresh(self, *shape: int) -> Tensor:
        """Standard normal [B, *shape, C, h, w], each row from its prompt's own generator."""
        return draw((*shape, *self.shape), self.generators).to(self.times.device)

    def look(self, noise: Tensor, owners: Sequence[int] | None = None, eta: float = 0.0) -> Seen:
        """The pictures of noise [R, ...], without gradient.

        Args:
            owners: number of the prompt of each row; without it there is one row per prompt.
            eta: of the walk's steps, whose noise then is in `noise` [R, N + 1, ...].
        """
        with torch.no_grad():
            parts = [
                self._seen(noise[rows], self.walk(noise[rows], some, eta=eta), some)
                for rows, some in self.parts(len(noise), owners)
            ]
        return stacked(parts)

    def slope(self, noise: Tensor, last: int | None = None, eta: float = 0.0) -> tuple[Seen, Tensor]:
        """(`look`, d total / d noise [B, ...] in fp32): each row's gradient is of its own picture.

        Args:
            last: only so many last steps are differentiated; the network's answers before them count as constants, and
                what is left is the sampler's own multiple of the noise. None differentiates all.
        """
        seen, slopes = [], []
        for rows, some in self.parts(len(noise), None):
            with torch.enable_grad():
                leaf = noise[rows].detach().float().requires_grad_()
                latents = self.walk(leaf, some, last or self.steps, eta)
                decoded = recompute(self.decode, latents, use_reentrant=False) if self.memory.vae else None
                pixels = (self.decode(latents) if decoded is None else decoded).clamp(0, 1)
                scores, onto = self._pixel_slope(pixels, some)
                (slope,) = torch.autograd.grad(pixels, leaf, onto)
            seen.append(Seen(leaf.detach(), latents.detach(), pixels.detach(), scores))
            slopes.append(slope)
        return stacked(seen), torch.cat(slopes)

    def estimated_slope(self, noise: Tensor, eta: float, draws: int, size: float) -> tuple[Seen, Tensor]:
        """`slope` of a black box: the rewards' slope at the latents is estimated, and carried back by the network.

        g = 1 / draws sum_i (R(x + size u_i) - R(x)) / size u_i,   u_i standard normal, x the walk's end
        """
        seen, slopes = [], []
        for rows, some in self.parts(len(noise), None):
            with torch.enable_grad():
                leaf = noise[rows].detach().float().requires_grad_()
                latents = self.walk(leaf, some, self.steps, eta)
            with torch.no_grad():
                here = self._seen(leaf.detach(), latents.detach(), some)
                onto = torch.zeros_like(latents)
                for _ in range(draws):
                    u = draw(latents.shape[1:], self.generators[rows], latents)
                    moved = self._scores(self.decode(latents + size * u).clamp(0, 1), some)
                    change = torch.nan_to_num((moved.total - here.scores.total) / size, 0.0, 0.0, 0.0)
                    onto += per_sample(change, u) * u / draws
            (slope,) = torch.autograd.grad(latents, leaf, onto)
            seen.append(here)
            slopes.append(slope)
        return stacked(seen), torch.cat(slopes)

    def walk(self, noise: Tensor, owners: Sequence[int], last: int = 0, eta: float = 0.0) -> Tensor:
        """Latents [R, C, h, w] at the end of the walk from noise; its `last` steps have a gradient."""
        step, x, noises = self.stepper(owners, eta), noise, None
        if eta:
            x, noises = noise[:, 0], noise[:, 1:]
        cut = self.steps - last
        if 0 < cut < self.steps:
            with torch.no_grad():
                before = sample(step, x, self.times[: cut + 1], noises=noises).x
            # the value of `before`, and the gradient of the sampler's own multiple of x
            own = carries(self.process, self.kind, self.times[: cut + 1]).prod()
            x, noises = before + own * (x - x.detach()), None if noises is None else noises[:, cut:]
        times, steps = self.times[cut % self.steps :], range(self.steps if last else 0)
        return sample(step, x, times, noises=noises, grad_steps=steps, checkpoint=self.memory.network).x

    def stepper(self, owners: Sequence[int], eta: float = 0.0) -> Stepper:
        """Steps of rows that belong to these prompts."""
        return ddim_stepper(self.guided(owners), self.process, self.kind, self.of(owners, self.condition), eta)

    def guided(self, owners: Sequence[int]) -> Policy:
        """The network with guidance, for such rows."""
        return guided(self.policy, self.of(owners, self.negative), self.guidance)

    def of(self, owners: Sequence[int], condition: Condition) -> Condition:
        """The rows of a condition that belong to these prompts."""
        return {name: value[list(owners)] for name, value in condition.items()}

    def decoded(self, noise: Tensor, latents: Tensor, owners: Sequence[int], ends: bool) -> Seen:
        """What latents [R, C, h, w] give that a method has walked to itself, or sees ahead of it (`ends` is false)."""
        with torch.no_grad():
            parts = [self._seen(noise[rows], latents[rows], some)
                     for rows, some in self.parts(len(latents), owners)]  # fmt: skip
        return replace(stacked(parts), ends=ends)

    def parts(self, count: int, owners: Sequence[int] | None) -> Iterator[tuple[slice, list[int]]]:
        """(rows, whose they are), `at_once` of them at a time."""
        whose = list(range(len(self.prompts))) if owners is None else list(owners)
        for start in range(0, count, self.at_once):
            rows = slice(start, min(count, start + self.at_once))
            yield rows, whose[rows]

    def _seen(self, noise: Tensor, latents: Tensor, owners: Sequence[int]) -> Seen:
        pixels = self.decode(latents).clamp(0, 1)
        return Seen(noise, latents, pixels, self._scores(pixels, owners))

    def _scores(self, pixels: Tensor, owners: Sequence[int]) -> Scores:
        self.rewards(pixels, [self.prompts[owner] for owner in owners])
        return scores_of({name: term.float() for name, term in self.rewards.terms.items()}, self.rewards.weights)

    def _pixel_slope(self, pixels: Tensor, owners: Sequence[int]) -> tuple[Scores, Tensor]:
        """(scores, d total / d pixels), at once or one reward after the other."""
        prompts, weights = [self.prompts[owner] for owner in owners], self.rewards.weights
        leaf = pixels.detach().requires_grad_()
        if not self.memory.apart:
            total = self.rewards(leaf, prompts)
            scores = scores_of({name: term.float() for name, term in self.rewards.terms.items()}, weights)
            return scores, torch.autograd.grad(total.sum(), leaf)[0]
        terms, onto = {}, torch.zeros_like(leaf)
        for name, reward in self.rewards.rewards.items():
            with torch.set_grad_enabled(bool(weights[name])), shared():
                term = reward(leaf if weights[name] else pixels.detach(), prompts)
            terms[name] = term.detach().float()
            if weights[name]:
                onto += torch.autograd.grad(weights[name] * term.sum(), leaf)[0]
        return scores_of(terms, weights), onto
