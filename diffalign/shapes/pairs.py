"""Makes assets/shapes-pairs.parquet: preference pairs that tiny-sd draws itself and the verifier ranks.

    python -m diffalign.shapes.pairs --model assets/tiny-sd --out assets/shapes-pairs.parquet

Several pictures per training caption; the best and the worst by the verifier's score become a pair, equal ones a tie
(0.5). The file has Pick-a-Pic v2's own columns, so that the demo walks the path that real data takes.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import random
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from diffalign.generation import generate
from diffalign.pipelines import load_pipeline
from diffalign.rewards.preprocess import to_pictures
from diffalign.shapes.grammar import Scene, sample_scenes
from diffalign.shapes.verify import verify
from diffalign.writing import replacing

EPOCH = datetime(2026, 1, 1, tzinfo=UTC)  # a fixed time, so that the same command writes the same bytes


def jpeg(picture: Image.Image) -> bytes:
    """The bytes that ship, and that the verifier ranks: what it judged is what a reader gets."""
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=90, optimize=True)
    return buffer.getvalue()


def row(index: int, scene: Scene, candidates: Sequence[bytes], rng: random.Random, model: str) -> dict[str, Any]:
    """One line of the file: best against worst of the candidates, in random order; 0.5 for both when all are equal."""
    scores = [verify(np.asarray(Image.open(io.BytesIO(data))), scene).score for data in candidates]
    ranked = sorted(range(len(candidates)), key=lambda i: (-scores[i], i))
    first, second = rng.sample([ranked[0], ranked[-1]], 2)
    label = 0.5 if scores[first] == scores[second] else float(scores[first] > scores[second])
    data = candidates[first], candidates[second]
    uids = [hashlib.sha256(f"{index}/{i}".encode() + one).hexdigest()[:36] for i, one in enumerate(data)]
    return {
        "are_different": label != 0.5,
        "best_image_uid": "tie" if label == 0.5 else uids[0] if label == 1 else uids[1],
        "caption": str(scene),
        "created_at": EPOCH,
        "has_label": True,
        "image_0_uid": uids[0],
        "image_0_url": "",
        "image_1_uid": uids[1],
        "image_1_url": "",
        "jpg_0": data[0],
        "jpg_1": data[1],
        "label_0": label,
        "label_1": 1 - label,
        "model_0": model,
        "model_1": model,
        "ranking_id": index,
        "user_id": 0,
        "num_example_per_prompt": 1,
        "__index_level_0__": index,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny-sd")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--pairs", type=int, default=1500)
    parser.add_argument("--candidates", type=int, default=4, help="pictures drawn per caption")
    parser.add_argument("--guidance-scale", type=float, default=7.5)
    parser.add_argument("--max-ties", type=float, default=0.2, help="share of ties that are kept")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    pipe, rng = load_pipeline(args.model), random.Random(args.seed)
    rows: list[dict[str, Any]] = []
    ties_left = int(args.pairs * args.max_ties)
    # more captions than pairs: surplus ties are dropped
    scenes = sample_scenes("train", 2 * args.pairs, args.seed)
    per_batch = max(1, args.batch // args.candidates)
    for start in range(0, len(scenes), per_batch):
        if len(rows) >= args.pairs:
            break
        part = scenes[start : start + per_batch]
        prompts = [str(scene) for scene in part for _ in range(args.candidates)]
        seeds = [args.seed * 1_000_003 + start * args.candidates + i for i in range(len(prompts))]
        pixels = generate(pipe, prompts, seeds=seeds, batch_size=args.batch, guidance_scale=args.guidance_scale)
        data = [jpeg(picture) for picture in to_pictures(pixels)]
        for index, scene in enumerate(part):
            some = data[index * args.candidates : (index + 1) * args.candidates]
            line = row(len(rows), scene, some, rng, "tiny-sd")
            tie = line["label_0"] == 0.5
            if len(rows) < args.pairs and (not tie or ties_left > 0):
                ties_left -= tie
                rows.append(line)
        print(f"{len(rows)} of {args.pairs} pairs, labels {dict(Counter(r['label_0'] for r in rows))}", flush=True)
    write(rows, args.out)


def write(rows: list[dict[str, Any]], path: Path) -> None:
    """Parquet, in one piece."""
    with replacing(path) as partial:
        pq.write_table(pa.Table.from_pylist(rows), partial, compression="zstd", row_group_size=256)
    print(f"{path}: {len(rows)} rows, {path.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
