"""What the commands of `diffalign.cli` do once their arguments are read; this is where torch is loaded."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import yaml

from diffalign import demo as demo_run
from diffalign.arguments import default_device
from diffalign.cache import Cache
from diffalign.card import CONFIG, add_evaluation
from diffalign.config import as_dict, load_config
from diffalign.console import Result, progress_bar
from diffalign.data.check import check
from diffalign.drawing import NOBODY, OWN_SIZE, Canvas, Sampling, Told
from diffalign.estimate import CARDS, estimate
from diffalign.evaluation import evaluate
from diffalign.memory import smaller
from diffalign.methods import METHODS
from diffalign.pipelines import load_pipeline
from diffalign.pipelines.attention import preferring
from diffalign.pipelines.export import export_lora
from diffalign.prompts import Prompt
from diffalign.reference import REFERENCES
from diffalign.refusals import refuse, refuse_other_pixels
from diffalign.rewards import CLIPS, REWARDS, clip_section
from diffalign.rewards.base import Weighted
from diffalign.selection import SELECTIONS
from diffalign.startup import read_examples, weight_dtype
from diffalign.table import bind, build, coerce, unknown
from diffalign.trainer import train
from diffalign.users import parse_users

log = logging.getLogger("diffalign")


def run_demo(out: Path, quick: bool, seed: int) -> Result:
    """The demo, summed up in two lines."""
    report = demo_run.run(out, quick, seed)
    low, high = report["gain_ci95"]
    text = (
        f"held-out prompts drawn right: {report['base_pass_rate']:.1%} before, {report['aligned_pass_rate']:.1%} after "
        f"(gain {report['gain']:+.3f}, 95 % interval {low:+.3f} to {high:+.3f})\nlook at {out / 'report.html'}"
    )
    return Result(report, text)


def run_train(config: str, overrides: Sequence[str]) -> Result:
    """A whole training run."""
    run = train(config, overrides)
    state = "interrupted and saved; go on with resume_from_checkpoint=latest" if run.interrupted else "done"
    data = {**asdict(run), "folder": str(run.folder)}
    return Result(data, f"{state}: step {run.steps}, in {run.folder}")


def dry_run(config: str, overrides: Sequence[str]) -> Result:
    """The resolved config, after every check that needs neither the data nor the model."""
    resolved = load_config(config, overrides)
    method = build(METHODS, resolved.method, what="method")
    build(REFERENCES, resolved.reference, what="reference")
    build(SELECTIONS, resolved.selection, what="selection")
    parse_users(resolved.users)
    refuse(resolved, method)
    for label, section in resolved.rewards.items():
        check_reward(label, section)
    values = as_dict(resolved)
    return Result(values, yaml.safe_dump(values, sort_keys=False, allow_unicode=True).rstrip())


def check_reward(label: str, section: float | Mapping[str, Any]) -> None:
    """Checks a row of a `rewards` section without loading it.

    Raises:
        ValueError: unknown name or keyword, or a weight that is not a number.
    """
    keywords = dict(section) if isinstance(section, Mapping) else {"weight": section}
    coerce(keywords.pop("weight", 1.0), float, f"rewards.{label}")
    if (clips := keywords.pop("clips", None)) is not None:
        bind(CLIPS, clip_section(label, clips), what="reward", reward=None)
    device = keywords.pop("device", "cpu")
    bind(REWARDS, {"name": label, **keywords}, what="reward", device=device)


def fill_cache(config: str, overrides: Sequence[str]) -> Result:
    """Latents and embeddings of a config's data, so that a run starts at once and on a smaller device."""
    resolved = load_config(config, overrides)
    examples = read_examples(resolved, build(METHODS, resolved.method, what="method"))
    pipe = load_pipeline(
        resolved.pretrained_model_name_or_path,
        dtype=weight_dtype(resolved),
        device=default_device("cpu" if resolved.cpu else None),
        revision=resolved.revision,
        variant=resolved.variant,
        attention=resolved.attention,
        max_sequence_length=resolved.max_sequence_length,
    )
    refuse_other_pixels(resolved, pipe)
    everything = [*examples.train, *examples.validation]
    counts = {"prompts": 0, "pairs": 0}

    def progress(what: str, done: int, total: int) -> None:
        counts[what] = done
        log.info("cache: %s %d of %d", what, done, total)

    cache = Cache(Path(resolved.cache_dir), pipe)
    with preferring(resolved.attention):
        cache.fill(pipe, everything, ["", *resolved.validation_prompts], resolved.validation_batch_size, progress)
    data = {"cache_dir": resolved.cache_dir, "pairs": len(everything),
            "computed_prompts": counts["prompts"], "computed_pairs": counts["pairs"]}  # fmt: skip
    text = (f"{resolved.cache_dir}: {len(everything)} pairs, of which {counts['pairs']} were new; "
            f"{counts['prompts']} new prompts")  # fmt: skip
    return Result(data, text)


