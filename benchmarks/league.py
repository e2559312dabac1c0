"""Every method on every shipped model: the same pictures, the same labels, the same budget of network evaluations.

    make league                                                        # what has not run yet, then the page
    python -m benchmarks.league --models tiny-sd --methods dpo kto --seeds 0 1 2
    python -m benchmarks.league --page                                 # only the page, from the rows that are there

Each model draws its own training pictures once (`league_data`), which the verifier ranks; a method sees them through
its own view. A row trains one method with the settings of configs/tiny-sd/<method>.yaml for at most BUDGET evaluations
of the network (policy, reference, sampling and inversion; a picture at a time is one, a backward pass is not counted),
then draws the held-out captions with and without the LoRA, from the same noise. Settings were never chosen on held-out
captions. A finished row is one JSON file under docs/league/rows, with the hashes of its config and of its code. It is
computed again if its config, model or data change, or if the code does and three steps of training then leave other
numbers than before, or with --again.
"""

from __future__ import annotations

import argparse
import hashlib
import inspect
import json
import math
import platform
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.league_data import LISTS, PAIRS, T5_TOKENS, league_data, loaded, settings
from benchmarks.league_page import ELSEWHERE, MODELS, write_page
from diffalign.assets import asset
from diffalign.config import as_dict, load_config
from diffalign.generation import generate
from diffalign.methods import METHODS
from diffalign.pipelines.lora import load_lora
from diffalign.prompts import read_prompts
from diffalign.rewards import load_reward
from diffalign.rewards.preprocess import to_pictures
from diffalign.shapes.grammar import Scene, parse
from diffalign.shapes.verify import verify
from diffalign.startup import prepare_run
from diffalign.table import resolve
from diffalign.telemetry import drift
from diffalign.trainer import Trainer
from diffalign.writing import write_json

SEEDS = {"tiny-sd": (0, 1, 2), "tiny-sdxl": (0,), "tiny-sd3": (0,)}
BUDGET = 20_000
DRAWS = 540
GUIDANCE_SCALE = 4.5
SEED_OF_DRAWS = 90_000
OWN = {"dcpo": ["method.perturber=null"]}  # the data say what losers show, which the shipped pairs do not
DRAWN = (DRAWS, GUIDANCE_SCALE, SEED_OF_DRAWS)  # how held-out pictures are drawn
ROWS = Path("docs/league/rows")
CACHE = "cache"  # of a model's latents and embeddings, beside its runs
CODE = (
    "losses",
    "process",
    "sampling",
    "batches",
    "reference",
    "selection",
    "trainer",
    "rollouts",
    "inversion",
    "methods.base",
    "methods.pairs",
    "methods.inverted",
    "methods.paid",
    "methods.direct",
    "methods.grpo",
    "losses.policy",
    "dynamics",
    "episodes",
    "advantages",
    "scores",
)


@dataclass(frozen=True)
class Drawn:
    """Held-out pictures [N, 3, H, W] of one model: which pass [N], and what the learned reward says of them [N]."""

    pixels: Tensor
    passed: list[int]
    learned: list[float]


class Counter:
    """How many samples a network was evaluated on."""

    def __init__(self, network: nn.Module) -> None:
        self.count = 0
        network.register_forward_hook(self._add, with_kwargs=True)

    def _add(self, module: nn.Module, args: Sequence[Any], kwargs: dict[str, Any], output: object) -> None:
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        self.count += len(tensors[0])


def overrides(model: str, method: str, seed: int, data: Path, folder: Path) -> list[str]:
    """What the league changes of a method's config: the model, the data, and where things go."""
    file = data / (PAIRS if method == "densedpo" else LISTS)
    return [
        *OWN.get(method, ()),
        f"pretrained_model_name_or_path={model}",
        f"max_sequence_length={T5_TOKENS.get(model, 'null')}",
        f"data={{name: jsonl, path: {file}, val_fraction: 0}}",
        f"output_dir={folder}",
        f"cache_dir={data.parent / CACHE}",
        f"seed={seed}",
        "validation_prompts=[]",
        "validation_steps=null",
        "early_stopping_patience=null",
        "report_to=none",
        "checkpointing_steps=1000000",
    ]


