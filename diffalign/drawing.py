"""What `diffalign generate` does: pictures or clips as files, and a list of them that `diffalign score` reads."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from diffalign.console import Result, progress_bar
from diffalign.drawn import FPS, PAGE, Player, refuse_unplayable, save, write_players
from diffalign.generation import generate
from diffalign.pipelines import load_pipeline
from diffalign.pipelines.attention import preferring
from diffalign.pipelines.base import LatentPipeline
from diffalign.pipelines.lora import load_lora
from diffalign.pipelines.user_adapter import load_user_adapter
from diffalign.prompts import Prompt
from diffalign.rewards.preprocess import as_shown
from diffalign.users import load_user
from diffalign.writing import write_text

LISTING = "generations.jsonl"  # image (or video), prompt and seed per line


@dataclass(frozen=True)
class Sampling:
    """How pictures are drawn; `seed` is that of the first, and the next have the next ones."""

    steps: int
    guidance_scale: float
    seed: int
    batch_size: int
    lora_scale: float = 1.0
    max_sequence_length: int | None = None


@dataclass(frozen=True)
class Canvas:
    """What the command line draws on; None is the model's own. `num_frames` are of clips, which are shown at `fps`.

    Raises:
        ValueError: an `fps` that nothing plays.
    """

    height: int | None = None
    width: int | None = None
    num_frames: int | None = None
    fps: float = FPS

    def __post_init__(self) -> None:
        refuse_unplayable(self.fps)

    def latent_shape(self, pipe: LatentPipeline) -> tuple[int, ...]:
        """Of one picture or clip; raises ValueError for a size that the model cannot draw."""
        return pipe.latent_shape(self.height, self.width, self.num_frames)


OWN_SIZE = Canvas()


@dataclass(frozen=True)
class Told:
    """Whom pictures are for, as the command line names it: a user adapter, and a user's file or name."""

    adapter: str | None = None
    user: str | None = None

    def tokens(self) -> Tensor | None:
        """[N, D] of the user, or None where none is named.

        Raises:
            ValueError: one of the two without the other, or a user who is not there.
        """
        if (self.adapter is None) != (self.user is None):
            raise ValueError("--user-adapter and --user go together: whom to draw for, and the adapter that knows how")
        return None if self.user is None else load_user(self.user, self.adapter)


NOBODY = Told()


def draw_pictures(
    model: str,
    lora: str | None,
    prompts: Sequence[Prompt],
    images_each: int,
    sampling: Sampling,
    out: Path,
    device: str,
    attention: str,
    told: Told = NOBODY,
    canvas: Canvas = OWN_SIZE,
) -> Result:
    """Pictures 00000.png ... or clips 00000.mp4 ... in a new or empty folder, with a list of prompts and seeds.

    Clips have their frames side by side in sheets/, and index.html plays them.

    Raises:
        ValueError: numbers below 1, a folder that holds something, or what model, LoRA and canvas are refused for.
    """
    if images_each < 1 or sampling.batch_size < 1:
        raise ValueError("expected --num-images and --batch-size of at least 1")
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise ValueError(f"{out}: expected a new or empty folder; it holds something already, choose another --out")
    user = told.tokens()
    pipe = load_pipeline(model, device=device, attention=attention, max_sequence_length=sampling.max_sequence_length)
    canvas.latent_shape(pipe)
    if lora:
        load_lora(pipe, lora, scale=sampling.lora_scale)
    if told.adapter:
        load_user_adapter(pipe, told.adapter)
    kind, suffix = ("video", "mp4") if pipe.clips else ("image", "png")
    texts = [prompt.text for prompt in prompts for _ in range(images_each)]
    rows: list[dict[str, Any]] = [
        {kind: f"{i:05d}.{suffix}", "prompt": text, "seed": sampling.seed + i} for i, text in enumerate(texts)
    ]
    out.mkdir(parents=True, exist_ok=True)
    with progress_bar("drawing", len(rows)) as advance, preferring(attention):
        for start in range(0, len(rows), sampling.batch_size):
            some = rows[start : start + sampling.batch_size]
            pixels = generate(
                pipe,
                [row["prompt"] for row in some],
                seeds=[row["seed"] for row in some],
                steps=sampling.steps,
                guidance_scale=sampling.guidance_scale,
                batch_size=len(some),
                height=canvas.height,
                width=canvas.width,
                num_frames=canvas.num_frames,
                user=user,
            )
            save(as_shown(pixels), [out / row[kind] for row in some], canvas.fps)
            advance(len(some))
    write_text(out / LISTING, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    found = {"folder": str(out), f"{kind}s": rows}
    if not pipe.clips:
        return Result(found, f"{len(rows)} pictures in {out}, listed in {out / LISTING}")
    players = [Player(row["video"], f"seed {row['seed']}") for row in rows]
    groups = [(prompt.text, players[i * images_each : (i + 1) * images_each]) for i, prompt in enumerate(prompts)]
    title = f"Clips of {model}" + (f" with {lora}" if lora else "")
    write_players(out / PAGE, title, groups)
    return Result(found, f"{len(rows)} clips in {out}, listed in {out / LISTING}; look at {out / PAGE}")
