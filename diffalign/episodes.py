"""Pictures drawn to be learned from: random walks of a policy, kept step by step, scored, and replayed.

The walk of a picture is random in a window of its steps and deterministic elsewhere; the last step always is, so that
no picture has noise left in it. Only what replay needs is kept: the window's states, rounded to the type that they are
stored in before they are judged and walked on from, and their log-probabilities. A replay of all pictures calls the
network on the same rows as the rollout did, so that before the first update the ratio of the two is 1.

All noise follows from the run's own generator, each picture from a seed of its own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from diffalign.dynamics import DYNAMICS, random_stepper
from diffalign.groups import Group
from diffalign.methods.base import Batch, Noised, Run
from diffalign.methods.checks import check_choice, check_positive
from diffalign.process import moved
from diffalign.rollouts import repeated
from diffalign.sampling import Condition, Policy, ddim_stepper, guided, sample
from diffalign.scores import Scores, joined
from diffalign.transition import Gaussian

STORES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
NEGATIVE = "negative."  # how the empty prompt's condition is named in `Noised.aux`


@dataclass(frozen=True)
class Explorer:
    """How pictures are drawn to learn from; the keywords of the methods that do.

    Args:
        steps: network times walked.
        guidance: scale of classifier-free guidance, in the rollout and in the replay; 1 is none.
        dynamics: a row of `diffalign.dynamics.DYNAMICS`, or auto.
        noise_level: its level; None is that of its paper.
        group: pictures per prompt.
        same_start: whether those of a prompt start from one noise.
        window: random steps; 0 is all but the last.
        window_start: the first of them, counted from 0; None is a place in the first half that every rollout draws.
        at_once: pictures in one call of the network.
        store: float32 | bfloat16 | float16, of what is kept.
        spread: whether each of several ranks draws a share of every group (`diffalign.groups`), all from one start if
            `same_start`, and with one window.

    Raises:
        ValueError: a value outside its range; the message names it as a key of `method`.
    """

    steps: int
    guidance: float
    dynamics: str = "auto"
    noise_level: float | None = None
    group: int = 1
    same_start: bool = False
    window: int = 0
    window_start: int | None = None
    at_once: int = 8
    store: str = "float32"
    spread: bool = False

    def __post_init__(self) -> None:
        check_positive(group=self.group, at_once=self.at_once)
        check_choice("dynamics", self.dynamics, ("auto", *DYNAMICS))
        check_choice("store", self.store, STORES)
        if self.steps < 2:
            raise ValueError(f"method.steps: expected at least 2, since the last is not random, got {self.steps}")
        if not 0 <= self.guidance < math.inf:
            raise ValueError(f"method.guidance: expected a scale of at least 0, got {self.guidance}")
        if self.noise_level is not None and not 0 < self.noise_level < math.inf:
            raise ValueError(f"method.noise_level: expected a number above 0, or leave it out, got {self.noise_level}")
        if not 0 <= self.window < self.steps:
            raise ValueError(f"method.window: expected 0, or fewer random steps than method.steps, which is "
                             f"{self.steps}, got {self.window}")  # fmt: skip
        latest = self.steps - 1 - self.window  # the last step is not random
        if self.window_start is not None and not (self.window and 0 <= self.window_start <= latest):
            why = f"one of the steps 0 to {latest}" if self.window else "method.window above 0 with it"
            raise ValueError(f"method.window_start: expected {why}, or leave it out, got {self.window_start}")

    @classmethod
    def of(cls, method: object, **changes: Any) -> Explorer:
        """As a method's keywords of the same names say, apart from changes."""
        told = {key.name: getattr(method, key.name) for key in fields(cls) if hasattr(method, key.name)}
        return cls(**told | changes)

    def parts(self, start: int, stop: int) -> Iterator[slice]:
        """Pictures start:stop as the network is called on them: whole prompts where they fit, else parts of one."""
        for block in self.blocks(start, stop):
            yield from slices(block.start, block.stop, self.at_once)

    def blocks(self, start: int, stop: int) -> Iterator[slice]:
        """Pictures start:stop as rewards see them: whole prompts, since some compare the pictures of one."""
        return slices(start, stop, self.group * max(1, self.at_once // self.group))

    @property
    def groups(self) -> Group:
        return Group(self.group, self.spread)

    @property
    def widest(self) -> int:
        """The most pictures that one of `parts` has, given enough prompts."""
        return max(part.stop - part.start for part in self.parts(0, self.group * self.at_once))

    def law(self, run: Run, policy: Policy, batch: Noised) -> Gaussian:
        """Of the next state of a step of `replayed`, by this policy."""
        return self.law_of(run, self.predict(run, policy, batch), batch)

    def predict(self, run: Run, policy: Policy, batch: Noised) -> Tensor:
        """What a policy says at a replayed step, under the guidance of the rollout: [B, ...]."""
        negative = {n[len(NEGATIVE):]: v for n, v in batch.aux.items() if n.startswith(NEGATIVE)}  # fmt: skip
        return guided(policy, negative, self.guidance)(batch.x_t, batch.t, batch.condition)

    def law_of(self, run: Run, prediction: Tensor, batch: Noised) -> Gaussian:
        """The law that follows from what was said, [B, ...]."""
        second = float(run.times(self.steps)[1])
        step = random_stepper(self.dynamics, self.noise_level, lambda *_: prediction, run.process, run.parametrization,
                              batch.condition, second)  # fmt: skip
        return step(batch.x_t, batch.t, batch.aux["s"])


@dataclass(frozen=True)
class Episodes:
    """R = P group pictures, those of a prompt one after the other.

    Attributes:
        states: [R, W + 1, ...] of the random window, in the stored type, on the CPU.
        times: [W + 1] of them.
        log_probs: [R, W] of the steps between, by the policy that drew.
        x: [R, ...] the pictures' latents.
        scores: of the pictures.
        condition, negative: of R rows.
    """

    states: Tensor
    times: Tensor
    log_probs: Tensor
    x: Tensor
    scores: Scores
    condition: Condition
    negative: Condition


@torch.no_grad()
def explore(run: Run, policy: Policy, batch: Batch, how: Explorer) -> Episodes:
    """Draws `how.group` pictures for every prompt of a batch and has them scored while the next ones are drawn."""
    group, shape, shared = how.group, batch.shape, run.common if how.spread else run.generator
    condition, negative = (repeated(c, group) for c in (batch.conditions[0], batch.negative))
    prompts = [prompt for prompt in batch.prompts for _ in range(group)]
    some = next(iter(condition.values()))
    if how.same_start:
        noise = torch.randn(len(batch.prompts), *shape, generator=shared).repeat_interleave(group, 0)
    else:
        noise = torch.randn(len(prompts), *shape, generator=run.generator)
    noise = moved(noise, some.device)
    seeds = torch.randint(2**62, (len(prompts),), generator=run.generator).tolist()
    window = _window(how, shared)
    walks, answers = [], []
    for block in how.blocks(0, len(prompts)):
        parts = [
            _walk(run, policy, noise[rows], seeds[rows], {n: v[rows] for n, v in condition.items()},
                  {n: v[rows] for n, v in negative.items()}, window, how)
            for rows in how.parts(block.start, block.stop)
        ]  # fmt: skip
        walks += parts
        answers.append(run.score(torch.cat([part.x for part in parts]), prompts[block]))
    times = run.times(how.steps)[window.start : window.stop + 1].cpu()
    return Episodes(
        torch.cat([walk.states for walk in walks]), times, torch.cat([walk.log_probs for walk in walks]),
        torch.cat([walk.x for walk in walks]), joined([answer.result() for answer in answers]), condition, negative,
    )  # fmt: skip


@dataclass(frozen=True)
class _Walk:
    x: Tensor
    states: Tensor
    log_probs: Tensor


def _walk(
    run: Run, policy: Policy, x: Tensor, seeds: Sequence[int], condition: Condition, negative: Condition,
    window: range, how: Explorer,
) -> _Walk:  # fmt: skip
    times, store = moved(run.times(how.steps), x.device), STORES[how.store]
    follow = guided(policy, negative, how.guidance)
    plain = ddim_stepper(follow, run.process, run.parametrization, condition)
    noisy = random_stepper(how.dynamics, how.noise_level, follow, run.process, run.parametrization, condition,
                           float(run.times(how.steps)[1]))  # fmt: skip
    if window.start:
        x = sample(plain, x, times[: window.start + 1]).x
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    x = x.to(store).float()  # the first state is kept too
    walked = sample(noisy, x, times[window.start : window.stop + 1], generators=generators, record=True, store=store)
    x = sample(plain, walked.x, times[window.stop :]).x
    assert walked.states is not None and walked.log_probs is not None
    return _Walk(x, _kept(walked.states.to(store)), walked.log_probs)


def _kept(states: Tensor) -> Tensor:
    """On the CPU, in memory that a GPU reads without waiting."""
    return states.cpu().pin_memory() if states.device.type == "cuda" else states


def _window(how: Explorer, generator: torch.Generator) -> range:
    """Indices of the random steps."""
    if not how.window:
        return range(how.steps - 1)
    latest = max(0, how.steps // 2 - how.window)
    drawn = int(torch.randint(latest + 1, (1,), generator=generator))
    start = drawn if how.window_start is None else how.window_start
    return range(start, start + how.window)


Rows = slice | Tensor  # of the R pictures, a part or in any order


def replayed(
    episodes: Episodes, rows: Rows, step: int, aux: Mapping[str, Tensor] | None = None
) -> Noised:  # fmt: skip
    """Step number `step` of some pictures: x_t, the state that followed as y, and the log-probability of then.

    `aux` is what else the loss wants to know, each [R, ...] of all pictures.
    """
    device, stored = episodes.x.device, rows.cpu() if isinstance(rows, Tensor) else rows  # states are on the CPU
    now, then = (moved(episodes.states[stored, k], device).float() for k in (step, step + 1))
    t, s = (episodes.times[k].to(device).expand(len(now)) for k in (step, step + 1))
    known = {"s": s, "log_prob": episodes.log_probs[rows, step]}
    known |= {NEGATIVE + name: value[rows] for name, value in episodes.negative.items()}
    known |= {name: value[rows] for name, value in (aux or {}).items()}
    condition = {name: value[rows] for name, value in episodes.condition.items()}
    return Noised(now, then, t, condition, torch.zeros(len(now), device=device), aux=known)


@torch.no_grad()
def log_probs_of(run: Run, policy: Policy, episodes: Episodes, how: Explorer) -> Tensor:
    """[R, W] of the random steps by another policy, or by this one after an update."""
    made = [
        torch.stack([how.law(run, policy, step).log_prob(step.y) for step in every_step(episodes, rows, how)], 1)
        for rows in how.parts(0, len(episodes.x))
    ]
    return torch.cat(made)


def every_step(
    episodes: Episodes, rows: slice, how: Explorer, aux: Mapping[str, Tensor] | None = None
) -> list[Noised]:  # fmt: skip
    """All steps of some pictures, a microbatch each, as many pictures at once as the rollout had."""
    return [
        replayed(episodes, part, step, aux)
        for part in how.parts(rows.start, rows.stop)
        for step in range(len(episodes.times) - 1)
    ]


def slices(start: int, stop: int, size: int) -> Iterator[slice]:
    """start:stop in parts of at most `size`."""
    for place in range(start, stop, size):
        yield slice(place, min(place + size, stop))


def share(count: int, parts: int, part: int) -> slice:
    """Which of `count` pictures (or prompts) one of `parts` updates learns from.

    Raises:
        ValueError: fewer pictures than updates.
    """
    if count < parts:
        raise ValueError(f"method.updates: {parts} updates share out the {count} pictures or prompts of a microbatch: "
                         f"expected at least one each; set a larger train_batch_size, or fewer updates")  # fmt: skip
    return slice(part * count // parts, (part + 1) * count // parts)


@runtime_checkable
class Replays(Protocol):
    """A method that learns from steps of its own rollouts."""

    @property
    def explorer(self) -> Explorer: ...