@dataclass(frozen=True)
class Trained:
    """A run: the LoRA's folder, network evaluations, seconds, examples a step, and its last metrics."""

    folder: Path
    evaluations: int
    seconds: float
    examples: int
    metrics: dict[str, float]


def trained(config: str, changes: Sequence[str], steps: int, folder: Path, *, goes_on: bool = False) -> Trained:
    """A run of so many steps, in an empty folder, or from its latest checkpoint if there is one and it `goes_on`.

    Raises:
        SystemExit: it was stopped by a signal, which a run obeys in its own time: it is no row.
    """
    if not goes_on:
        shutil.rmtree(folder, ignore_errors=True)
        for walked in (folder.parent / CACHE).glob("trajectories-*"):  # a row pays for its own
            shutil.rmtree(walked)
    latest = ["resume_from_checkpoint=latest"] if any(folder.glob("checkpoint-*")) else []
    prepared = prepare_run(config, [*changes, f"output_dir={folder}", f"max_train_steps={steps}", *latest])
    counter, start = Counter(prepared.pipe.network), time.perf_counter()
    run = Trainer(prepared).fit()
    if run.interrupted:
        raise SystemExit(f"stopped at step {run.steps} of {steps}")
    examples = prepared.config.train_batch_size * prepared.config.gradient_accumulation_steps
    return Trained(run.folder, counter.count, time.perf_counter() - start, examples, run.metrics)


@dataclass(frozen=True)
class Probe:
    """What three steps show of a row: how many fit the budget, what they cost, a mark that other numerics do not leave.

    `evaluations` are of all those steps.
    """

    steps: int
    mark: dict[str, float]
    evaluations: int = 0

    def agrees(self, mark: Mapping[str, float]) -> bool:
        """Whether an earlier probe left the same mark, up to rounding."""
        return mark.keys() == self.mark.keys() and all(
            math.isclose(mark[name], value, rel_tol=1e-3, abs_tol=1e-6) for name, value in self.mark.items()
        )


def probed(config: str, changes: Sequence[str], folder: Path, budget: int = BUDGET) -> Probe:
    """One step, then three."""
    one, three = (trained(config, [*changes, "logging_steps=1"], steps, folder) for steps in (1, 3))
    shutil.rmtree(folder, ignore_errors=True)
    each = (three.evaluations - one.evaluations) / 2
    steps = max(1, int((budget - one.evaluations) / each) + 1)
    mark = {"evaluations": three.evaluations} | {k: three.metrics[k] for k in ("loss", "grad_norm")}
    return Probe(steps, mark, round(one.evaluations + (steps - 1) * each))


def held_out() -> list[Scene]:
    """The first DRAWS held-out captions."""
    return [parse(prompt.text) for prompt in read_prompts(str(asset("prompts/shapes-heldout.jsonl")))[:DRAWS]]


def drawn(
    model: str, lora: Path | None, scenes: Sequence[Scene], steps: int = 20, guidance: float = GUIDANCE_SCALE
) -> Drawn:  # fmt: skip
    """The held-out pictures of a model."""
    pipe = loaded(model)
    if lora:
        load_lora(pipe, lora)
    prompts = [str(scene) for scene in scenes]
    seeds = range(SEED_OF_DRAWS, SEED_OF_DRAWS + len(prompts))
    pixels = generate(pipe, prompts, seeds=seeds, steps=steps, batch_size=60, guidance_scale=guidance)
    pictures = to_pictures(pixels)
    passed = [int(verify(np.asarray(p), s).ok) for p, s in zip(pictures, scenes, strict=True)]
    with torch.no_grad():
        learned = load_reward("clip", model="tiny-clip")(pictures, prompts).tolist()
    return Drawn(pixels, passed, learned)


def keys_of(
    config: str, changes: Sequence[str], model: str, method: str, budget: int = BUDGET
) -> dict[str, str]:  # fmt: skip
    """Hashes of a row's config with the model and its data, and of the code of a run.

    Folders do not count, and no key that has its default, so that a new key of configs leaves rows as they are.
    """
    plain = as_dict(load_config({"pretrained_model_name_or_path": model}))
    told = {name: value for name, value in as_dict(load_config(config, changes)).items() if value != plain[name]}
    values = {name: value for name, value in told.items() if name not in ("output_dir", "cache_dir", "data")}
    values |= {"from": settings(model), "budget": budget}
    modules = [f"diffalign.{name}" for name in CODE] + [resolve(METHODS, method, "method").__module__]
    sources = [inspect.getsource(__import__(name, fromlist=["x"])) for name in modules]
    texts = {"config": json.dumps(values, sort_keys=True, default=str), "code": "\n".join(sources)}
    return {name: hashlib.sha256(text.encode()).hexdigest()[:16] for name, text in texts.items()}


