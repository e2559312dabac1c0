"""The commands that draw: `diffalign generate`, `vary` and `evaluate`.

Registered by `diffalign.cli`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from diffalign.cli_options import (
    Attention,
    BatchSize,
    Device,
    Fps,
    Guidance,
    Height,
    Json,
    Lora,
    LoraScale,
    MaxSequenceLength,
    Model,
    NumFrames,
    Prompt,
    Prompts,
    Reward,
    Set,
    Steps,
    User,
    UserAdapter,
    Weights,
    Width,
)
from diffalign.console import show, working


def generate(
    model: Model = "tiny-sd",
    lora: Lora = None,
    lora_scale: LoraScale = 1.0,
    user_adapter: UserAdapter = None,
    user: User = None,
    prompt: Prompt = None,
    prompts: Prompts = None,
    num_images: Annotated[int, typer.Option(help="Pictures per prompt.")] = 1,
    seed: Annotated[int, typer.Option(help="Of the first picture; each next one has the next seed.")] = 0,
    steps: Steps = 20,
    guidance_scale: Guidance = 7.5,
    batch_size: BatchSize = 16,
    out: Annotated[Path, typer.Option(help="A new or empty folder.")] = Path("runs/generated"),
    height: Height = None,
    width: Width = None,
    num_frames: NumFrames = None,
    fps: Fps = 16.0,
    max_sequence_length: MaxSequenceLength = None,
    device: Device = None,
    attention: Attention = "auto",
    as_json: Json = False,
) -> None:
    """Draw pictures or clips of prompts."""
    with working():
        from diffalign import arguments, drawing

        rows = arguments.read_prompt_options(prompt or [], prompts)
        sampling = drawing.Sampling(steps, guidance_scale, seed, batch_size, lora_scale, max_sequence_length)
        place, told = arguments.default_device(device), drawing.Told(user_adapter, user)
        canvas = drawing.Canvas(height, width, num_frames, fps)
        result = drawing.draw_pictures(model, lora, rows, num_images, sampling, out, place, attention, told, canvas)
    show(result, as_json)


def vary(
    clips: Annotated[list[str], typer.Argument(help="Clips (or pictures) with prompts: a folder, or a manifest.")],
    model: Model = "tiny-sd",
    lora: Lora = None,
    lora_scale: LoraScale = 1.0,
    level: Annotated[float, typer.Option(help="Of the noise, 0 to 1: 0.75 keeps what moves where.")] = 0.75,
    prompt: Prompt = None,
    prompts: Prompts = None,
    seed: Annotated[int, typer.Option(help="Of all noise.")] = 0,
    steps: Annotated[int, typer.Option(help="Of a whole walk, of which a share of `level` is taken.")] = 50,
    guidance_scale: Guidance = 5.0,
    height: Height = None,
    width: Width = None,
    num_frames: NumFrames = None,
    fps: Fps = 16.0,
    out: Annotated[Path, typer.Option(help="A new or empty folder.")] = Path("runs/varied"),
    max_sequence_length: MaxSequenceLength = None,
    device: Device = None,
    attention: Attention = "auto",
    as_json: Json = False,
) -> None:
    """Draw two variants of each clip that share what moves where: structural pairs, as DenseDPO compares them."""
    with working():
        from diffalign import arguments, drawing, structural

        entries = list(arguments.read_pictures(clips, prompt or [], prompts))
        sampling = drawing.Sampling(steps, guidance_scale, seed, 2, lora_scale, max_sequence_length)
        canvas = drawing.Canvas(height, width, num_frames, fps)
        result = structural.vary_files(model, lora, entries, level, sampling, out, arguments.default_device(device),
                                       attention, canvas)  # fmt: skip
    show(result, as_json)


def evaluate(
    model: Model = "tiny-sd",
    lora: Lora = None,
    lora_scale: LoraScale = 1.0,
    user_adapter: UserAdapter = None,
    user: User = None,
    prompt: Prompt = None,
    prompts: Prompts = None,
    reward: Reward = None,
    weights: Weights = None,
    settings: Set = None,
    seeds: Annotated[int, typer.Option(help="Pictures per prompt.")] = 1,
    seed: Annotated[int, typer.Option(help="Of the first picture.")] = 0,
    steps: Steps = 20,
    guidance_scale: Guidance = 7.5,
    batch_size: BatchSize = 16,
    height: Height = None,
    width: Width = None,
    num_frames: NumFrames = None,
    fps: Fps = 16.0,
    out: Annotated[Path | None, typer.Option(help="A new or empty folder for pictures and evaluation.json.")] = None,
    max_sequence_length: MaxSequenceLength = None,
    device: Device = None,
    attention: Attention = "auto",
    as_json: Json = False,
) -> None:
    """Compare a model with the same model under a LoRA: mean rewards, gains and win rates with intervals."""
    with working():
        from diffalign import arguments, commands, drawing

        place = arguments.default_device(device)
        rows = arguments.read_prompt_options(prompt or [], prompts)
        rewards = arguments.read_rewards(reward or [], weights or [], settings or [], place)
        sampling = drawing.Sampling(steps, guidance_scale, seed, batch_size, lora_scale, max_sequence_length)
        told = drawing.Told(user_adapter, user)
        canvas = drawing.Canvas(height, width, num_frames, fps)
        result = commands.compare_models(model, lora, rows, rewards, seeds, sampling, out, place, attention, told,
                                         canvas)  # fmt: skip
    show(result, as_json)
