"""Ways to look for better noise, at equal evaluations of the network: what the reward and the verifier say of each.

    make league-noise                                            # what has not run yet, then the page
    python -m benchmarks.league_noise --rows reno best_of_n
    python -m benchmarks.league_noise --split validation --prompts 48 --rows reno --options lr=2 --work runs/tune
    python -m benchmarks.league_noise --page                     # only the page, from the rows that are there

Each row looks for better noise for the same held-out captions of two objects, from the same plain pictures, in a
distilled model's few steps, and may look at LOOKS pictures of each caption, or spend as many evaluations. tiny-clip, a
learned reward, says which look is the best one; the verifier, which cannot be fooled, only watches, except in rows
that it pays. A row is a JSON file under docs/league/noise, computed again when its settings, the model, or the code of
the methods change; parts of it are kept under --work, so that a killed one goes on.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

import diffalign.noise
from benchmarks.league_noise_page import FOLDER, write_page
from diffalign.assets import asset
from diffalign.noise.command import keywords
from diffalign.noise.driver import optimize_noise
from diffalign.noise.result import NoiseResult
from diffalign.pipelines import load_pipeline
from diffalign.pipelines.base import LatentPipeline
from diffalign.prompts import read_prompts
from diffalign.rewards import load_rewards
from diffalign.rewards.base import Weighted
from diffalign.shapes.grammar import parse, sample_scenes
from diffalign.writing import replacing, write_json

MODEL, STEPS = "tiny-sd-turbo", 4
LOOKS = 50
PROMPTS = 200
AT_ONCE = 25  # captions
SEED = 40_000
# looks at which the curves have a point; methods that walk together have only their end
MARKS = (1, 2, 3, 5, 8, 12, 17, 25, 35, LOOKS, 70, 2 * LOOKS)
# modules of diffalign.noise that say what a search comes to
CODE = ("objective", "seen", "best_of_n", "reno", "zero_order", "paths", "fk", "dno")
PAYS: dict[str, dict[str, Any]] = {
    "tiny-clip": {"tiny-clip": 1.0, "shapes": {"mode": "pass", "weight": 0}},
    "verifier": {"shapes": {"mode": "score", "weight": 1.0}, "tiny-clip": 0},
}


@dataclass(frozen=True)
class Row:
    """A method with its keywords, and who pays it."""

    name: str
    method: str
    options: Mapping[str, Any] = field(default_factory=dict)
    pay: str = "tiny-clip"


RENO = {"steps": LOOKS, "lr": 2.0, "regularization": 5.0}  # chosen on validation captions, as docs/noise.md tells
TABLE = (
    Row("best_of_n", "best_of_n", {"steps": LOOKS}),
    Row("best_of_n, twice the looks", "best_of_n", {"steps": 2 * LOOKS}),  # which take as long as reno
    Row("reno", "reno", RENO),
    Row("reno, no regularization", "reno", RENO | {"regularization": 0.0}),
    Row("reno, lr and regularization as released", "reno", {"steps": LOOKS}),
    Row("reno, from the best of 10", "reno", RENO | {"steps": LOOKS - 10, "init": "best_of_n", "candidates": 10}),
    Row("zero_order", "zero_order", {"steps": LOOKS}),
    # 2 starts, then 16 walks from each of three places: 188 evaluations of 200
    Row("paths", "paths", {"kept": 2, "copies": 8, "rounds": 3}),
    Row("fk", "fk", {"particles": LOOKS, "every": 1}),
    Row("dno", "dno", {"steps": LOOKS}),
    Row("zero_order, paid by the verifier", "zero_order", {"steps": LOOKS}, "verifier"),
)
ROWS = {row.name: row for row in TABLE}


@dataclass(frozen=True)
class Task:
    """What all rows have in common."""

    pipe: LatentPipeline
    prompts: tuple[str, ...]
    work: Path


def captions(split: str, count: int) -> tuple[str, ...]:
    """Of two objects: the first held-out ones that ship, or ones of another split to choose settings on."""
    if split == "heldout":
        shipped = [prompt.text for prompt in read_prompts(str(asset("prompts/shapes-heldout.jsonl")))]
        texts = [text for text in shipped if parse(text).category == "two"]
    else:
        texts = [str(scene) for scene in sample_scenes(split, 4 * count, seed=2) if scene.category == "two"]
    return tuple(texts[:count])


def key_of(row: Row, prompts: Sequence[str]) -> str:
    """Hash of what a row follows from."""
    code = [(Path(diffalign.noise.__path__[0]) / f"{name}.py").read_text() for name in CODE]
    weights = [file.read_bytes() for file in sorted(asset(MODEL).rglob("*")) if file.is_file()]
    told = json.dumps([vars(row) | {"options": dict(row.options)}, list(prompts), STEPS, SEED, PAYS], default=str)
    return hashlib.sha256(b"".join([*weights, *(text.encode() for text in (*code, told))])).hexdigest()[:16]


def run_row(row: Row, task: Task, file: Path, again: bool = False) -> dict[str, Any]:
    """Computes a row, unless it is there; parts that an earlier call left are taken."""
    key = key_of(row, task.prompts)
    if file.exists() and not again and (old := json.loads(file.read_text()))["key"] == key:
        return dict(old)
    rewards = load_rewards(PAYS[row.pay])
    parts = []
    for start in range(0, len(task.prompts), AT_ONCE):
        kept = task.work / f"{key}-{start}.json"
        if again or not kept.exists():
            with replacing(kept) as partial:
                partial.write_text(json.dumps(part_of(row, task, rewards, start)))
        parts.append(json.loads(kept.read_text()))
    found = {"row": row.name, "method": row.method, "options": dict(row.options), "pay": row.pay, "key": key,
             "model": MODEL, "sampling_steps": STEPS, "prompts": len(task.prompts), **joined(parts),
             "threads": torch.get_num_threads(), "machine": platform.machine(), "torch": torch.__version__}  # fmt: skip
    write_json(file, found, indent=1)
    print(summary(found), flush=True)
    return found


def part_of(row: Row, task: Task, rewards: Weighted, start: int) -> dict[str, Any]:
    """Some of the captions."""
    prompts, clock = task.prompts[start : start + AT_ONCE], time.process_time()
    result = optimize_noise(task.pipe, prompts, rewards, method=row.method, seed=SEED + start, sampling_steps=STEPS,
                            memory="fast", batch_size=AT_ONCE, **row.options)  # fmt: skip
    seconds = time.process_time() - clock
    return {"seconds": seconds, "evaluations": result.evaluations, **curves(result)}


def curves(result: NoiseResult) -> dict[str, Any]:
    """At each mark, for each caption: what both say of the best look until then, and whether any look passed.

    A method whose looks are of one walk together has one mark, its end.
    """
    looks = [look for look in result.history if look["ends"]]
    total, learned, passed = (torch.stack([look[name] for look in looks]) for name in ("total", "tiny-clip", "shapes"))
    one_by_one = "steps" in result.settings  # a keyword of methods that look at one picture after the other
    marks = [mark for mark in MARKS if mark <= len(looks)] if one_by_one else [len(looks)]
    best = [total[:mark].argmax(0, keepdim=True) for mark in marks]
    passed = passed == 1.0
    return {
        "marks": marks,
        "passed": [passed.gather(0, which)[0].int().tolist() for which in best],
        "any": [passed[:mark].any(0).int().tolist() for mark in marks],
        "learned": [[round(value, 3) for value in learned.gather(0, which)[0].tolist()] for which in best],
    }


def joined(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """All captions: seconds a caption, evaluations of each, and per mark the marks of all."""
    count = sum(len(part["passed"][0]) for part in parts)
    marks = parts[0]["marks"]
    whole = {name: [[value for part in parts for value in part[name][place]] for place in range(len(marks))]
             for name in ("passed", "any", "learned")}  # fmt: skip
    texts = {name: ["".join(map(str, row)) for row in whole[name]] for name in ("passed", "any")}
    return {"seconds": round(sum(part["seconds"] for part in parts) / count, 3), "marks": marks,
            "evaluations": float(np.mean([part["evaluations"] for part in parts])), **texts,
            "learned": whole["learned"]}  # fmt: skip


def summary(found: Mapping[str, Any]) -> str:
    """A line for the log."""
    rates = [found[name][-1].count("1") / found["prompts"] for name in ("passed", "any")]
    return (f"{found['row']} {found['options']}: passes {found['passed'][0].count('1') / found['prompts']:.3f} -> "
            f"{rates[0]:.3f} (any look {rates[1]:.3f}), tiny-clip {np.mean(found['learned'][0]):.2f} -> "
            f"{np.mean(found['learned'][-1]):.2f}, {found['evaluations']:.0f} evaluations, {found['seconds']:.2f} "
            f"s a caption")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="*", default=list(ROWS), choices=ROWS, metavar="ROW", help="; ".join(ROWS))
    parser.add_argument("--split", choices=("heldout", "validation"), default="heldout")
    parser.add_argument("--prompts", type=int, default=PROMPTS)
    parser.add_argument("--options", nargs="*", default=[], metavar="KEY=VALUE", help="of the rows, instead of theirs")
    parser.add_argument("--work", type=Path, default=Path("runs/league-noise"), help="parts of rows")
    parser.add_argument("--again", action="store_true", help="also rows that are there")
    parser.add_argument("--page", action="store_true", help="only the page")
    args = parser.parse_args()
    official = args.split == "heldout" and args.prompts == PROMPTS and not args.options
    if not args.page:
        args.work.mkdir(parents=True, exist_ok=True)
        task = Task(load_pipeline(MODEL), captions(args.split, args.prompts), args.work)
        for row in (ROWS[name] for name in args.rows):
            row = Row(row.name, row.method, {**row.options, **keywords(args.options)}, row.pay)
            folder = FOLDER / "rows" if official else args.work
            run_row(row, task, folder / f"{file_name(row.name)}.json", args.again or not official)
            if official:
                write_page(list(ROWS))
    if official:
        write_page(list(ROWS))


def file_name(name: str) -> str:
    """Of a row, without what shells would have quoted."""
    return name.replace(",", "").replace(" ", "-")


if __name__ == "__main__":
    main()
