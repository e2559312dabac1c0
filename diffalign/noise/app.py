"""`diffalign noise-demo`: a page with a prompt, a slider for each reward, and the picture as it gets better. Gradio.

A search runs in a thread of its own and tells of every look through a queue; the page shows what is newest, so that a
slow browser does not hold it up. One search runs at a time, others wait: there is one model.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from typing import Any

import gradio as gr
import pandas as pd
from PIL import Image

from diffalign.errors import first_line
from diffalign.noise import NOISE_METHODS
from diffalign.noise.command import keywords
from diffalign.noise.demo import Serving, Settings
from diffalign.noise.driver import Progress, optimize_noise
from diffalign.noise.result import NoiseResult
from diffalign.noise.seen import Seen
from diffalign.pipelines.base import LatentPipeline
from diffalign.rewards.base import Weighted
from diffalign.rewards.preprocess import to_pictures
from diffalign.table import resolve

log = logging.getLogger("diffalign")

SIDE = 384  # pixels that small pictures are shown at
MOST = 10.0  # of a slider, or the weight that was given if that is more
Update = tuple[Image.Image, Image.Image, pd.DataFrame, str]


class Running:
    """A search in a thread: what it tells, one item after the other, until it ends or is told to stop."""

    def __init__(self, pipe: LatentPipeline, prompt: str, rewards: Weighted, how: Mapping[str, Any]) -> None:
        self.told: queue.Queue[Progress | NoiseResult | Exception] = queue.Queue()
        self.stopping = threading.Event()
        work = (pipe, prompt, rewards, dict(how))
        self.thread = threading.Thread(target=self._run, args=work, daemon=True, name="noise-search")
        self.thread.start()

    def newest(self) -> Iterator[list[Progress | NoiseResult | Exception]]:
        """All that has been told since the last time; the last list ends in a result or an error."""
        while True:
            some = [self.told.get()]
            while not self.told.empty():
                some.append(self.told.get())
            yield some
            if not isinstance(some[-1], Progress):
                return

    def stop(self) -> None:
        """Ends after the look that it is at."""
        self.stopping.set()
        self.thread.join()

    def _run(self, pipe: LatentPipeline, prompt: str, rewards: Weighted, how: dict[str, Any]) -> None:
        try:
            self.told.put(optimize_noise(pipe, prompt, rewards, callback=self._tell, **how))
        except Exception as error:
            self.told.put(error)

    def _tell(self, progress: Progress) -> bool:
        self.told.put(progress)
        return self.stopping.is_set()


def searched(
    pipe: LatentPipeline,
    rewards: Weighted,
    prompt: str,
    weights: Sequence[float],
    how: Mapping[str, Any],
    options: str = "",
) -> Iterator[Update]:
    """(the picture now, the best one, the curve, a line of text), again and again.

    Args:
        weights: of the rewards.
        how: keywords of `optimize_noise`.
        options: KEY=VALUE of the method, with spaces between.

    Raises:
        gr.Error: what is wrong, as the page shows it.
    """
    names, curve = list(rewards.rewards), []
    try:
        pay = Weighted({name: (rewards.rewards[name], weight) for name, weight in zip(names, weights, strict=True)})
        running = Running(pipe, prompt, pay, keywords(options.split(), **how))
    except ValueError as error:
        raise shown(error) from error
    try:
        for some in running.newest():
            looks = [one for one in some if isinstance(one, Progress)]
            curve += [(one.iteration, one.seen.scores.total[0].item()) for one in looks]
            if looks:
                last = looks[-1]
                yield picture(last.seen), picture(last.best), plotted(curve), said(last.iteration, last.best)
            if isinstance(some[-1], NoiseResult):
                yield ended(some[-1], curve)
            elif isinstance(some[-1], Exception):
                raise shown(some[-1]) from some[-1]
    finally:  # the page was closed, or its stop pressed
        running.stop()


def ended(result: NoiseResult, curve: Sequence[tuple[int, float]]) -> Update:
    """What the page shows at the end."""
    best, first = result.best, result.first
    terms = ", ".join(f"{name} {first.terms[name][0]:.4g} to {best.terms[name][0]:.4g}" for name in best.terms)
    text = (f"Done: total {first.total[0]:.4g} to {best.total[0]:.4g} at look {best.iteration[0]}, {terms}; "
            f"{result.evaluations:.0f} evaluations, {result.seconds['search']:.1f} s.")  # fmt: skip
    return enlarged(result.last.images[0]), enlarged(result.images[0]), plotted(curve), text


def said(iteration: int, best: Seen) -> str:
    """While it runs."""
    terms = ", ".join(f"{name} {term[0]:.4g}" for name, term in best.scores.terms.items())
    return f"Look {iteration}: best total {best.scores.total[0]:.4g}, {terms}."


def picture(seen: Seen) -> Image.Image:
    """The first one."""
    return enlarged(to_pictures(seen.pixels[:1])[0])


def enlarged(image: Image.Image) -> Image.Image:
    """Small pictures by a whole factor, so that pixels stay squares."""
    factor = max(1, SIDE // max(image.size))
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def plotted(curve: Sequence[tuple[int, float]]) -> pd.DataFrame:
    """Total against look."""
    return pd.DataFrame(curve, columns=["look", "total"])


def shown(error: Exception) -> gr.Error:
    """Bad input is said as it is; anything else is logged whole."""
    if not isinstance(error, ValueError):
        log.error("noise-demo", exc_info=error)
    return gr.Error(first_line(error), print_exception=False)


def build_app(pipe: LatentPipeline, name: str, rewards: Weighted, start: Settings) -> gr.Blocks:
    """The page of a model of this name. Nothing on it comes from another host."""
    with gr.Blocks(title="diffalign: better noise", analytics_enabled=False) as app:
        gr.Markdown(f"# Better noise for {name}\nThe model stays as it is; what changes is the noise that its "
                    f"pictures start from.")  # fmt: skip
        with gr.Row():
            with gr.Column(scale=1):
                prompt = gr.Textbox(start.prompt, label="Prompt", elem_id="prompt")
                weights = [gr.Slider(min(0.0, weight), max(MOST, weight), weight, label=f"Weight of {name}",
                                     elem_id=f"weight-{place}")
                           for place, (name, weight) in enumerate(rewards.weights.items())]  # fmt: skip
                method = gr.Dropdown(list(NOISE_METHODS), value=start.method, label="Method", elem_id="method")
                steps = gr.Slider(1, max(200, start.steps), start.steps, step=1, label="Looks",
                                  info="paths and fk have their own number", elem_id="looks")  # fmt: skip
                sampling = gr.Slider(1, max(50, start.sampling_steps), start.sampling_steps, step=1,
                                     label="Sampling steps")  # fmt: skip
                guidance = gr.Slider(0, max(15.0, start.guidance_scale), start.guidance_scale, label="Guidance")
                options = gr.Textbox(" ".join(start.options), label="Keywords of the method",
                                     placeholder="lr=5 regularization=0.01", elem_id="options")  # fmt: skip
                seed = gr.Number(start.seed, precision=0, minimum=0, label="Seed")
                with gr.Row():
                    go = gr.Button("Search", variant="primary", elem_id="search")
                    stop = gr.Button("Stop", elem_id="stop")
            with gr.Column(scale=2):
                with gr.Row():
                    now = gr.Image(label="Now", elem_id="now", format="png")
                    best = gr.Image(label="Best", elem_id="best", format="png")
                text = gr.Markdown(elem_id="said")
                curve = gr.LinePlot(x="look", y="total", label="Total, look by look", elem_id="curve")

        def run(prompt: str, method: str, steps: int, sampling: int, guidance: float, options: str, seed: int,
                *weights: float) -> Iterator[Update]:  # fmt: skip
            how = {"method": method, "sampling_steps": int(sampling), "guidance_scale": guidance,
                   "seed": int(seed or 0)}  # fmt: skip
            yield from searched(pipe, rewards, prompt, weights, how | looks(method, int(steps)), options)

        given = [prompt, method, steps, sampling, guidance, options, seed, *weights]
        begun = [one(run, given, [now, best, curve, text], concurrency_limit=1, concurrency_id="model")
                 for one in (go.click, prompt.submit)]  # fmt: skip
        stop.click(None, cancels=begun)
    return app


def looks(method: str, steps: int) -> dict[str, int]:
    """`steps`, for methods that have it."""
    has = "steps" in [one.name for one in fields(resolve(NOISE_METHODS, method, "method"))]
    return {"steps": steps} if has else {}


def opened(page: gr.Blocks, serving: Serving) -> str:
    """Serves the page from a thread; its address.

    Fonts are the machine's own: gradio's come from another host.

    Raises:
        ValueError: an address that cannot be had.
    """
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    try:
        _, url, _ = page.queue().launch(
            server_name=serving.host, server_port=serving.port, inbrowser=serving.browser, theme=theme, quiet=True,
            prevent_thread_lock=True, footer_links=[], ssr_mode=False, share=False,
        )  # fmt: skip
    except OSError as error:
        raise ValueError(f"--host {serving.host} --port {serving.port or 'any'}: is no address of this machine, or is "
                         f"taken ({error}); leave --port out for one that is free") from error  # fmt: skip
    return str(url)
