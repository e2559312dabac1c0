"""The league's training data: pictures that each model draws itself, ranked by the verifier, in one file for all views.

Each line of metadata.jsonl is a caption of the training split with its pictures, best first, their scores, the caption
of what the worst one shows (for methods with two captions), and a map of where objects are (for region labels). So
pairs, lists, thumbs and captions are views of the same pictures.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from diffalign.assets import asset
from diffalign.generation import generate
from diffalign.pipelines import load_pipeline
from diffalign.pipelines.base import LatentPipeline
from diffalign.rewards.preprocess import to_pictures
from diffalign.shapes.describe import describe
from diffalign.shapes.grammar import Scene, sample_scenes
from diffalign.shapes.pairs import jpeg
from diffalign.shapes.verify import WORKING_SIZE, Seen, Verdict, verify
from diffalign.writing import write_text

CAPTIONS = 500
CANDIDATES = 4
GUIDANCE_SCALE = 3.0
SEED = 17
LISTS = "metadata.jsonl"
PAIRS = "pairs.jsonl"  # the same with best and worst alone, for labels of regions
GRID = 8  # cells of a side of the region map
# captions have a dozen words, tiny-sd3 was trained with 16 to 256 tokens, and with 256 a step takes three times as long
T5_TOKENS = {"tiny-sd3": 32}
BATCH = 24  # captions at a time


def loaded(model: str) -> LatentPipeline:
    """A shipped model as the league takes it."""
    return load_pipeline(model, max_sequence_length=T5_TOKENS.get(model))


def settings(model: str) -> str:
    """Hash of what the data follow from: the model's files, the captions and how pictures are drawn."""
    files = [path.read_bytes() for path in sorted(asset(model).rglob("*")) if path.is_file()]
    chosen = repr((CAPTIONS, CANDIDATES, GUIDANCE_SCALE, SEED, GRID))
    chosen += repr(T5_TOKENS[model]) if model in T5_TOKENS else ""
    return hashlib.sha256(b"".join([*files, chosen.encode()])).hexdigest()[:12]


def league_data(pipe: LatentPipeline, folder: Path, captions: int = CAPTIONS) -> Path:
    """Draws what is missing under `folder`, so that it can be interrupted; the file appears when all is there."""
    file = folder / LISTS
    if file.exists():
        return file
    folder.mkdir(parents=True, exist_ok=True)
    scenes = sample_scenes("train", captions, SEED)
    for start in range(0, captions, BATCH):
        part = folder / f"part-{start:05d}.jsonl"
        if not part.exists():
            lines = _drawn(pipe, scenes[start : start + BATCH], start, folder)
            write_text(part, "".join(json.dumps(line) + "\n" for line in lines))
            print(f"{folder}: {min(start + BATCH, captions)} of {captions} captions drawn", flush=True)
    whole = "".join(part.read_text() for part in sorted(folder.glob("part-*.jsonl")))
    write_text(folder / PAIRS, "".join(_best_and_worst(line) for line in whole.splitlines()))
    write_text(file, whole)
    return file


def _best_and_worst(line: str) -> str:
    row = json.loads(line)
    row["images"], row["scores"] = row["images"][:: CANDIDATES - 1], row["scores"][:: CANDIDATES - 1]
    return json.dumps(row) + "\n"


def _drawn(pipe: LatentPipeline, scenes: Sequence[Scene], start: int, folder: Path) -> list[dict[str, Any]]:
    prompts = [str(scene) for scene in scenes for _ in range(CANDIDATES)]
    seeds = [1_000_003 * SEED + start * CANDIDATES + i for i in range(len(prompts))]
    pixels = generate(pipe, prompts, seeds=seeds, batch_size=96, guidance_scale=GUIDANCE_SCALE)
    data = [jpeg(picture) for picture in to_pictures(pixels)]
    return [
        _line(scene, data[i * CANDIDATES : (i + 1) * CANDIDATES], f"{start + i:05d}", folder)
        for i, scene in enumerate(scenes)
    ]


def _line(scene: Scene, candidates: Sequence[bytes], name: str, folder: Path) -> dict[str, Any]:
    judged = [verify(np.asarray(Image.open(io.BytesIO(data))), scene) for data in candidates]
    order = sorted(range(len(candidates)), key=lambda i: -judged[i].score)
    files = [f"{name}-{place}.jpg" for place in range(len(order))]
    for file, index in zip(files, order, strict=True):
        (folder / file).write_bytes(candidates[index])
    best, worst = judged[order[0]], judged[order[-1]]
    return {
        "prompt": str(scene),
        "images": files,
        "scores": [judged[i].score for i in order],
        "prompt_loser": _caption_of(worst, scene),
        "regions": region_map([*best.seen, *worst.seen]),
    }


def _caption_of(verdict: Verdict, scene: Scene) -> str:
    """What the picture shows; where the grammar has no words for it, what was asked for."""
    return describe(verdict.seen) or str(scene)


def region_map(seen: Sequence[Seen]) -> list[list[int]]:
    """GRID rows of 1 where an object is and 0 elsewhere: the winner is better where there is something to be right."""
    cells = np.zeros((GRID, GRID), dtype=int)
    for one in seen:
        left, top, right, bottom = (side * GRID / WORKING_SIZE for side in one.box)
        cells[int(top) : int(np.ceil(bottom)), int(left) : int(np.ceil(right))] = 1
    return cells.tolist() if cells.any() else np.ones_like(cells).tolist()
