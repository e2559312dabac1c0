"""What a method is, and the steps that several of them take.

A method is a frozen dataclass of hyper-parameters with `prepare` (no gradient: noise, invert, roll out, score) and
`loss` (gradient: one value per sample, and what to log). It knows no device, no loop and no model family.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Protocol, TypeVar

import torch
from torch import Tensor

from diffalign.losses import squared_error
from diffalign.process import NoiseProcess, moved, target, time_weight
from diffalign.sampling import Condition, Policy, concatenate
from diffalign.scores import Score, Scores
from diffalign.table import Section


class Need(enum.Enum):
    """What a method cannot run without; the trainer refuses a bad combination before anything loads."""

    PAIRS = "preference data (data)"
    PROMPTS = "prompts"
    REWARD = "a reward"
    REWARD_GRADIENT = "a reward with gradients"
    REFERENCE = "a reference"
    FIXED_REFERENCE = "a reference that stays as it is"
    SNAPSHOTS = "past checkpoints"
    USERS = "who preferred (train: user)"
    COMPARISON = "a reward that compares pictures (winrate)"
    BASE = "the base model under a LoRA"


RewardGradient = Callable[[Tensor, Sequence[str]], tuple[Scores, Tensor]]
Kept = TypeVar("Kept")
# (what is computed, what of each row [B, ...] it follows from, how) -> [B, ...]
Remember = Callable[[str, Mapping[str, Tensor], Callable[[], Tensor]], Tensor]


def no_times(steps: int) -> Tensor:
    """Of a run that draws no pictures."""
    raise ValueError("this run has no sampling times: a method that draws pictures needs Run.times")


def no_reward(latents: Tensor, prompts: Sequence[str]) -> Any:
    """Of a run without a reward."""
    raise ValueError("this run has no reward: a method that scores what it draws needs Run.score")


def drawn(updates: int, draw: Callable[[], Kept]) -> Kept:
    """Of a run that keeps no rollouts."""
    return draw()


def computed(what: str, rows: Mapping[str, Tensor], compute: Callable[[], Tensor]) -> Tensor:
    """Of a run that keeps nothing."""
    return compute()


@dataclass(frozen=True)
class Run:
    """What a method is given: two policies of one type, the process, and the step's own generator (on the CPU).

    Attributes:
        times: steps -> [steps + 1] times from noise to picture, for methods that sample or invert.
        score: (latents [B, ...], B prompts) -> the run's rewards of the decoded pictures, which may come later.
        reward_gradient: the same -> (scores, d total / d latents [B, ...]), at once; for rewards that have one.
        gather: [n, ...] of this rank -> [m, ...] of all ranks.
        held: (updates on a rollout, how to draw one) -> what was drawn at the first of these updates.
        base: the network without what is trained, where there is such a thing: a LoRA's base model.
        mean: the mean over all ranks of a scalar tensor, for baselines that are of the whole batch.
        same: whether policy and reference are the same weights still, as before the first step.
        step: how many optimizer steps are done.
        remember: what the fixed reference made of the same rows before, or else what `compute` makes of them now.
        ranks, rank: how many processes there are, and which of them this is.
        common: a generator of this step and microbatch that is the same on all ranks.
    """

    policy: Policy
    reference: Policy | None
    process: NoiseProcess
    parametrization: str
    generator: torch.Generator
    times: Callable[[int], Tensor] = no_times
    score: Score = no_reward
    reward_gradient: RewardGradient = no_reward
    gather: Callable[[Tensor], Tensor] = lambda value: value
    held: Callable[[int, Callable[[], Any]], Any] = drawn
    base: Policy | None = None
    mean: Callable[[Tensor], Tensor] = lambda value: value
    same: bool = False
    step: int = 0
    remember: Remember = computed
    ranks: int = 1
    rank: int = 0
    common: torch.Generator = field(default_factory=torch.Generator)

    @property
    def together(self) -> bool:
        """Whether there are ranks that must call the policy equally often."""
        return self.ranks > 1


@dataclass(frozen=True)
class Batch:
    """B examples of K pictures each, best first: pairs have K = 2, winners and thumbs 1, lists more.

    Attributes:
        members: K latents [B, ...]; none where there are prompts alone.
        conditions: K conditions, one of each member; of most views one and the same.
        label: [B] P(the first member is better than the second); of a thumb 1 liked, 0 disliked.
        scores: [B, K] of the record, higher is better.
        negative: the empty prompt's condition [B, ...], for guidance, where the batch has one.
        signs: [B, S] of clip segments or [B, H, W] of regions: 1 where the first member is better, -1, or 0 for a tie.
        prompts: B texts, where methods score pictures.
        shape: of one latent, where there are no members to see it from.
    """

    members: tuple[Tensor, ...]
    conditions: tuple[Condition, ...]
    label: Tensor
    scores: Tensor
    negative: Condition = field(default_factory=dict)
    signs: Tensor | None = None
    prompts: tuple[str, ...] = ()
    shape: tuple[int, ...] = ()

    @property
    def winner(self) -> Tensor:
        """[B, ...]: the best of each example."""
        return self.members[0]

    @property
    def loser(self) -> Tensor:
        """[B, ...]: the worst of each example."""
        return self.members[-1]

    @property
    def condition(self) -> Condition:
        """Of the winner."""
        return self.conditions[0]


def pair_batch(winner: Tensor, loser: Tensor, condition: Condition, label: Tensor) -> Batch:
    """Pairs [B, ...] under one condition; scores are what the label says."""
    return Batch((winner, loser), (condition, condition), label, torch.stack([label, 1 - label], 1))


@dataclass(frozen=True)
class Noised:
    """Samples at a time: x_t, the target y, both [N, ...], t [N], the condition, and label [B] as in `Batch`.

    N = K B: all first members, then all second ones. `reference_errors` [N], where they are known from an earlier pass
    over these very samples, spare the reference's pass: same kernels, precision and batch shape, or the logit is noise.
    `aux` is what `prepare` leaves for `loss`, each [B, ...].
    """

    x_t: Tensor
    y: Tensor
    t: Tensor
    condition: Condition
    label: Tensor
    reference_errors: Tensor | None = None
    aux: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Loss:
    """value [B] to differentiate; metrics: name -> [B], detached; `time` [B] in [0, 1], what they are binned by."""

    value: Tensor
    time: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)


class Method(Protocol):
    """The contract; `methods/dpo.py` is the example to read."""

    needs: ClassVar[frozenset[Need]]

    @property
    def view(self) -> Section:
        """What a record is to this method: a row of `diffalign.data.views.VIEWS`."""
        ...

    def prepare(self, run: Run, batch: Batch) -> Sequence[Noised]:
        """Microbatches to take the loss of, made under no_grad."""
        ...

    def loss(self, run: Run, batch: Noised) -> Loss:
        """Per-sample value and metrics."""
        ...


def noise_together(
    run: Run,
    batch: Batch,
    time_range: tuple[float, float] = (0.0, 1.0),
    share_noise: bool = True,
    aux: dict[str, Tensor] | None = None,
) -> Noised:
    """Noises all members with one t per row, and one eps or, without `share_noise`, one of each member.

    Sharing t and eps is variance reduction: what differs between winner and loser is then only the picture.
    """
    t, noises = drawn_together(run, batch, time_range, share_noise)
    return noised_at(run, batch.members, batch.conditions, batch.label, t, noises, aux)


def drawn_together(
    run: Run, batch: Batch, time_range: tuple[float, float], share_noise: bool
) -> tuple[Tensor, list[Tensor]]:
    """(t [B], K eps [B, ...]), drawn in this order: those of `noise_together`."""
    first, count = batch.members[0], len(batch.members)
    t = moved(run.process.training_times(len(first), run.generator, *time_range), first.device)
    drawn = [moved(torch.randn(first.shape, generator=run.generator), first.device)
             for _ in range(1 if share_noise else count)]  # fmt: skip
    return t, drawn * count if share_noise else drawn


def updates_of(method: Method) -> int:
    """Optimizer steps on one rollout; 1 for methods that draw anew, or not at all."""
    return int(getattr(method, "updates", 1))


def spreads(method: Method) -> bool:
    """Whether all ranks have the same prompts, and each draws a share of every group (`diffalign.groups`)."""
    return bool(getattr(method, "spread", False))


def with_members(batch: Batch, *members: Tensor, conditions: Sequence[Condition] | None = None) -> Batch:
    """The same examples with other members [B, ...], under the first one's condition if none is given."""
    told = conditions or [batch.condition] * len(members)
    return replace(batch, members=members, conditions=tuple(told))


