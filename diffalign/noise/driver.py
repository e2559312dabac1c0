"""`optimize_noise`: one call for every method, model family and reward; and what is the same for all of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from diffalign.noise import NOISE_METHODS
from diffalign.noise.objective import Search
from diffalign.noise.result import Found, NoiseResult
from diffalign.noise.seen import Seen, chosen, improves
from diffalign.noise.setup import Rewards, checked_prompts, checked_seeds, objective_of, weighted
from diffalign.pipelines import as_pipeline
from diffalign.pipelines.base import LatentPipeline
from diffalign.pipelines.compiling import compile_blocks, compiled
from diffalign.table import build


@dataclass(frozen=True)
class Progress:
    """What a callback is told after each look.

    Attributes:
        iteration: its number in `NoiseResult.history`.
        seen: what was looked at.
        best: each prompt's best until now.
    """

    iteration: int
    seen: Seen
    best: Seen


def optimize_noise(
    pipe: LatentPipeline | str | Any,
    prompts: str | Sequence[str],
    rewards: Rewards,
    *,
    method: str = "reno",
    steps: int | None = None,
    seed: int | Sequence[int] = 0,
    sampling_steps: int = 1,
    timesteps: Sequence[int] | None = None,
    guidance_scale: float = 1.0,
    height: int | None = None,
    width: int | None = None,
    memory: str = "balanced",
    batch_size: int | None = None,
    vae: Any = None,
    compile: bool = False,
    callback: Callable[[Progress], bool | None] | None = None,
    **options: Any,
) -> NoiseResult:
    """Looks for noise of which a frozen model makes pictures that rewards like.

    A picture follows from its prompt, its seed and the settings alone: several prompts are what each would be by
    itself, up to rounding. Ctrl-C ends the search and gives what was found so far (`interrupted`).

    Args:
        pipe: a `LatentPipeline`, a stock diffusers pipeline of a family that is served, or what `load_pipeline` takes.
        prompts: one, or several that are optimized at once.
        rewards: as in a config, {"hpsv2.1": 5.0, "clip": {"weight": 0.01, "model": ...}}; or reward objects, whose
            plain sum is taken. Higher is better. A weight of 0 only logs.
        method: a row of `diffalign.noise.NOISE_METHODS`, or the dotted path of your own.
        steps: how many looks, for methods that have it: reno, best_of_n, zero_order and dno.
        seed: of the first prompt, the next ones count up from there; or one per prompt. As in `generate` the plain
            picture's noise is that of torch.Generator().manual_seed(seed).
        sampling_steps: of the walk from noise to picture; 1 is for distilled models such as SD-Turbo.
        timesteps: of that walk instead, as the network counts them: [800] for Hyper-SDXL's U-Net of one step.
        guidance_scale: classifier-free guidance; 1 or less is none, as distilled models want it.
        height, width: in pixels; the model's own size if not given.
        memory: fast | balanced | low, what a gradient keeps in memory and what it computes twice.
        batch_size: pictures at a time; 8, and 1 with memory="low", if not given.
        vae: a small decoder (diffusers' AutoencoderTiny) to search with; the pictures are made by the model's own.
        compile: the repeated blocks of the network are compiled (torch.compile, shapes static), and stay so: minutes at
            first, which pay on a GPU and over many prompts.
        callback: called after each look with a `Progress`; the search ends if it returns True.
        options: the method's own keywords, such as lr, regularization and init of reno.

    Raises:
        ValueError: whatever is wrong with one of these, before anything is drawn.
    """
    begun = time.perf_counter()
    model, texts = as_pipeline(pipe), checked_prompts(prompts)
    if model.clips:
        raise ValueError(f"{model.name} draws clips: noise is optimized for models of pictures alone")
    seeds = checked_seeds(seed, len(texts))
    given = {} if steps is None else {"steps": steps}
    search: Search = build(NOISE_METHODS, {"name": method, **given, **options}, what="optimize_noise")
    objective = objective_of(model, texts, weighted(rewards, model), seeds, sampling_steps, guidance_scale,
                             model.latent_shape(height, width), memory, batch_size, vae, timesteps)  # fmt: skip
    search.check(objective)
    if compile and not compiled(model.network):
        compile_blocks(model.network)
    ready = time.perf_counter()
    log = Log(callback)
    log.follow(search.search(objective, objective.fresh()))
    searched = time.perf_counter()
    evaluations = objective.policy.rows / len(texts)
    best, first, last = log.best, log.first, log.last
    if vae is not None:  # what the search saw through it is decoded again, and scored again
        true = replace(objective, decode=model.decoder())
        owners = range(len(texts))
        best, first, last = (true.decoded(look.noise, look.latents, owners, look.ends) for look in (best, first, last))
    settings = {
        "model": model.name, "method": method, **vars(search), "sampling_steps": objective.steps,
        "timesteps": timesteps and list(timesteps), "guidance_scale": guidance_scale, "memory": memory,
        "weights": objective.rewards.weights,
    }  # fmt: skip
    seconds = {"setup": ready - begun, "search": searched - ready, "final": time.perf_counter() - searched}
    history = tuple({key: value.float().cpu() if isinstance(value, Tensor) else value for key, value in look.items()}
                    for look in log.history)  # fmt: skip
    return NoiseResult(
        texts, seeds, found(best, log.places), found(first, log.start), found(last, log.end), history, evaluations,
        seconds, settings, log.interrupted,
    )  # fmt: skip


class Log:
    """What is kept of a search: each prompt's best picture and its place, the first and last look, a line per look."""

    best: Seen
    first: Seen
    last: Seen
    places: Tensor

    def __init__(self, callback: Callable[[Progress], bool | None] | None) -> None:
        self.callback = callback
        self.history: list[dict[str, Any]] = []
        self.interrupted = False

    @property
    def start(self) -> Tensor:
        """Where the first look lies in the history, for each prompt."""
        number = next((place for place, look in enumerate(self.history) if look["ends"]), 0)
        return torch.full_like(self.places, number)

    @property
    def end(self) -> Tensor:
        """Where the last one does."""
        return torch.full_like(self.places, len(self.history) - 1)

    def follow(self, looks: Iterator[Seen]) -> None:
        """To the end, to Ctrl-C, or until the callback has seen enough; a first look there must be."""
        try:
            for seen in looks:
                self.add(seen)
                if self.callback and self.callback(Progress(len(self.history) - 1, seen, self.best)):
                    break
        except KeyboardInterrupt:
            if not self.history:
                raise
            self.interrupted = True

    def add(self, seen: Seen) -> None:
        """One more look. A look ahead is no picture of the model's: the first look that is one replaces it."""
        number = len(self.history)
        if number == 0 or (seen.ends and not self.best.ends):
            self.first = self.best = seen
            self.places = torch.full((len(seen.noise),), number, device=seen.noise.device)
        elif seen.ends == self.best.ends:
            won = improves(seen, self.best)
            self.places = torch.where(won, number, self.places)
            self.best = chosen(won, seen, self.best)
        self.last = seen
        norms = seen.noise.float().flatten(seen.noise.ndim - 3).norm(dim=-1)
        norm = norms if norms.ndim == 1 else norms.square().mean(1).sqrt()
        self.history.append({"total": seen.scores.total, **seen.scores.terms, "norm": norm, "ends": seen.ends})


def found(seen: Seen, places: Tensor) -> Found:
    """On the CPU."""
    noise, pixels, total = (value.float().cpu() for value in (seen.noise, seen.pixels, seen.scores.total))
    terms = {name: term.float().cpu() for name, term in seen.scores.terms.items()}
    return Found(noise, pixels, total, terms, places.cpu())
