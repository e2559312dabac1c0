"""diffalign: text-to-image and text-to-video diffusion models, aligned with what people prefer.

The public names are loaded when they are first used, so that `import diffalign` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffalign.evaluation import evaluate
    from diffalign.generation import generate
    from diffalign.noise.driver import optimize_noise
    from diffalign.noise.result import load_noise
    from diffalign.pipelines import load_pipeline
    from diffalign.pipelines.user_adapter import load_user_adapter
    from diffalign.rewards import load_reward, load_rewards
    from diffalign.trainer import train
    from diffalign.users import embed_user, load_user

__all__ = [
    "embed_user",
    "evaluate",
    "generate",
    "load_noise",
    "load_pipeline",
    "load_reward",
    "load_rewards",
    "load_user",
    "load_user_adapter",
    "optimize_noise",
    "train",
]
__version__ = "0.1.0"

_HOMES = {
    "evaluate": "diffalign.evaluation",
    "generate": "diffalign.generation",
    "load_noise": "diffalign.noise.result",
    "load_pipeline": "diffalign.pipelines",
    "load_reward": "diffalign.rewards",
    "load_rewards": "diffalign.rewards",
    "load_user": "diffalign.users",
    "load_user_adapter": "diffalign.pipelines.user_adapter",
    "embed_user": "diffalign.users",
    "optimize_noise": "diffalign.noise.driver",
    "train": "diffalign.trainer",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'diffalign' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
