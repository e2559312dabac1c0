"""Methods that are paid by a reward, and others at their budget: what held-out captions say along the way.

    make league-paid                                                   # what has not run yet, then the page
    python -m benchmarks.league_paid --models tiny-sd --rows grpo-verifier draft-tiny-clip dpo
    python -m benchmarks.league_paid --page                            # only the page, from the rows that are there

A row trains with the settings of configs/tiny-sd/<method>.yaml, on the captions (or pictures) of the league's data, for
at most BUDGET evaluations of the network, and draws the held-out captions from POINTS of its checkpoints. Two things
judge each picture: the verifier, which cannot be fooled, and tiny-clip, which can. One of them pays; where it is
tiny-clip and the verifier's curve falls while its own rises, the reward is being hacked.

A row that is killed goes on from its last checkpoint; a finished one is a JSON file under docs/league/paid, and is
computed again when the league's rows are (`benchmarks.league`).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.league import DRAWS, GUIDANCE_SCALE, Drawn, drawn, held_out, keys_of, overrides, probed, trained
from benchmarks.league_data import league_data, loaded, settings
from benchmarks.league_page import MODELS, PAID
from benchmarks.league_paid_page import FOLDER, write_page
from diffalign.checkpoint import load_tensors
from diffalign.methods import METHODS
from diffalign.pipelines.lora import attach_lora, save_lora
from diffalign.shapes.grammar import Scene
from diffalign.telemetry import drift
from diffalign.writing import write_json

BUDGET = 300_000
STEPS, GUIDANCE = 10, 1.0  # of held-out captions, as the rollouts have them
POINTS = 6
VERIFIER = "rewards={shapes: {mode: score}, tiny-clip: 0}"
LEARNED = "rewards={tiny-clip: 1.0, shapes: {mode: score, weight: 0}}"
BLACK_BOX = ("d3po", "prdp", "ddpo", "grpo")  # paid by the verifier too


@dataclass(frozen=True)
class Row:
    """A method and who pays it; nobody pays one that learns from pairs."""

    method: str
    pay: str = ""

    @property
    def name(self) -> str:
        return f"{self.method}-{self.pay}" if self.pay else self.method

    @property
    def changes(self) -> list[str]:
        return {"verifier": [VERIFIER], "tiny-clip": [LEARNED]}.get(self.pay, [])


OWN = "wins"  # pref_grpo is paid in shares of wins, by the verifier's score, as its config says
ROWS = {row.name: row for row in (
    *(Row(method, "verifier") for method in BLACK_BOX),
    *(Row(method, OWN if method == "pref_grpo" else "tiny-clip") for method in PAID),
    *(Row(method) for method in METHODS if method not in (*PAID, "ppd")),
)}  # fmt: skip


def base_row(model: str, scenes: Sequence[Scene], work: Path) -> Drawn:
    """The model as it ships, drawn as these rows are."""
    key = hashlib.sha256(f"{settings(model)}/{DRAWS}/{STEPS}/{GUIDANCE}".encode()).hexdigest()[:16]
    pictures, file = work / f"base-paid-{key}.pt", FOLDER / "rows" / f"{model}-base.json"
    if not pictures.exists():
        both = {guidance: vars(drawn(model, None, scenes, STEPS, guidance)) for guidance in (GUIDANCE, GUIDANCE_SCALE)}
        torch.save(both, pictures)
    base, guided = (Drawn(**one) for one in torch.load(pictures).values())
    write_json(
        file, {"model": model, "row": "base", "key": key, **point(0, base), "guided": point(0, guided)}, indent=1
    )
    return base


def point(evaluations: int, found: Drawn) -> dict[str, Any]:
    """What held-out captions say after so many evaluations."""
    marks = "".join(map(str, found.passed))
    return {"evaluations": evaluations, "passed": marks, "learned": [round(value, 3) for value in found.learned]}


def run_row(row: Row, model: str, seed: int, scenes: Sequence[Scene], base: Drawn, work: Path, again: bool) -> None:
    """Trains and draws one row, unless it is there."""
    file = FOLDER / "rows" / f"{model}-{row.name}-{seed}.json"
    config = f"tiny-sd/{row.method}"
    changes = [*overrides(model, row.method, seed, work / f"data-{settings(model)}", work), *row.changes]
    keys = keys_of(config, changes, model, row.method, BUDGET)
    folder = work / f"paid-{row.name}-{seed}-{keys['config']}"  # so that no run goes on with another's checkpoints
    old = json.loads(file.read_text()) if file.exists() and not again else {}
    if old.get("keys") == keys:
        return
    probe = probed(config, changes, work / f"probe-{row.name}-{seed}", BUDGET)
    if old.get("keys", {}).get("config") == keys["config"] and probe.agrees(old["probe"]):
        write_json(file, old | {"keys": keys}, indent=1)
        return
    every = math.ceil(probe.steps / POINTS)
    kept = [f"checkpointing_steps={every}", "checkpoints_total_limit=null"]
    run = trained(config, [*changes, *kept], probe.steps, folder, goes_on=not again)
    points, last = [], base
    for checkpoint in sorted(folder.glob("checkpoint-*"), key=_step):
        last = drawn(model, as_lora(checkpoint, model, work / "paid-lora"), scenes, STEPS, GUIDANCE)
        points.append(point(round(probe.evaluations * _step(checkpoint) / probe.steps), last))
        gain, learned = np.mean(last.passed) - np.mean(base.passed), np.mean(last.learned)
        print(f"{model} {row.name} {points[-1]['evaluations']}: gain {gain:+.3f}, learned {learned:.2f}", flush=True)
    guided = drawn(model, run.folder, scenes, STEPS, GUIDANCE_SCALE)
    write_json(file, {
        "model": model, "row": row.name, "method": row.method, "pay": row.pay, "seed": seed, "keys": keys,
        "probe": probe.mark, "steps": probe.steps, "examples": probe.steps * run.examples,
        "evaluations": probe.evaluations, "threads": torch.get_num_threads(), "torch": torch.__version__,
        "seconds": round(spent(folder, run.examples), 1), "points": points,
        "guided": point(probe.evaluations, guided), "drift": float(drift(last.pixels, base.pixels).mean()),
    }, indent=1)  # fmt: skip


def as_lora(checkpoint: Path, model: str, folder: Path) -> Path:
    """What a checkpoint holds (its averaged weights, if there are any) as a LoRA folder."""
    pipe = loaded(model)
    attach_lora(pipe)
    stem = "ema" if (checkpoint / "ema.safetensors").exists() else "trainable"
    with torch.no_grad():
        for name, value in load_tensors(checkpoint, stem).items():
            pipe.network.get_parameter(name).copy_(value)
    save_lora(pipe, folder)
    return folder


def spent(folder: Path, examples: int) -> float:
    """Seconds that steps of so many examples took, by the run's own log: a run that was killed and went on is one."""
    step, total = 0, 0.0
    for line in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()):
        if "pairs_per_second" in line:
            total += (line["step"] - step) * examples / line["pairs_per_second"]
            step = line["step"]
    return total


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=["tiny-sd", "tiny-sd3"], choices=MODELS)
    parser.add_argument("--rows", nargs="*", default=list(ROWS), choices=ROWS, metavar="ROW", help=", ".join(ROWS))
    parser.add_argument("--seeds", nargs="*", type=int, default=[0])
    parser.add_argument("--work", type=Path, default=Path("runs/league"), help="pictures, caches and checkpoints")
    parser.add_argument("--again", action="store_true", help="also rows that are there")
    parser.add_argument("--page", action="store_true", help="only the page")
    args = parser.parse_args()
    scenes = held_out()
    for model in [] if args.page else args.models:
        work = args.work / model
        work.mkdir(parents=True, exist_ok=True)
        league_data(loaded(model), work / f"data-{settings(model)}")
        base = base_row(model, scenes, work)
        for name in args.rows:
            for seed in args.seeds:
                run_row(ROWS[name], model, seed, scenes, base, work, args.again)
                write_page(list(ROWS), scenes)
    write_page(list(ROWS), scenes)


if __name__ == "__main__":
    main()
