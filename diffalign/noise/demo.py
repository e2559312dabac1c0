"""What `diffalign noise-demo` does once its arguments are read: loads a model and its rewards, and serves the page."""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from diffalign.console import HOME, Result
from diffalign.methods.checks import check_not_negative, check_positive
from diffalign.noise import NOISE_METHODS
from diffalign.noise.command import dtype_of
from diffalign.noise.setup import refuse_comparisons
from diffalign.pipelines import load_pipeline
from diffalign.rewards import load_rewards
from diffalign.table import unknown

log = logging.getLogger("diffalign")


@dataclass(frozen=True)
class Settings:
    """What the page starts with; the fields are those of `optimize_noise`, `options` being KEY=VALUE of the method.

    Raises:
        ValueError: an unknown method, or a number below what it must be.
    """

    prompt: str
    method: str = "reno"
    steps: int = 50
    sampling_steps: int = 1
    guidance_scale: float = 1.0
    seed: int = 0
    options: Sequence[str] = ()

    def __post_init__(self) -> None:
        if self.method not in NOISE_METHODS:
            raise unknown("--method", self.method, NOISE_METHODS)
        check_positive("noise-demo", steps=self.steps, sampling_steps=self.sampling_steps)
        check_not_negative("noise-demo", guidance_scale=self.guidance_scale, seed=self.seed)


@dataclass(frozen=True)
class Serving:
    """How the page is reached; without a port it is the first free one from 7860 on."""

    host: str = "127.0.0.1"
    port: int | None = None
    browser: bool = False


def serve_demo(
    model: str,
    rewards: Mapping[str, Any],
    start: Settings,
    serving: Serving,
    device: str,
    dtype: str = "float32",
    attention: str = "auto",
) -> Result:
    """Serves the page until it is stopped.

    Raises:
        ValueError: gradio is not installed, a model or reward that cannot be loaded, rewards that compare pictures, or
            an address that cannot be had.
    """
    try:
        from diffalign.noise import app
    except ImportError as error:
        raise ValueError("diffalign noise-demo needs gradio: pip install 'diffalign[noise-demo]'") from error
    pipe = load_pipeline(model, device=device, dtype=dtype_of(dtype), attention=attention)
    several = load_rewards(rewards, device=device)
    refuse_comparisons(several)
    page = app.build_app(pipe, model, several, start)
    url = app.opened(page, serving)
    log.info("open %s and stop with Ctrl-C", url)
    if serving.host not in HOME:
        log.warning("--host %s: anybody in the network can search for noise here", serving.host)
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        page.close(verbose=False)
    return Result({"url": url}, "stopped")
