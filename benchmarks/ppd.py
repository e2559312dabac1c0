"""Two users with opposite tastes in one run: does each get what it likes, and not what the other likes?

    python -m benchmarks.ppd --out runs/ppd

One user likes light pictures, the other dark ones; both judged the same rendered pairs of training captions (one scene
twice, on a light and on a dark background), so nothing but the user says which is to win. tiny-sd/ppd trains on both at
once. Then held-out captions are drawn by the base and for each user, from the same seeds. A taste is exact: the median
brightness of the picture, or minus it. A win is a picture that its user likes better than the base's of the same
prompt and seed, a tie a half. `new shots` are users with the same tastes of whom training has seen neither shots nor
pairs. Intervals are 95 % bootstraps over prompts. A finished training in --out is not repeated.
"""

from __future__ import annotations

import argparse
import io
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch import Tensor

from benchmarks.measure import table, write_json
from diffalign.demo import GUIDANCE_SCALE
from diffalign.generation import generate
from diffalign.pipelines import load_pipeline
from diffalign.pipelines.base import LatentPipeline
from diffalign.pipelines.user_adapter import USER_WEIGHTS, load_user_adapter
from diffalign.rewards.preprocess import to_pictures
from diffalign.shapes.grammar import Scene, sample_scenes
from diffalign.shapes.render import render
from diffalign.shapes.verify import verify
from diffalign.statistics import Interval, bootstrap_mean, wins
from diffalign.trainer import train
from diffalign.users import Shot, embed_user, load_user, save_user
from diffalign.writing import replacing

SEED_OF_DRAWS = 70_000
MIDDLE = 128  # between the two kinds of background, which are 15 to 70 and 200 to 250
Taste = Callable[[Image.Image], float]


def brightness(picture: Image.Image) -> float:
    """Median gray level, 0 to 255: that of the background, which is most of a picture of shapes."""
    return float(np.median(np.asarray(picture.convert("L"))))


TASTES: dict[str, Taste] = {"light": brightness, "dark": lambda picture: -brightness(picture)}


def two_grounds(scene: Scene, seed: int) -> dict[str, Image.Image]:
    """The scene on a light and on a dark background."""
    found: dict[str, Image.Image] = {}
    number = 0
    while len(found) < 2:
        picture = render(scene, random.Random(f"{seed}/{scene}/{number}"))
        found.setdefault("light" if brightness(picture) > MIDDLE else "dark", picture)
        number += 1
    return found


def write_pairs(path: Path, count: int, seed: int) -> None:
    """`count` pairs, each judged by both users, in Pick-a-Pic's columns; the order of the pictures is drawn."""
    rng, rows = random.Random(seed), []
    for number, scene in enumerate(sample_scenes("train", count, seed)):
        grounds = two_grounds(scene, seed + number)
        for user in TASTES:
            first, second = rng.sample(sorted(grounds), 2)
            labels = {"label_0": float(first == user), "label_1": float(second == user)}
            pictures = {"jpg_0": _png(grounds[first]), "jpg_1": _png(grounds[second])}
            rows.append({"caption": str(scene), **pictures, **labels, "user_id": user})
    with replacing(path) as partial:
        pq.write_table(pa.Table.from_pylist(rows), partial)


def new_shots(user: str, count: int, seed: int) -> list[Shot]:
    """Pairs of captions that no training has seen, judged by a taste."""
    shots = []
    for number, scene in enumerate(sample_scenes("validation", count, seed)):
        grounds = two_grounds(scene, seed + number)
        other = next(name for name in grounds if name != user)
        shots.append(Shot(str(scene), grounds[user], grounds[other]))
    return shots


def drawn(pipe: LatentPipeline, scenes: list[Scene], user: Tensor | None, guidance: float) -> list[Image.Image]:
    prompts = [str(scene) for scene in scenes]
    seeds = range(SEED_OF_DRAWS, SEED_OF_DRAWS + len(prompts))
    return to_pictures(generate(pipe, prompts, seeds=seeds, batch_size=32, guidance_scale=guidance, user=user))


def measured(pictures: dict[str, list[Image.Image]], scenes: list[Scene], seed: int) -> dict[str, dict[str, Any]]:
    """Per row: wins of both tastes over the base, the verifier's pass rate and the share of light pictures."""
    found: dict[str, dict[str, Any]] = {}
    for name, own in pictures.items():
        found[name] = {
            f"{taste} wins": interval([like(p) for p in pictures["base"]], [like(p) for p in own], seed)
            for taste, like in TASTES.items()
        }
        found[name]["passed"] = float(np.mean([verify(np.asarray(p), s).ok for p, s in zip(own, scenes, strict=True)]))
        found[name]["light"] = float(np.mean([brightness(p) > MIDDLE for p in own]))
    return found


def interval(base: list[float], own: list[float], seed: int) -> list[float]:
    """[win rate, low, high]."""
    rate: Interval = bootstrap_mean(wins(base, own), np.random.default_rng(seed))
    return [rate.estimate, rate.low, rate.high]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="of the config, key=value")
    parser.add_argument("--config", default="tiny-sd/ppd")
    parser.add_argument("--pairs", type=int, default=400, help="that each of the two users has judged")
    parser.add_argument("--draws", type=int, default=200, help="held-out pictures per row")
    parser.add_argument("--guidance-scale", type=float, default=GUIDANCE_SCALE)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/ppd"))
    args = parser.parse_args()

    args.out.mkdir(parents=True, exist_ok=True)
    data, run, start = args.out / "pairs.parquet", args.out / f"run-{args.seed}", time.perf_counter()
    if not data.is_file():
        write_pairs(data, args.pairs, seed=0)
    if not (run / USER_WEIGHTS).is_file():
        train(args.config, [f"data.path={data}", f"output_dir={run}", f"cache_dir={args.out / 'cache'}",
                            f"seed={args.seed}", "resume_from_checkpoint=latest", *args.overrides])  # fmt: skip
    seconds = time.perf_counter() - start

    pipe = load_pipeline("tiny-sd")
    facts = load_user_adapter(pipe, run)
    users = {user: load_user(user, run) for user in TASTES}
    for user in TASTES:
        own = embed_user(new_shots(user, len(users[user]), args.seed + 1), facts["users"])
        users[f"{user}, new shots"] = own
        save_user(args.out / f"new-{user}.safetensors", own)
    users["nobody"] = torch.zeros_like(users["light"])
    scenes = sample_scenes("heldout", args.draws, seed=1)
    pictures = {"base": drawn(pipe, scenes, None, args.guidance_scale)}
    pictures |= {name: drawn(pipe, scenes, user, args.guidance_scale) for name, user in users.items()}
    result = measured(pictures, scenes, args.seed)
    held = all(result[user][f"{user} wins"][0] >= 0.65 and result[other][f"{user} wins"][0] <= 0.5
               for user, other in (("light", "dark"), ("dark", "light")))  # fmt: skip
    write_json(args.out / f"ppd-{args.seed}.json", {"rows": result, "train_seconds": seconds, "held": held,
                                                     "settings": vars(args) | {"out": str(args.out)}})  # fmt: skip
    print(table(["drawn for", "light wins", "dark wins", "passed", "light"], [
        [name, *(f"{rate:.3f} [{low:.3f}, {high:.3f}]" for rate, low, high in (row["light wins"], row["dark wins"])),
         f"{row['passed']:.3f}", f"{row['light']:.3f}"] for name, row in result.items()
    ]))  # fmt: skip
    print(f"each at least 0.65 with its own embedding and at most 0.5 with the other's: {held}; {seconds:.0f} s")


def _png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


if __name__ == "__main__":
    main()
