"""Variants of a real clip or picture that share its layout, and what `diffalign vary` does with them.

DenseDPO (Wu et al. 2025, arXiv 2506.03517) compares two of them, where plain DPO compares two clips from fresh noise,
of which the stiller one is often the cleaner one. A clip x is noised to a level and walked from there by the model,

    x_t = alpha(t) x + sigma(t) eps_i,    eps_i fresh for each variant

so what moves where is the clip's own, and the details are the model's. The paper noises to (1 - level) x + level eps
and walks the last round(level * steps) steps of its sampler, and says nothing of a shift; here the walk begins at the
time of the sampler's own grid that lies nearest to `level` on the noise axis, which is the same without a shift. Of a
diffusion model the level counts its times, as in SDEdit (arXiv 2108.01073).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffalign.claiming import claim_results
from diffalign.console import Result, progress_bar
from diffalign.data.images import resize_and_crop
from diffalign.data.records import BrokenRow
from diffalign.drawing import OWN_SIZE, Canvas, Sampling
from diffalign.drawn import PAGE, Player, save, write_players
from diffalign.generation import sample_latents
from diffalign.manifests import Entry
from diffalign.pipelines import load_pipeline
from diffalign.pipelines.attention import preferring
from diffalign.pipelines.base import LatentPipeline
from diffalign.pipelines.lora import load_lora
from diffalign.rewards.preprocess import as_shown
from diffalign.sampling import draw
from diffalign.seeds import mix
from diffalign.writing import write_text

PAIRS = "pairs.jsonl"  # two variants a row, equal scores: nobody has judged them yet


def times_from(pipe: LatentPipeline, steps: int, level: float) -> Tensor:
    """[k + 1] times of the sampler's grid from the one that is nearest to a level of noise on, 0 < k <= steps.

    Raises:
        ValueError: a level outside (0, 1], or steps that the model does not have.
    """
    if not 0 < level <= 1:
        raise ValueError(f"level: expected a share of the noise axis above 0 and at most 1, got {level}")
    times = pipe.times(steps)
    distance = (pipe.process.fraction(times[:-1]) - level).abs()
    return times[int(distance.argmin()) :]


@torch.no_grad()
def vary(
    pipe: LatentPipeline,
    latents: Tensor,
    prompts: Sequence[str],
    *,
    seeds: Sequence[int],
    level: float = 0.75,
    steps: int = 50,
    guidance_scale: float = 5.0,
) -> Tensor:
    """Latents [B, C, ...] of variants of as many latents, which follow from clip, prompt and seed.

    Args:
        level: of the noise, in (0, 1]: 0.75 keeps motion, 1 all but forgets the clip.
        steps: of a whole walk; about `level` of them are taken.

    Raises:
        ValueError: another number of prompts or seeds than of latents, a level outside (0, 1].
    """
    if not len(latents) == len(prompts) == len(seeds):
        raise ValueError(f"expected as many prompts and seeds as latents, got {len(prompts)} and {len(seeds)} for "
                         f"{len(latents)}")  # fmt: skip
    times = times_from(pipe, steps, level)
    noise = draw(tuple(latents.shape[1:]), [torch.Generator().manual_seed(seed) for seed in seeds])
    x_t = pipe.process.add_noise(latents, noise.to(latents.device), times[0].to(latents.device).expand(len(latents)))
    condition, negative = pipe.encode_prompts(prompts), pipe.encode_prompts([""] * len(prompts))
    return sample_latents(pipe, condition, negative, x_t, times, guidance_scale)


def vary_files(
    model: str,
    lora: str | None,
    entries: Sequence[Entry | BrokenRow],
    level: float,
    sampling: Sampling,
    out: Path,
    device: str,
    attention: str,
    canvas: Canvas = OWN_SIZE,
) -> Result:
    """Two variants of each clip (of a model of pictures each picture) in a folder of its own, and pairs.jsonl.

    What cannot be read, or is too short, is left out, named and counted. `canvas.fps` is the rate at which clips are
    seen, and that of the variants. A call that was cut off goes on where it was.

    Raises:
        ValueError: nothing that can be used, a folder that holds something else, or what model and canvas are refused
            for.
    """
    pipe = load_pipeline(model, device=device, attention=attention, max_sequence_length=sampling.max_sequence_length)
    times_from(pipe, sampling.steps, level)
    canvas.latent_shape(pipe)
    done = _done(out / PAIRS)
    claim_results(out, {"model": model, "lora": lora, "level": level, "sampling": asdict(sampling),
                        "canvas": asdict(canvas), "clips": _digest(entries)}, made=bool(done))  # fmt: skip
    if lora:
        load_lora(pipe, lora, scale=sampling.lora_scale)
    rows: list[dict[str, Any]] = []
    broken: list[BrokenRow] = []
    with progress_bar("varying", len(entries)) as advance, preferring(attention), (out / PAIRS).open("a") as file:
        for number, entry in enumerate(entries):
            advance(1)
            if number in done:
                rows.append(done[number])
                continue
            if isinstance(entry, BrokenRow):
                broken.append(entry)
                continue
            try:
                pixels = _pixels(entry, pipe, canvas)
            except ValueError as error:
                broken.append(BrokenRow(entry.where, str(error)))
                continue
            rows.append(_pair(pipe, entry, number, pixels, level, sampling, out, canvas.fps))
            file.write(json.dumps(rows[-1], ensure_ascii=False) + "\n")
            file.flush()
    return _result(pipe, model, level, out, rows, broken)


def _pair(
    pipe: LatentPipeline, entry: Entry, number: int, pixels: Tensor, level: float, sampling: Sampling, out: Path,
    fps: float,
) -> dict[str, Any]:  # fmt: skip
    """Draws and saves both variants; the row of pairs.jsonl."""
    kind, suffix = ("videos", "mp4") if pipe.clips else ("images", "png")
    seeds = [mix(sampling.seed, number, variant) for variant in (0, 1)]
    with torch.no_grad():
        mean = pipe.encode(pixels)[0].repeat_interleave(2, 0)
        latents = vary(pipe, mean, [entry.prompt] * 2, seeds=seeds, level=level, steps=sampling.steps,
                       guidance_scale=sampling.guidance_scale)  # fmt: skip
        drawn = as_shown(pipe.decode(latents).clamp(0, 1).cpu())
    names = [f"{number:05d}-{variant}.{suffix}" for variant in "ab"]
    save(drawn, [out / name for name in names], fps)
    return {"prompt": entry.prompt, kind: names, "scores": [0, 0], "of": entry.image, "number": number, "level": level,
            "seeds": seeds}  # fmt: skip


def _result(
    pipe: LatentPipeline, model: str, level: float, out: Path, rows: Sequence[dict[str, Any]],
    broken: Sequence[BrokenRow],
) -> Result:  # fmt: skip
    if not rows:
        raise ValueError(f"nothing to vary: {broken[0].source}: {broken[0].reason}" if broken else "nothing to vary")
    found = {"folder": str(out), "pairs": rows, "broken": [vars(row) for row in broken]}
    text = f"{len(rows)} pairs in {out / PAIRS}"
    text += f"; {len(broken)} left out, the first {broken[0].source}: {broken[0].reason}" if broken else ""
    if pipe.clips:
        groups = [(row["prompt"], [Player(name, f"seed {seed}") for name, seed in
                                   zip(row["videos"], row["seeds"], strict=True)]) for row in rows]  # fmt: skip
        write_players(out / PAGE, f"Variants by {model}, level {level:g}", groups)
        text += f"\nlook: {out / PAGE}; label: diffalign label-segments {out / PAIRS} --out FILE.jsonl"
    return Result(found, text)


def _done(file: Path) -> dict[int, dict[str, Any]]:
    """Rows of an earlier call, by the place of their clip; what a kill left of the last one is cut off."""
    if not file.is_file():
        return {}
    text = file.read_text(encoding="utf-8")
    if not text.endswith("\n"):
        write_text(file, text[: text.rfind("\n") + 1])
    rows = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
    return {int(row["number"]): row for row in rows}


def _digest(entries: Sequence[Entry | BrokenRow]) -> str:
    """Of what is varied, in order."""
    named = [(entry.image, entry.prompt) if isinstance(entry, Entry) else entry.source for entry in entries]
    return hashlib.sha256(json.dumps(named).encode()).hexdigest()[:16]


def _pixels(entry: Entry, pipe: LatentPipeline, canvas: Canvas) -> Tensor:
    """fp32 [1, 3, H, W] in [0, 1] of a picture, [1, F, 3, H, W] of a clip."""
    *_, height, width = (side * pipe.pixels_a_latent for side in canvas.latent_shape(pipe))
    if not pipe.clips:
        return resize_and_crop(entry.source.decode(entry.image), (height, width))[None].float() / 255
    pictures = entry.source.clip(entry.image, pipe.frames_of(canvas.num_frames), canvas.fps)
    return torch.stack([resize_and_crop(picture, (height, width)) for picture in pictures])[None].float() / 255
