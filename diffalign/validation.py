"""What a run is asked besides training: the step-0 identity, held-out pairs, pictures of fixed prompts and seeds."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from PIL import Image
from torch import Tensor

from diffalign.cache import Cache
from diffalign.config import RunConfig
from diffalign.distributed import gathered_rows, in_turns, own_rows
from diffalign.episodes import Replays
from diffalign.generation import sample_latents
from diffalign.methods.base import Batch, Method, Need, Noised, Run
from diffalign.pipelines.attention import preferring
from diffalign.pipelines.base import LatentPipeline
from diffalign.pipelines.lora import adapters_disabled
from diffalign.pipelines.user_attention import for_nobody, with_user
from diffalign.rewards import load_rewards
from diffalign.rewards.clips import spread
from diffalign.rewards.preprocess import as_shown
from diffalign.sampling import draw
from diffalign.telemetry import looks
from diffalign.tracking import Averages, grid

log = logging.getLogger("diffalign")

DrawSamples = Callable[[LatentPipeline, Path], dict[str, float]]


@torch.no_grad()
def check_identity(config: RunConfig, method: Method, run: Run, noised: Noised) -> None:
    """Policy and reference are the same weights before the first step: they must say the same, to the bit in fp32.

    Compiled they are two programs, which round differently. Skipped, and said so, with `init_lora` or another reference
    than the same weights. A rollout's replay must give the log-probability that the rollout had.

    Raises:
        RuntimeError: by how much they differ, and the usual causes.
        ValueError: a selection by margin of a method that has none.
    """
    _refuse_without_logit(config, method, run, noised)
    check_replay(config, method, run, noised)
    if run.reference is None or Need.REFERENCE not in method.needs:
        return
    if config.init_lora and config.reference_name == "adapter_off":
        log.info("step-0 identity not checked: init_lora starts away from the reference")
        return
    theirs = run.reference(noised.x_t, noised.t, noised.condition)
    ours = run.policy(noised.x_t, noised.t, noised.condition)
    difference = (ours - theirs).square().mean().sqrt().item()
    scale = theirs.square().mean().sqrt().item()
    allowed = scale * (1e-2 if config.mixed_precision != "no" else 1e-5 if config.compile else 0.0)
    if not difference <= allowed:
        raise RuntimeError(
            f"step-0 identity: policy and reference are the same weights and must agree, but their outputs differ by "
            f"{difference:.3g} rms (outputs {scale:.3g} rms, allowed {allowed:.3g}). Usual causes: dropout in the "
            f"policy, an adapter that is not fresh, another dtype or attention kernel for one of the two"
        )
    log.info("step-0 identity holds: policy and reference differ by %.3g rms (allowed %.3g)", difference, allowed)


def check_replay(config: RunConfig, method: Method, run: Run, noised: Noised) -> None:
    """The ratio of a replayed step to the rollout is 1 before the first update.

    Raises:
        RuntimeError: by how much it is not, and the usual causes.
    """
    if not isinstance(method, Replays):
        return
    new = method.explorer.law(run, run.policy, noised).log_prob(noised.y)
    off = (new - noised.aux["log_prob"]).expm1().abs().max().item()
    allowed = 1e-3 if config.mixed_precision != "no" or config.compile else 1e-6
    if not off <= allowed:
        raise RuntimeError(
            f"replay: before the first update a step's ratio to its rollout must be 1, and it is off by {off:.3g} "
            f"(allowed {allowed:.3g}). Usual causes: dropout, a network that rounds otherwise in batches of another "
            f"size, or a guidance that differs between rollout and replay"
        )
    log.info("replay holds: ratios to the rollout are 1 to %.3g (allowed %.3g)", off, allowed)


def _refuse_without_logit(config: RunConfig, method: Method, run: Run, noised: Noised) -> None:
    if config.selection["name"] != "margin":
        return
    if "h" not in method.loss(run, noised).metrics:
        raise ValueError(f"selection: margin goes by the logit h of pairs, and method {config.method_name!r} has none: "
                         f"set selection: {{name: all}}, or a method of pairs such as dpo")  # fmt: skip


def held_out_metrics(
    method: Method, run_of: Callable[[int], Run], batches: Iterable[Batch], accelerator: Accelerator
) -> dict[str, float]:
    """`validation/...` means of the loss and its metrics over held-out batches, which the ranks deal out.

    `run_of(number)` is the run of one batch: its noise follows from the number, so it is the same at every validation.
    """
    averages = Averages()
    for number, batch, counts in in_turns(batches, accelerator):
        run = run_of(number)
        for noised in method.prepare(run, batch):
            loss = method.loss(run, noised)
            if counts:
                averages.add({"loss": loss.value, **loss.metrics}, loss.time)
    return {f"validation/{name}": value for name, value in averages.pop(gather_object).items()}


def logits(method: Method, run_of: Callable[[int], Run], batches: Iterable[Batch], accelerator: Accelerator) -> Tensor:
    """[N] h of every example of these batches, in order, on the CPU on every rank.

    Raises:
        ValueError: a method that has no logit.
    """
    own: dict[int, Tensor] = {}
    for number, batch, counts in in_turns(batches, accelerator):
        run = run_of(number)
        found = [method.loss(run, noised).metrics.get("h") for noised in method.prepare(run, batch)]
        values = [h.float().cpu() for h in found if h is not None]
        if not values:
            raise ValueError("selection: margin goes by the logit h of pairs, and this method has none")
        if counts:
            own[number] = torch.stack(values).mean(0)
    parts = {number: h for some in gather_object([own]) for number, h in some.items()}
    return torch.cat([parts[number] for number in sorted(parts)])


def drawn_extent(config: RunConfig) -> tuple[int | None, ...]:
    """(height, width) of the pictures of validation, the model's own where the config gives none; of clips those of the
    crop, and their frames.
    """
    if config.num_frames is None:
        return config.height, config.width
    return config.extent


def sheet(pixels: Tensor, most: int = 8) -> Image.Image:
    """Pictures [N, 3, H, W] in [0, 1] row by row; of clips [N, F, 3, H, W] a row each, some of its frames."""
    if pixels.ndim == 4:
        return grid(pixels, columns=min(most, len(pixels)))
    taken = spread(pixels.shape[1], most)
    return grid(pixels[:, taken].flatten(0, 1), columns=len(taken))


def sample_drawer(
    pipe: LatentPipeline, cache: Cache, config: RunConfig, accelerator: Accelerator,
    users: Mapping[str, Tensor] | None = None,
) -> DrawSamples:  # fmt: skip
    """A function that draws the validation prompts from fixed noise, saves them as one grid, and scores them.

    Every rank draws and scores its share, so all must call it. It returns means of what `looks` measures, for a LoRA
    with the drift from the base model's pictures, which the first call draws, and of each of the config's rewards. It
    keeps the VAE alive when there is something to draw; without validation prompts nothing is kept. With users [N, D]
    by name, each picture is drawn for the next one.
    """
    count = len(config.validation_prompts)
    if not count:
        return lambda trained, path: {}
    rows = own_rows(count, accelerator)
    prompts = [config.validation_prompts[row] for row in rows]
    rewards = load_rewards(config.rewards, device=accelerator.device) if config.rewards else None
    decoder, times = pipe.decoder(), pipe.times(config.num_inference_steps)
    shape = pipe.latent_shape(*drawn_extent(config))
    noise = draw(shape, [torch.Generator().manual_seed(config.validation_seed + row) for row in rows])
    tokens = torch.stack([users[sorted(users)[row % len(users)]] for row in rows]) if users else None
    condition = with_user(cache.condition(prompts), tokens)
    negative = for_nobody(cache.condition([""] * len(prompts)), tokens)

    base: list[Tensor] = []

    def drawn(by: LatentPipeline) -> Tensor:
        latents = sample_latents(by, condition, negative, noise, times, config.guidance_scale)
        return decoder(latents).clamp(0, 1).cpu()

    def draw_samples(trained: LatentPipeline, path: Path) -> dict[str, float]:
        if not base and config.train != "full":
            with adapters_disabled(trained):
                base.append(drawn(trained))
        pixels = drawn(trained)
        levels = gathered_rows(rows, (pixels * 255).round().byte(), count)
        if accelerator.is_main_process:
            path.parent.mkdir(exist_ok=True)
            sheet(levels / 255).save(path)
        found = {f"pictures/{name}": value for name, value in looks(pixels, *base).items()}
        if rewards is not None:
            with preferring(config.attention):
                rewards(as_shown(pixels), prompts)
            found |= {f"reward/{name}": score for name, score in rewards.terms.items()}
        return {f"validation/{name}": gathered_rows(rows, row, count).nanmean().item() for name, row in found.items()}

    return draw_samples
