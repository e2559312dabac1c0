"""What preference learning does to motion: vanilla DPO, StructuralDPO and DenseDPO on tiny-video, at equal labels.

    make league-video                                        # what has not run yet, then the page
    python -m benchmarks.league_video --model runs/tiny-video --rows densedpo --seeds 0
    python -m benchmarks.league_video --page

Two sets of pairs of the same captions, drawn once: `fresh`, two clips from noise, and `structural`, two variants of a
clip that was rendered, noised to 0.75. The labels are of looks alone, as those are that people give who prefer a clean
clip: in each third of a clip the verifier of pictures looks at its frames, and never at what moves. Each row trains for
at most BUDGET evaluations of the network, and draws held-out captions from the same noise as the base: how many do what
they are told, how far objects go, how often a frame loses the scene. A row is one JSON file under docs/league/video.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from benchmarks.league import BUDGET, probed, trained
from benchmarks.league_video_page import COLUMNS_OF, write_page
from diffalign.data.readers import read_jsonl
from diffalign.generation import generate
from diffalign.labeling.segments import label_segments
from diffalign.pipelines import load_pipeline, locate
from diffalign.pipelines.base import LatentPipeline
from diffalign.pipelines.lora import load_lora
from diffalign.rewards.preprocess import as_shown
from diffalign.seeds import mix
from diffalign.shapes.clips import render_clip
from diffalign.shapes.motion import MovingScene, parse_moving, sample_moving
from diffalign.shapes.verify import verify
from diffalign.shapes.verify_clip import dynamic_degree, flicker, verify_clip
from diffalign.structural import vary
from diffalign.writing import write_json, write_text

PAIRS, SEGMENTS, LEVEL = 400, 3, 0.75
DRAWS, GUIDANCE, STEPS, SEED_OF_DRAWS = 300, 5.0, 20, 70_000
GUIDANCE_OF_PAIRS, SEED = 3.0, 23
BATCH = 20  # captions at a time
SEEDS = (0, 1, 2)
FOLDER = Path("docs/league/video")
ROWS = {"vanilla dpo": ("dpo", "fresh"), "structuraldpo": ("dpo", "structural"), "densedpo": ("densedpo", "structural")}
SETTINGS: dict[str, Any] = {
    "lora": {"rank": 16}, "train_batch_size": 16, "learning_rate": 3e-4, "ema_decay": 0.98, "max_sequence_length": 16,
    "validation_prompts": [], "report_to": "none", "checkpointing_steps": 1_000_000,
}  # fmt: skip
METHOD = {"beta": 100, "time_low": 0.5}


class Looks:
    """Prefers the clip whose frames show what the caption says is there, whatever moves."""

    workers = 1

    def prefer(self, a: Tensor, b: Tensor, prompt: str) -> float:
        scene = parse_moving(prompt).scene
        first, second = (float(np.mean([verify(frame, scene).score for frame in frames_of(clip)])) for clip in (a, b))
        return 0.5 if abs(first - second) < 1e-6 else float(first > second)


def frames_of(clip: Tensor) -> np.ndarray:
    """uint8 [F, H, W, 3] of a clip [F, 3, H, W]."""
    return clip.permute(0, 2, 3, 1).numpy()


@dataclass(frozen=True)
class Job:
    """The model and what is drawn with it; small in tests."""

    model: str
    work: Path
    side: int = 64
    frames: int = 9
    pairs: int = PAIRS
    draws: int = DRAWS
    budget: int = BUDGET
    steps: int = STEPS
    tokens: int = int(SETTINGS["max_sequence_length"])

    def load(self) -> LatentPipeline:
        """The model as the league takes it."""
        return load_pipeline(self.model, max_sequence_length=self.tokens)

    def drawn(self, pipe: LatentPipeline, prompts: Sequence[str], seeds: Sequence[int], guidance: float) -> Tensor:
        """Clips [N, F, 3, H, W] from noise."""
        return generate(pipe, prompts, seeds=seeds, steps=self.steps, guidance_scale=guidance, batch_size=2 * BATCH,
                        height=self.side, width=self.side, num_frames=self.frames)  # fmt: skip

    @property
    def key(self) -> str:
        """Hash of what rows follow from, beside the code of a run."""
        files = [path.read_bytes() for path in sorted(Path(locate(self.model)).rglob("*")) if path.is_file()]
        chosen = {**asdict(self), "model": "", "work": "", "settings": SETTINGS, "method": METHOD, "level": LEVEL,
                  "seed": SEED, "guidance": (GUIDANCE, GUIDANCE_OF_PAIRS)}  # fmt: skip
        return hashlib.sha256(b"".join([*files, repr(sorted(chosen.items())).encode()])).hexdigest()[:12]


def pairs_of(job: Job, kind: str) -> Path:
    """The labeled pairs of one kind; a call that was cut off goes on."""
    folder = job.work / f"pairs-{job.key}"
    labels = folder / f"{kind}.jsonl"
    if labels.exists():
        return labels
    folder.mkdir(parents=True, exist_ok=True)
    pipe, scenes = job.load(), sample_moving("train", job.pairs, SEED)
    parts = []
    for start in range(0, len(scenes), BATCH):
        parts.append(folder / f"{kind}-{start:05d}.jsonl")
        if not parts[-1].exists():
            lines = _drawn_pairs(job, pipe, kind, scenes[start : start + BATCH], start, folder)
            write_text(parts[-1], "".join(json.dumps(line) + "\n" for line in lines))
            print(f"{kind}: {start + len(lines)} of {len(scenes)} pairs drawn", flush=True)
    unlabeled = folder / f"{kind}-all.jsonl"
    write_text(unlabeled, "".join(part.read_text() for part in parts))
    print(label_segments(read_jsonl(str(unlabeled)), Looks(), SEGMENTS, labels, {"looks": 1}).text, flush=True)
    return labels


@torch.no_grad()
def _drawn_pairs(
    job: Job, pipe: LatentPipeline, kind: str, scenes: Sequence[MovingScene], start: int, folder: Path
) -> list[dict[str, Any]]:
    prompts = [str(scene) for scene in scenes for _ in range(2)]
    seeds = [mix(SEED, start, row) for row in range(len(prompts))]
    if kind == "fresh":
        pixels = job.drawn(pipe, prompts, seeds, GUIDANCE_OF_PAIRS)
    else:
        real = np.stack([render_clip(scene, random.Random(mix(SEED, start, row, 1)), job.frames, job.side)
                         for row, scene in enumerate(scenes)])  # fmt: skip
        mean = pipe.encode(torch.from_numpy(real).permute(0, 1, 4, 2, 3).float() / 255)[0].repeat_interleave(2, 0)
        latents = vary(pipe, mean, prompts, seeds=seeds, level=LEVEL, steps=job.steps, guidance_scale=GUIDANCE_OF_PAIRS)
        pixels = pipe.decode(latents)
    shown = as_shown(pixels.clamp(0, 1))
    names = [f"{kind}-{start + row // 2:05d}-{'ab'[row % 2]}" for row in range(len(prompts))]
    for name, clip in zip(names, shown, strict=True):
        _save(clip, folder / name)
    return [{"prompt": str(scene), "videos": names[2 * row : 2 * row + 2], "scores": [0, 0]}
            for row, scene in enumerate(scenes)]  # fmt: skip


def _save(clip: Any, folder: Path) -> None:
    """As pictures without loss, since H.264 blurs colors over their edges."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for number, frame in enumerate(frames_of(clip)):
        Image.fromarray(frame).save(folder / f"{number}.png")


