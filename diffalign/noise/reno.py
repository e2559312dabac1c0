"""ReNO: Eyring et al. 2024, ReNO: Enhancing One-step Text-to-Image Models through Reward-based Noise Optimization,
arXiv 2406.04312.

    z <- z - lr clip( d/dz [ -R(picture of z) + w (||z||^2 / 2 - (d - 1) log ||z||) ] )

The second term is the negative log density of the norm of d standard normal numbers; it is least at ||z|| = sqrt(d - 1)
and keeps z on the shell where the model has learned to start.

Deviations from the released code (ExplainableML/ReNO), each on purpose:
- z and the second term are fp32. There z is fp16, where rounding takes an eighth of an update;
- each picture's gradient is clipped by its own norm, so that a batch is as its pictures alone;
- prompts are encoded once. There all text encoders run in every iteration;
- the best noise is a copy. There it is the parameter itself, on a CPU;
- `optimizer: lbfgs` is not there; as released it raises.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from diffalign.methods.checks import check_choice, check_not_negative, check_positive
from diffalign.noise.best_of_n import BestOfN
from diffalign.noise.objective import Objective
from diffalign.noise.refusals import refuse_black_boxes
from diffalign.noise.seen import Seen, best_of
from diffalign.process import per_sample

INITS = ("random", "best_of_n")


@dataclass(frozen=True)
class ReNO:
    """Gradient ascent of rewards on the noise that a walk starts from.

    Args:
        steps: iterations; the first looks at the plain picture, and the last does not take a step any more.
        optimizer: sgd (with Nesterov's momentum) | adam.
        lr: 5 with sgd, and a clip of 0.1, moves z by 0.5 at first, and by up to 5 with the momentum.
        momentum: of sgd, in [0, 1); the first beta of adam.
        grad_clip: norm that a picture's gradient is cut to.
        regularization: w; 0 leaves the norm alone.
        init: random | best_of_n of `candidates` noises, which are looked at before the iterations and on top of them.
        candidates: of best_of_n.
        last_steps: of a walk of many steps only so many last ones are differentiated; None differentiates all.

    Raises:
        ValueError: a value outside its range.
    """

    steps: int = 50
    optimizer: str = "sgd"
    lr: float = 5.0
    momentum: float = 0.9
    grad_clip: float = 0.1
    regularization: float = 0.01
    init: str = "random"
    candidates: int = 8
    last_steps: int | None = None

    def __post_init__(self) -> None:
        check_positive("optimize_noise", steps=self.steps, lr=self.lr, grad_clip=self.grad_clip,
                       candidates=self.candidates)  # fmt: skip
        check_not_negative("optimize_noise", regularization=self.regularization)
        check_choice("optimizer", self.optimizer, OPTIMIZERS, "optimize_noise")
        check_choice("init", self.init, INITS, "optimize_noise")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"optimize_noise.momentum: expected a number of at least 0 and below 1, got "
                             f"{self.momentum}")  # fmt: skip

    def check(self, objective: Objective) -> None:
        """Raises ValueError for rewards without a gradient, or more last steps than there are."""
        refuse_black_boxes("reno", objective.rewards)
        if self.last_steps is not None and not 1 <= self.last_steps <= objective.steps:
            raise ValueError(f"optimize_noise.last_steps: expected 1 to {objective.steps} of the walk's steps, got "
                             f"{self.last_steps}")  # fmt: skip

    def search(self, objective: Objective, noise: Tensor) -> Iterator[Seen]:
        if self.init == "best_of_n":
            looks = list(BestOfN(self.candidates).search(objective, noise))
            yield from looks
            noise = best_of(looks).noise
        z = noise.detach().float().clone()
        optimizer = OPTIMIZERS[self.optimizer](z, self)
        for _ in range(self.steps - 1):
            seen, slope = objective.slope(z, self.last_steps)
            yield seen
            z.grad = clipped(off_shell(z, self.regularization) - usable(slope), self.grad_clip)
            optimizer.step()
        yield objective.look(z.clone())


OPTIMIZERS: dict[str, Callable[[Tensor, ReNO], torch.optim.Optimizer]] = {
    "sgd": lambda z, how: torch.optim.SGD([z], how.lr, how.momentum, nesterov=how.momentum > 0),
    "adam": lambda z, how: torch.optim.Adam([z], how.lr, (how.momentum, 0.999), eps=1e-2),  # eps as released
}


def off_shell(z: Tensor, weight: float) -> Tensor:
    """The gradient of weight (||z||^2 / 2 - (d - 1) log ||z||), row by row: weight (1 - (d - 1) / ||z||^2) z."""
    squared, d = z.float().flatten(1).square().sum(1), z[0].numel()
    return per_sample(weight * (1 - (d - 1) / squared), z) * z


def clipped(gradient: Tensor, largest: float) -> Tensor:
    """Each row cut to this norm, as torch.nn.utils.clip_grad_norm_ does with one."""
    norm = gradient.flatten(1).norm(dim=1)
    return per_sample((largest / (norm + 1e-6)).clamp(max=1.0), gradient) * gradient


def usable(slope: Tensor) -> Tensor:
    """Without the rows that are not finite everywhere: a picture without a score gives no gradient."""
    good = slope.flatten(1).isfinite().all(1)
    return torch.where(per_sample(good, slope), slope, torch.zeros_like(slope))