def noised_at(
    run: Run,
    members: Sequence[Tensor],
    conditions: Sequence[Condition],
    label: Tensor,
    t: Tensor,
    noises: Sequence[Tensor],
    aux: dict[str, Tensor] | None = None,
) -> Noised:
    """K members [B, ...] at times t [B], each with its own eps [B, ...], one below the other."""
    x0, eps = torch.cat([m.float() for m in members]), torch.cat(list(noises))
    t = t.repeat(len(members))
    return Noised(
        x_t=run.process.add_noise(x0, eps, t),
        y=target(run.parametrization, x0, eps, *run.process.coefficients(t)),
        t=t,
        condition=concatenate(*conditions),
        label=label,
        aux=aux or {},
    )


def weight_at(run: Run, t: Tensor, name: str) -> Tensor:
    """[N]: the timestep's weight of this name on the network's own error at times t [N]."""
    return time_weight(name, run.parametrization, *run.process.coefficients(t))


def errors(run: Run, batch: Noised) -> tuple[Tensor, Tensor]:
    """(m, r) [N]: squared errors of policy (with gradient) and reference (without), on identical inputs."""
    prediction, r = prediction_and_reference(run, batch)
    return squared_error(prediction, batch.y), r


def prediction_and_reference(run: Run, batch: Noised) -> tuple[Tensor, Tensor]:
    """(y_hat [N, ...] of the policy with gradient, r [N]): for what needs the residual and not its square alone."""
    r = reference_errors(run, batch) if batch.reference_errors is None else batch.reference_errors
    return run.policy(batch.x_t, batch.t, batch.condition), r


@torch.no_grad()
def reference_errors(run: Run, batch: Noised) -> Tensor:
    """r [N]: what `Noised.reference_errors` may hold when the same samples come again.

    Raises:
        ValueError: the run has no reference.
    """
    return squared_error(reference_of(run)(batch.x_t, batch.t, batch.condition), batch.y)


def reference_of(run: Run) -> Policy:
    """The reference.

    Raises:
        ValueError: the run has none.
    """
    if run.reference is None:
        raise ValueError("this method compares the policy with a reference, and the run has none; "
                         "set reference: {name: adapter_off} or {name: frozen_copy}")  # fmt: skip
    return run.reference
