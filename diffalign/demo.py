"""`diffalign demo`: aligns the shipped tiny-sd with the shipped pairs, and shows held-out pictures before and after.

The judge is the verifier of the shapes world, which no training can fool; beside it stands tiny-clip, a learned reward
that can be. Base, aligned and the SFT baseline draw the same held-out prompts from the same seeds.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from diffalign.assets import asset
from diffalign.generation import generate
from diffalign.pipelines import load_pipeline
from diffalign.pipelines.lora import load_lora
from diffalign.prompts import Prompt, read_prompts
from diffalign.report import write_report
from diffalign.rewards import load_reward
from diffalign.rewards.base import Reward
from diffalign.rewards.preprocess import to_pictures
from diffalign.statistics import mean_gain
from diffalign.trainer import train
from diffalign.writing import write_json

log = logging.getLogger("diffalign")

MODEL = "tiny-sd"
SEED_OF_DRAWS = 10_000  # held-out draws use seeds from here on, whatever the training seed
# chosen on validation (docs/models.md): the stock 7.5 multiplies what the LoRA changes past what it was trained to
GUIDANCE_SCALE = 4.5


@dataclass(frozen=True)
class Budget:
    """How much is drawn: held-out draws for base and aligned, of which the first `sft` also for the baseline."""

    draws: int
    sft: int
    overrides: tuple[str, ...]  # of both training configs


FULL = Budget(540, 270, ())
QUICK = Budget(24, 12, ("max_train_steps=4", "data.max_pairs=64", "validation_prompts=[]"))


@dataclass(frozen=True)
class Drawn:
    """Pictures of one model and what the two judges say of each."""

    pictures: list[Image.Image]
    passed: np.ndarray  # [N] of 0 and 1
    clip: np.ndarray  # [N]


def run(out: Path, quick: bool = False, seed: int = 0) -> dict[str, Any]:
    """Trains DPO and SFT, draws, judges, and writes out/report.html and out/report.json; returns the latter's content.

    Raises:
        ValueError: `out` holds a demo with other settings, or a shipped file is missing.
    """
    start, budget = time.perf_counter(), QUICK if quick else FULL
    out.mkdir(parents=True, exist_ok=True)
    prompts = read_prompts(asset("prompts/shapes-heldout.jsonl"))[: budget.draws]
    judges = load_reward("shapes"), load_reward("clip", model="tiny-clip")

    training = time.perf_counter()
    dpo = _trained("tiny-sd/dpo", out / "dpo", budget, seed)
    train_seconds = time.perf_counter() - training
    sft = _trained("tiny-sd/sft", out / "sft", budget, seed)

    base = _draw(None, prompts, judges)
    aligned = _draw(dpo, prompts, judges)
    baseline = _draw(sft, prompts[: budget.sft], judges)

    report = summary(prompts, base, aligned, baseline)
    report |= {
        "train_seconds": train_seconds,
        "total_seconds": time.perf_counter() - start,
        "seed": seed,
        "quick": quick,
    }
    write_json(out / "report.json", report)
    curves = {name: _metrics(out / name) for name in ("dpo", "sft")}
    examples = [(p, base.pictures[i], aligned.pictures[i], bool(base.passed[i]), bool(aligned.passed[i]))
                for i, p in enumerate(prompts)]  # fmt: skip
    write_report(out / "report.html", report, examples, curves)
    return report


def summary(prompts: Sequence[Prompt], base: Drawn, aligned: Drawn, sft: Drawn) -> dict[str, Any]:
    """The numbers of report.json; the gain's interval is a paired bootstrap over prompts."""
    categories = np.array([prompt.category for prompt in prompts])
    gain = mean_gain(base.passed, aligned.passed, np.random.default_rng(0))
    return {
        "prompts": len(prompts),
        "guidance_scale": GUIDANCE_SCALE,
        "base_pass_rate": float(base.passed.mean()),
        "aligned_pass_rate": float(aligned.passed.mean()),
        "gain": float(aligned.passed.mean()) - float(base.passed.mean()),
        "gain_ci95": [gain.low, gain.high],
        "per_category": {
            str(category): {
                "prompts": int((categories == category).sum()),
                "base_pass_rate": float(base.passed[categories == category].mean()),
                "aligned_pass_rate": float(aligned.passed[categories == category].mean()),
            }
            for category in sorted(set(categories))
        },
        "base_clip": float(base.clip.mean()),
        "aligned_clip": float(aligned.clip.mean()),
        "sft_prompts": len(sft.passed),
        "sft_pass_rate": float(sft.passed.mean()),
        "base_pass_rate_on_sft_prompts": float(base.passed[: len(sft.passed)].mean()),
    }


def _trained(config: str, folder: Path, budget: Budget, seed: int) -> Path:
    """Trains a packaged config into `folder`, or goes on with what a killed demo left there.

    Raises:
        SystemExit: the training got a SIGTERM and saved; nothing is drawn of a LoRA that is half trained.
    """
    log.info("training %s", config)
    overrides = [f"output_dir={folder}", f"cache_dir={folder.parent / 'cache'}", f"seed={seed}",
                 "resume_from_checkpoint=latest", *budget.overrides]  # fmt: skip
    result = train(config, overrides)
    if result.interrupted:
        log.warning("stopped at step %d and saved in %s; the same command goes on there", result.steps, folder)
        raise SystemExit(0)
    return result.folder


def _draw(lora: Path | None, prompts: Sequence[Prompt], judges: tuple[Reward, Reward]) -> Drawn:
    log.info("drawing %d held-out pictures with %s", len(prompts), lora or MODEL)
    pipe = load_pipeline(MODEL)
    if lora:
        load_lora(pipe, lora)
    texts = [prompt.text for prompt in prompts]
    seeds = range(SEED_OF_DRAWS, SEED_OF_DRAWS + len(texts))
    pictures = to_pictures(generate(pipe, texts, seeds=seeds, batch_size=60, guidance_scale=GUIDANCE_SCALE))
    verdicts, scores = (np.array(judge(pictures, texts).tolist()) for judge in judges)
    return Drawn(pictures, verdicts, scores)


def _metrics(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
