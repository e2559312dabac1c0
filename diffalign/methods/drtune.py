"""DRTune: Wu et al. 2024, Deep Reward Supervisions for Tuning Text-to-Image Diffusion Models, arXiv 2405.00760.

    L = -R(x0'),   with what the network is given cut off from the gradient at every step

So the gradient reaches the parameters through the outputs and the sampler's linear recursion alone: it is
sum_k c_k < dR/dx , d y_k >, without the network's Jacobians, which explode over many steps, and each step can be
differentiated by itself. `trained` steps at equal distances are; the walk ends early, at a random late step, with the
picture that the network predicts there.

After the paper and FlowBP's re-implementation; the official code was not consulted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from diffalign.methods.base import Batch, Loss, Need, Noised, Run
from diffalign.methods.checks import check_last, check_not_negative, check_positive
from diffalign.methods.direct import below, random_step, reward_loss, start_of, steered, walked_in_parts
from diffalign.sampling import carries


@dataclass(frozen=True)
class DRTune:
    """Gradient of a reward through single steps of a walk, by its linear part.

    Args:
        trained: steps that are differentiated.
        late: the walk ends at one of so many last steps, drawn once per rollout.
        goal, kl_weight, steps, guidance, at_once: as in `draft`.

    Metrics: those of `draft`.

    Raises:
        ValueError: a value outside its range.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({Need.PROMPTS, Need.REWARD_GRADIENT, Need.REFERENCE})
    view: ClassVar[str] = "prompts"

    trained: int = 3
    late: int = 20
    goal: float | None = None
    kl_weight: float = 0.0
    steps: int = 50
    guidance: float = 7.5
    at_once: int = 8

    def __post_init__(self) -> None:
        check_positive(at_once=self.at_once)
        check_not_negative(guidance=self.guidance, kl_weight=self.kl_weight)
        check_last("late", self.late, self.steps)
        check_last("trained", self.trained, self.steps - self.late + 1)

    def prepare(self, run: Run, batch: Batch) -> Sequence[Noised]:
        times = run.times(self.steps)
        stop = random_step(run, range(self.steps - self.late, self.steps))
        path = torch.cat([times[: stop + 1], times[-1:]])  # the step to `stop`, then the picture as it is seen there
        chosen = torch.linspace(0, len(path) - 2, self.trained).round().long().tolist()
        states, x = {}, start_of(run, batch)
        for k in range(len(path) - 1):
            if k in chosen:
                states[k] = x
            x = walked_in_parts(run, batch, x, path[k : k + 2], self.guidance, self.at_once)
        scores, slope = run.reward_gradient(x, batch.prompts)
        slope = below(slope, scores, self.goal)
        carried = carries(run.process, run.parametrization, path)
        made = []
        for k, state in states.items():
            weighed = slope * carried[k + 1 :].prod()
            made += steered(run, batch, state, path[k : k + 2], weighed, scores, self.at_once)
        return made

    def loss(self, run: Run, batch: Noised) -> Loss:
        return reward_loss(run, batch, self.guidance, self.kl_weight)
