"""Random steps by name: what a rollout walks, and what is replayed to learn from it.

All are rows of `DYNAMICS`, each a Gaussian for the next time (`diffalign.transition`). `ddim` goes with any process:
its level is eta, and eta = 1 is the DDPM ancestral step. The others are of rectified flows; their level is what their
papers call a or eta.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from diffalign.process import Endpoints, FewTimes, NoiseProcess, RectifiedFlow
from diffalign.sampling import Condition, Policy, Stepper, predicted_endpoints
from diffalign.transition import Gaussian, cps, dance_sde, ddim, flow_sde

# (x0 and eps, x_t, t, s, process, level, the second time of the walk) -> the law of x_s
Step = Callable[[Endpoints, Tensor, Tensor, Tensor, NoiseProcess, float, float], Gaussian]

DYNAMICS: dict[str, Step] = {
    "ddim": lambda ends, x_t, t, s, process, level, second: ddim(
        ends, process.coefficients(t), process.coefficients(s), level
    ),
    "flow_sde": lambda ends, x_t, t, s, process, level, second: flow_sde(ends, x_t, t, s, level, second),
    "dance_sde": lambda ends, x_t, t, s, process, level, second: dance_sde(ends, x_t, t, s, level),
    "cps": lambda ends, x_t, t, s, process, level, second: cps(ends, t, s, level),
}
LEVELS = {"ddim": 1.0, "flow_sde": 0.7, "dance_sde": 0.3, "cps": 0.8}  # of the papers


def suited(dynamics: str, process: NoiseProcess) -> str:
    """The row that goes by this name with a process; `auto` is flow_sde for rectified flows and ddim for the others.

    Raises:
        ValueError: a row for rectified flows, and a process that is none.
    """
    plain = process.process if isinstance(process, FewTimes) else process
    flows = isinstance(plain, RectifiedFlow)
    if dynamics == "auto":
        return "flow_sde" if flows else "ddim"
    if dynamics != "ddim" and not flows:
        raise ValueError(f"method.dynamics: {dynamics} is for rectified flows such as SD3, and this model is none: "
                         f"set ddim, or leave it out")  # fmt: skip
    return dynamics


def random_stepper(
    dynamics: str,
    level: float | None,
    policy: Policy,
    process: NoiseProcess,
    kind: str,
    condition: Condition,
    second: float,
) -> Stepper:
    """Steps of this row at this level (None: the row's own); `second` is the second time of the whole walk.

    Flow-GRPO's step has no size at t = 1, and takes that of `second` there.

    Raises:
        ValueError: see `suited`.
    """
    name = suited(dynamics, process)
    row, amount = DYNAMICS[name], LEVELS[name] if level is None else level

    def step(x_t: Tensor, t: Tensor, s: Tensor) -> Gaussian:
        ends = predicted_endpoints(policy, process, kind, x_t, t, condition)
        return row(ends, x_t, t, s, process, amount, second)

    return step