def base_row(model: str, scenes: Sequence[Scene], work: Path) -> tuple[dict[str, Any], Drawn]:
    """The model as it ships; its pictures are kept under `work`."""
    file, key = ROWS / f"{model}-base.json", hashlib.sha256(f"{settings(model)}/{DRAWN}".encode()).hexdigest()[:16]
    pictures = work / f"base-{key}.pt"
    if pictures.exists() and file.exists() and json.loads(file.read_text()).get("key") == key:
        return json.loads(file.read_text()), Drawn(**torch.load(pictures))
    found = drawn(model, None, scenes)
    torch.save(vars(found), pictures)
    row = {"model": model, "method": "base", "seed": None, "key": key, "passed": _marks(found.passed),
           "learned": float(np.mean(found.learned))}  # fmt: skip
    write_json(file, row, indent=1)
    return row, found


def method_row(
    model: str, method: str, seed: int, scenes: Sequence[Scene], base: Drawn, work: Path, again: bool
) -> None:
    """Trains and draws one row, unless it is there.

    After a change of the code three steps are enough to see that a row would come out the same; it is then kept.
    """
    file, folder = ROWS / f"{model}-{method}-{seed}.json", work / f"{method}-{seed}"
    config, changes = f"tiny-sd/{method}", overrides(model, method, seed, work / f"data-{settings(model)}", folder)
    keys = keys_of(config, changes, model, method)
    old = json.loads(file.read_text()) if file.exists() and not again else {}
    if old.get("keys") == keys:
        return
    probe = probed(config, changes, work / f"probe-{method}-{seed}")
    if old.get("keys", {}).get("config") == keys["config"] and probe.agrees(old["probe"]):
        write_json(file, old | {"keys": keys}, indent=1)
        return
    run = trained(config, changes, probe.steps, folder)
    found = drawn(model, run.folder, scenes)
    row = {
        "model": model, "method": method, "seed": seed, "keys": keys, "probe": probe.mark, "steps": probe.steps,
        "examples": probe.steps * run.examples, "evaluations": run.evaluations, "seconds": round(run.seconds, 1),
        "threads": torch.get_num_threads(),
        "machine": platform.machine(), "torch": torch.__version__, "passed": _marks(found.passed),
        "learned": float(np.mean(found.learned)), "drift": float(drift(found.pixels, base.pixels).mean()),
    }  # fmt: skip
    write_json(file, row, indent=1)
    gain = np.mean(found.passed) - np.mean(base.passed)
    print(f"{model} {method} seed {seed}: {np.mean(found.passed):.3f}, gain {gain:+.3f}, {probe.steps} "
          f"steps, {run.evaluations} evaluations, {run.seconds:.0f} s", flush=True)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=list(MODELS))
    parser.add_argument("--methods", nargs="*", default=[name for name in METHODS if name not in ELSEWHERE])
    parser.add_argument("--seeds", nargs="*", type=int, help="default: 0 1 2 for tiny-sd, 0 for the others")
    parser.add_argument("--work", type=Path, default=Path("runs/league"), help="pictures, caches and LoRAs")
    parser.add_argument("--again", action="store_true", help="also rows that are there")
    parser.add_argument("--page", action="store_true", help="only the page")
    args = parser.parse_args()
    if not args.page:
        scenes = held_out()
        for model in args.models:
            work = args.work / model
            work.mkdir(parents=True, exist_ok=True)
            league_data(loaded(model), work / f"data-{settings(model)}")
            _, base = base_row(model, scenes, work)
            for seed in args.seeds or SEEDS[model]:
                for method in args.methods:
                    method_row(model, method, seed, scenes, base, work, args.again)
                    write_page(ROWS.parent, held_out())
    write_page(ROWS.parent, held_out())


def _marks(passed: Sequence[int]) -> str:
    return "".join(map(str, passed))


if __name__ == "__main__":
    main()