def compare_models(
    model: str, lora: str | None, prompts: Sequence[Prompt], rewards: Weighted, seeds: int,
    sampling: Sampling, out: Path | None, device: str, attention: str, told: Told = NOBODY,
    canvas: Canvas = OWN_SIZE,
) -> Result:  # fmt: skip
    """Base against LoRA or user adapter, or both, on the same prompts and seeds; without either the base alone."""
    user = told.tokens()
    pipe = load_pipeline(model, device=device, attention=attention, max_sequence_length=sampling.max_sequence_length)
    with progress_bar("drawing and scoring", len(prompts) * seeds) as advance, preferring(attention):
        report = evaluate(
            pipe,
            prompts,
            rewards,
            lora=lora,
            lora_scale=sampling.lora_scale,
            user_adapter=told.adapter,
            user=user,
            seeds_per_prompt=seeds,
            steps=sampling.steps,
            guidance_scale=sampling.guidance_scale,
            batch_size=sampling.batch_size,
            seed=sampling.seed,
            height=canvas.height,
            width=canvas.width,
            num_frames=canvas.num_frames,
            fps=canvas.fps,
            out=out,
            progress=advance,
        )
    if lora and (Path(lora) / CONFIG).is_file():
        add_evaluation(Path(lora), report)
    columns = ("base", "aligned", "gain", "win_rate") if lora or told.user else ("base",)
    rows = [
        (group, name, *(_with_interval(row, column) for column in columns))
        for group, table in _groups(report)
        for name, row in table.items()
    ]
    where = f"pictures and evaluation.json in {out}" if out else ""
    return Result(report, where, ("prompts", "reward", *columns), rows)


def estimate_run(config: str, overrides: Sequence[str], card: str) -> Result:
    """Parameters, FLOPs, memory by part, and the time per step at a card's printed rate."""
    if card not in CARDS:
        raise unknown("card", card, CARDS)
    resolved, printed = load_config(config, overrides), CARDS[card]
    found = estimate(resolved)
    fits = found.total_bytes <= printed.gigabytes * 1e9
    if not fits and resolved.gradient_checkpointing is None:  # as training on this card would decide
        resolved = replace(resolved, gradient_checkpointing=True)
        found = estimate(resolved)
        fits = found.total_bytes <= printed.gigabytes * 1e9
    seconds = found.seconds_per_step(resolved, printed)
    rows = [(part, f"{size / 1e9:.2f} GB") for part, size in found.memory.items()]
    over = found.total_bytes / 1e9 - printed.gigabytes
    advice = "" if fits else f"; {over:.1f} GB more than a {card} has: {smaller(resolved)}"
    advice += "; with gradient checkpointing" if resolved.gradient_checkpointing else ""
    text = (
        f"{found.parameters:,} parameters, {found.trained_parameters:,} trained; "
        f"{found.forward_flops / 1e12:.3g} TFLOP a forward pass of one picture, {found.pair_flops / 1e12:.3g} a pair\n"
        f"a step of {resolved.train_batch_size * resolved.gradient_accumulation_steps} pairs takes {seconds:.3g} s at "
        f"the {printed.tflops:.0f} TFLOP/s printed for a {card}, which no training reaches{advice}"
    )
    data = found.as_dict() | {"card": card, "seconds_per_step_at_printed_rate": seconds, "fits": fits}
    return Result(data, text, ("memory", ""), [*rows, ("in all", f"{found.total_bytes / 1e9:.2f} GB")])


def write_export(lora: str, form: str, dtype: str, out: Path | None) -> Result:
    """A LoRA in another program's layout."""
    source = Path(lora)
    beside = (source if source.is_dir() else source.parent) / f"{source.stem}-{form}-{dtype}.safetensors"
    file = export_lora(source, out or beside, form, dtype)
    return Result({"file": str(file), "format": form, "dtype": dtype, "bytes": file.stat().st_size},
                  f"{file}: {file.stat().st_size / 1e6:.2f} MB, {form}, {dtype}")  # fmt: skip


def check_data(
    path: str, name: str | None, max_rows: int | None, frames: int | None = None, fps: float | None = None
) -> Result:
    """What is in a preference data set; not ok when nothing in it can be trained on."""
    report = check(path, name, max_rows, frames=frames, fps=fps)
    return Result(report.to_dict(), report.render(), ok=report.usable)


def _groups(report: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    yield "all", report["rewards"]
    for category, part in report["per_category"].items():
        yield category, part["rewards"]


def _with_interval(row: Mapping[str, Any], column: str) -> str:
    if row[column] is None:
        return "missing"
    low, high = row[f"{column}_ci95"]
    return f"{row[column]:.4f}" + ("" if low is None else f" [{low:.4f}, {high:.4f}]")
