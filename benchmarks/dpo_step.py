"""`make bench`: our Diffusion-DPO step and a plain one, interleaved on the same small SDXL, on the CPU.

    python -m benchmarks.dpo_step --out runs/bench.json
    python -m benchmarks.dpo_step --update-counts          # accept new operator counts on purpose

First the losses and gradients of all variants must agree; only then is anything timed. The plain step is described in
`benchmarks/plain.py`. Operators, moved and kept bytes are exact and the same on every run: `benchmarks/op_counts.json`
holds them, and a test fails when one of ours grows.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import counts, cpu_times, median, table, versions
from benchmarks.models import Architecture, build_encoders, sdxl_8m, shares
from benchmarks.plain import cached_from, plain, random_raw
from benchmarks.steps import Cached, Ours, Step, Subject, build_subject, gradients
from diffalign.pipelines.common import stock_warnings_off
from diffalign.writing import write_json

PAIRS, RANK, SEED = 2, 8, 7
BASELINE = "plain, checkpointing"
TOLERANCE = 1e-5  # relative, of loss and gradient; the same fp32 numbers, summed in another order at most
COMPILED_TOLERANCE = 1e-3  # compiled kernels round differently, and beta = 5000 multiplies that
LEAST_LOGIT = 0.01  # a loss that is nearer to log 2 is an untrained adapter's, and agrees with everything
COUNTS = Path(__file__).with_name("op_counts.json")
GROWTH = 0.02  # of a count, beyond which the test fails
GOALS = {  # (slower, faster): least ratio of CPU times
    (BASELINE, "ours"): 1.8,
    ("plain", "ours"): 1.3,
    (BASELINE, "ours, cached reference"): 2.5,
}
COMPILED = ", compiled"  # of these variants torch sees no single operators to count


def variants(model: Architecture, pairs: int = PAIRS, compiled: bool = False) -> dict[str, Step]:
    """Every variant on one network and one set of pairs; what ours has cached is what the plain step encodes.

    The `compiled` ones need a C++ compiler, and a minute at their first step.
    """
    cpu = torch.device("cpu")
    subject = build_subject(model, cpu, torch.float32, RANK)
    encoders, raw = build_encoders(model, cpu, torch.float32), random_raw(model, pairs, cpu)
    slow = plain(subject, encoders, raw, checkpointing=True)
    cached = cached_from(slow, SEED)
    return {
        BASELINE: slow,
        "plain": plain(subject, encoders, raw, checkpointing=False),
        "ours": Ours(subject, cached),
        "ours, checkpointing": Ours(subject, cached, checkpointing=True),
        "ours, cached reference": Ours(subject, cached, cached_reference=True),
        **(_compiled(subject, cached) if compiled else {}),
    }


def _compiled(subject: Subject, cached: Cached) -> dict[str, Step]:
    return {
        f"ours{COMPILED}": Ours(subject, cached, compiled=True),
        f"ours, cached reference{COMPILED}": Ours(subject, cached, cached_reference=True, compiled=True),
    }


def assert_parity(steps: Mapping[str, Step]) -> tuple[float, float]:
    """Largest relative differences (loss, gradient) from the baseline's.

    Raises:
        AssertionError: one is above its tolerance, or the logit is so near 0 that agreement would show nothing.
    """
    wanted, direction = gradients(steps[BASELINE], SEED)
    assert abs(wanted - math.log(2)) >= LEAST_LOGIT, f"the loss is that of an untrained adapter: {wanted}"
    losses, vectors = [0.0], [0.0]
    for name, step in steps.items():
        loss, vector = gradients(step, SEED)
        losses.append(abs(loss - wanted) / abs(wanted))
        vectors.append(((vector - direction).norm() / direction.norm()).item())
        allowed = COMPILED_TOLERANCE if name.endswith(COMPILED) else TOLERANCE
        assert losses[-1] <= allowed, f"{name}: loss {loss}, {BASELINE} has {wanted}"
        assert vectors[-1] <= allowed, f"{name}: gradients differ by {vectors[-1]:.2g} of their norm"
    return max(losses), max(vectors)


def measured_counts(steps: Mapping[str, Step]) -> dict[str, dict[str, int]]:
    """`counts` of every variant that is not compiled."""
    return {name: counts(step, SEED) for name, step in steps.items() if not name.endswith(COMPILED)}


def grown(found: Mapping[str, Mapping[str, int]], committed: Mapping[str, Mapping[str, int]]) -> list[str]:
    """One sentence for each count of the committed ones that has grown by more than 2 % or is not measured any more."""
    complaints = []
    for name, wanted in committed.items():
        for key, value in wanted.items():
            now = found.get(name, {}).get(key)
            if now is None or now > (1 + GROWTH) * value:
                complaints.append(f"{name}: {key} {value} -> {now}")
    return complaints


def update_counts(found: Mapping[str, Mapping[str, int]]) -> None:
    """Writes the committed file anew, with our variants."""
    ours = {name: value for name, value in found.items() if name.startswith("ours")}
    write_json(COUNTS, {"versions": versions(), "variants": ours})


def report(times: Mapping[str, Sequence[float]], found: Mapping[str, Mapping[str, int]]) -> str:
    """The table, and each goal beside what was measured."""
    medians = {name: median(values) for name, values in times.items()}
    rows = []
    for name in times:
        ratios = [f"{medians[slow] / medians[name]:.2f}" for slow in (BASELINE, "plain")]
        rows.append([name, f"{medians[name]:.0f}", *ratios, *_cells(found.get(name))])
    header = ["step", "CPU ms", f"vs {BASELINE}", "vs plain", "operators", "MB moved", "MB kept"]
    goals = [f"goal: {fast} at least {least} times faster than {slow}: {_reached(medians, slow, fast)}"
             for (slow, fast), least in GOALS.items()]  # fmt: skip
    return "\n".join([table(header, rows), "", *goals])


def _cells(c: Mapping[str, int] | None) -> list[str]:
    if c is None:
        return ["", "", ""]
    return [str(c["operators"]), f"{c['moved_bytes'] / 1e6:.0f}", f"{c['kept_bytes'] / 1e6:.1f}"]


def _reached(medians: Mapping[str, float], slow: str, fast: str) -> str:
    there = [name for name in (fast, fast + COMPILED) if name in medians]
    return "; ".join(f"{medians[slow] / medians[name]:.2f} ({name})" for name in there)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="timed steps of each variant")
    parser.add_argument("--out", type=Path, default=Path("runs/bench.json"))
    parser.add_argument("--update-counts", action="store_true", help="write op_counts.json anew, time nothing")
    args = parser.parse_args(arguments)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with stock_warnings_off():
            return _run(args)
    finally:
        torch.set_num_threads(threads)


def _run(args: argparse.Namespace) -> int:
    model = sdxl_8m()
    parts = shares(model)
    print(f"{model.network['_class_name']} with {parts.network_parameters / 1e6:.2f} M parameters, {model.resolution} "
          f"px, {parts.network_flops / 1e9:.2f} GFLOP a forward pass; VAE encode {parts.vae:.2f} and text "
          f"{parts.text:.3f} of that (SDXL: 0.72 and 0.016); {PAIRS} pairs, LoRA rank {RANK}, 1 thread")  # fmt: skip
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        print("no C++ compiler here (g++, or what CXX names): the compiled variants are left out")
    steps = variants(model, compiled=compiler is not None and not args.update_counts)
    loss, gradient = assert_parity({name: step for name, step in steps.items() if not name.endswith(COMPILED)})
    print(f"losses agree to {loss:.1e}, gradients to {gradient:.1e} (allowed {TOLERANCE:.0e}, relative)")
    if compiler:
        figures = assert_parity({name: step for name, step in steps.items() if name.endswith((COMPILED, BASELINE))})
        print("compiled to {:.1e} and {:.1e} (allowed {:.0e})".format(*figures, COMPILED_TOLERANCE))
    found = measured_counts(steps)
    if args.update_counts:
        update_counts(found)
        print(f"wrote {COUNTS}")
        return 0
    times = cpu_times(steps, args.rounds, SEED)
    print(report(times, found))
    _complain(found)
    write_json(args.out, _document(asdict(parts), (loss, gradient), times, found))
    print(f"wrote {args.out}")
    return 0


def _complain(found: Mapping[str, Mapping[str, int]]) -> None:
    committed = json.loads(COUNTS.read_text())["variants"] if COUNTS.is_file() else {}
    for sentence in grown(found, committed):
        print(f"more than committed: {sentence}")


def _document(
    parts: dict[str, Any],
    parity: tuple[float, float],
    times: Mapping[str, Sequence[float]],
    found: Mapping[str, Mapping[str, int]],
) -> dict[str, Any]:
    rows = {name: {"cpu_ms": median(times[name]), "all_cpu_ms": times[name], **found.get(name, {})} for name in times}
    ratios = [{"slow": slow, "fast": fast, "goal": least, "ratio": median(times[slow]) / median(times[fast])}
              for (slow, fast), least in GOALS.items()]  # fmt: skip
    return {"model": parts, "pairs": PAIRS, "rank": RANK, "versions": versions(), "rows": rows, "goals": ratios,
            "parity": {"loss": parity[0], "gradient": parity[1]}}  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
