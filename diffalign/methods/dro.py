"""Diffusion-DRO: ranking-based preference optimization from expert pictures alone, 2025, arXiv 2510.18353.

    L = max(0, d_E - d_P + margin),   d = m - r

E is an expert picture with fresh noise, P a latent that the policy meets while it draws a picture of the same prompt,
at the same time t; the target of P is what the policy says there. There are no losers in the data.

Deviations from the released description:
- the walk is DDIM instead of DPM-Solver++, with the same 20 steps, guidance 1 and jittered times, and begins at the
  first time of the grid instead of up to one stride away, since the latent there is pure noise;
- the policy draws for every optimizer step, which is what its settings come to (a buffer as large as a batch, synced
  once per step). P's target is then the policy's own answer, so m_P and its gradient are 0: P takes part through r_P
  alone, as a threshold. A sample gives a gradient, that of SFT, while the policy has gained less on the expert (-d_E)
  than it has moved from the reference on its own latents (r_P), give or take the margin.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from diffalign.losses import ranking_hinge
from diffalign.methods.base import Batch, Loss, Need, Noised, Run, errors
from diffalign.methods.checks import check_positive
from diffalign.methods.pairs import pair_loss
from diffalign.process import moved, target
from diffalign.rollouts import Sampler, jittered, roll_out
from diffalign.sampling import concatenate


@dataclass(frozen=True)
class DRO:
    """Expert pictures ranked above what the policy draws.

    Args:
        margin: above 0, in units of the error; about a hundredth of a usual m.
        steps: of the policy's walk; it costs as many network evaluations, and training 5 more.
        guidance: of the walk; the target is the policy's answer without guidance.
        at_once: pictures that are drawn in one call of the network.
        reuse: times on the walk that are trained at per optimizer step, each with fresh noise on the expert.

    Metrics: `h` is d_P - d_E in units of the margin, so that 1 is where the gradient ends; d_w is d_E, d_l is d_P.

    Raises:
        ValueError: a value outside its range.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({Need.PAIRS, Need.REFERENCE})
    view: ClassVar[str] = "winners"

    margin: float = 0.001
    steps: int = 20
    guidance: float = 1.0
    at_once: int = 8
    reuse: int = 1

    def __post_init__(self) -> None:
        check_positive(margin=self.margin, reuse=self.reuse)
        self._sampler()

    def prepare(self, run: Run, batch: Batch) -> Sequence[Noised]:
        x0 = batch.winner.float()
        times = jittered(run.times(self.steps), len(x0), run.generator)
        walk = roll_out(run, run.policy, batch.condition, batch.negative, x0.shape[1:], self._sampler(), times=times,
                        record=True)  # fmt: skip
        assert walk.states is not None
        times = moved(times, x0.device)
        return [self._noised(run, batch, walk.states, times) for _ in range(self.reuse)]

    def loss(self, run: Run, batch: Noised) -> Loss:
        m, r = errors(run, batch)
        d_expert, d_policy = (m - r).chunk(2)
        value = batch.label * ranking_hinge(d_expert, d_policy, self.margin)
        return pair_loss(run, batch, value, (d_policy - d_expert) / self.margin, m, r)

    def _noised(self, run: Run, batch: Batch, states: Tensor, times: Tensor) -> Noised:
        """A random step of each walk beside its expert, both at that step's time."""
        x0 = batch.winner.float()
        rows = torch.arange(len(x0), device=x0.device)
        step = moved(torch.randint(len(times) - 1, (len(x0),), generator=run.generator), x0.device)
        eps = moved(torch.randn(x0.shape, generator=run.generator), x0.device)
        t, x_t = times[step, rows], states[rows, step]
        of_expert = target(run.parametrization, x0, eps, *run.process.coefficients(t))
        of_policy = run.policy(x_t, t, batch.condition)
        return Noised(
            x_t=torch.cat([run.process.add_noise(x0, eps, t), x_t]),
            y=torch.cat([of_expert, of_policy]),
            t=t.repeat(2),
            condition=concatenate(batch.condition, batch.condition),
            label=batch.label,
        )

    def _sampler(self) -> Sampler:
        return Sampler(self.steps, self.guidance, at_once=self.at_once)
