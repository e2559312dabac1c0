"""Learning-rate schedules as pure functions of the step, so that nothing needs saving to resume."""

from __future__ import annotations

import math

from diffalign.config import RunConfig


def learning_rate(config: RunConfig, step: int) -> float:
    """The share of config.learning_rate to use at a step, in [0, 1].

    constant | constant_with_warmup | linear (to 0 at max_train_steps) | cosine (to 0); all but constant warm up first.
    """
    warmup = config.lr_warmup_steps
    if config.lr_scheduler == "constant":
        return 1.0
    if step < warmup:
        return (step + 1) / warmup
    if config.lr_scheduler == "constant_with_warmup":
        return 1.0
    progress = (step - warmup) / max(1, config.max_train_steps - warmup)
    return 1 - progress if config.lr_scheduler == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