def judged(job: Job, lora: Path | None) -> dict[str, list[float]]:
    """Columns of `COLUMNS_OF`, one value a held-out caption; None (for no number) where no object is seen."""
    pipe, scenes = job.load(), sample_moving("heldout", job.draws, seed=0)
    if lora:
        load_lora(pipe, lora)
    seeds = range(SEED_OF_DRAWS, SEED_OF_DRAWS + len(scenes))
    pixels = job.drawn(pipe, [str(scene) for scene in scenes], seeds, GUIDANCE)
    found: dict[str, list[float]] = {name: [] for name in COLUMNS_OF}
    for clip, scene in zip(as_shown(pixels), scenes, strict=True):
        verdict = verify_clip(frames_of(clip), scene)
        motion = dynamic_degree(verdict)
        row = {"pass": float(verdict.ok), "frames": float(np.mean([frame.ok for frame in verdict.frames])),
               "motion": None if np.isnan(motion) else round(motion, 3), "flicker": flicker(verdict)}  # fmt: skip
        for name, value in row.items():
            found[name].append(round(value, 4) if value is not None else value)
    return found


def row(job: Job, name: str, seed: int | None, folder: Path, again: bool) -> None:
    """One file; `base` has no seed."""
    file = folder / "rows" / (f"{name.replace(' ', '-')}" + ("" if seed is None else f"-{seed}") + ".json")
    if not again and file.exists() and json.loads(file.read_text())["key"] == job.key:
        return
    told: dict[str, Any] = {"row": name, "seed": seed, "key": job.key}
    lora = None
    if seed is not None:
        method, kind = ROWS[name]
        config = {"pretrained_model_name_or_path": job.model, **SETTINGS, "resolution": job.side, "seed": seed,
                  "num_frames": job.frames, "max_sequence_length": job.tokens, "cache_dir": str(job.work / "cache"),
                  "data": {"name": "jsonl", "path": str(pairs_of(job, kind)), "val_fraction": 0},
                  "method": {"name": method, **METHOD}}  # fmt: skip
        out = job.work / f"{name.replace(' ', '-')}-{seed}"
        probe = probed(config, [], out.with_name(out.name + "-probe"), job.budget)
        run = trained(config, [], probe.steps, out)
        lora = run.folder
        told |= {"steps": probe.steps, "evaluations": run.evaluations, "seconds": round(run.seconds, 1)}
    write_json(file, {**told, "found": judged(job, lora)})
    print(f"{name} {'' if seed is None else seed}: done", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny-video")
    parser.add_argument("--rows", nargs="*", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--seeds", nargs="*", type=int, default=list(SEEDS))
    parser.add_argument("--work", type=Path, default=Path("runs/league-video"))
    parser.add_argument("--again", action="store_true", help="also rows that are there")
    parser.add_argument("--page", action="store_true", help="only the page")
    args = parser.parse_args()
    if not args.page:
        job = Job(args.model, args.work)
        row(job, "base", None, FOLDER, args.again)
        for seed in args.seeds:
            for name in args.rows:
                row(job, name, seed, FOLDER, args.again)
                write_page(FOLDER)
    write_page(FOLDER)


if __name__ == "__main__":
    main()
