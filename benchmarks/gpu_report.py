"""What `make bench-gpu` is held against, and its tables: functions of the rows that it wrote."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from benchmarks.measure import table

BASELINE = "plain, checkpointing"
CACHED_REFERENCE = "ours, cached reference"  # in no goal: a single epoch, whose draws are all new, cannot have it

MET = {True: "yes", False: "NO", None: ""}

Row = dict[str, Any]


@dataclass(frozen=True)
class Goal:
    """A bound on one figure, and how to find it among the rows of one model."""

    model: str
    what: str
    bound: float
    value: Callable[[list[Row]], float | None]
    least: bool = False  # the figure should be at least the bound; at most it, otherwise


def _figure(rows: list[Row], pairs: int, key: str, *variants: str) -> float | None:
    """The smallest of these variants, all of ours that count if none are named."""
    found = [row[key] for row in rows if row["pairs"] == pairs and key in row
             and (row["variant"] in variants or (not variants and _counts(row["variant"])))]  # fmt: skip
    return min(found) if found else None


def _counts(variant: str) -> bool:
    return variant.startswith("ours") and variant != CACHED_REFERENCE


def _speedup(rows: list[Row], pairs: int) -> float | None:
    best, slow = _figure(rows, pairs, "ms_per_pair"), _figure(rows, pairs, "ms_per_pair", BASELINE)
    return slow / best if best and slow else None


GOALS = (  # of an H200
    Goal("sdxl", "ms a pair at 8 pairs", 100, lambda rows: _figure(rows, 8, "ms_per_pair")),
    Goal("sdxl", "ms a pair at 1 pair", 120, lambda rows: _figure(rows, 1, "ms_per_pair")),
    Goal("sdxl", "GiB at 1 pair", 20, lambda rows: _figure(rows, 1, "peak_gib", "ours")),
    Goal("sdxl", "GiB at 1 pair, checkpointing", 8, lambda rows: _figure(rows, 1, "peak_gib", "ours, checkpointing")),
    Goal("sdxl", "times faster than plain at 8 pairs", 3, lambda rows: _speedup(rows, 8), least=True),
    Goal("sdxl", "times faster than plain at 1 pair", 6, lambda rows: _speedup(rows, 1), least=True),
    Goal("sd3-medium", "ms a pair at 8 pairs", 150, lambda rows: _figure(rows, 8, "ms_per_pair")),
    Goal("wan2.1-1.3b", "ms a pair of clips", 6500, lambda rows: _figure(rows, 1, "ms_per_pair")),
    Goal("wan2.1-1.3b", "GiB at 1 pair", 60, lambda rows: _figure(rows, 1, "peak_gib")),
)


def goals(rows: list[Row]) -> list[Row]:
    """Each goal with what was measured; None where there is no such row."""
    found = []
    for goal in GOALS:
        value = goal.value([row for row in rows if row["model"] == goal.model])
        met = value is not None and (value >= goal.bound if goal.least else value <= goal.bound)
        found.append({"model": goal.model, "what": goal.what, "goal": f"{'>=' if goal.least else '<='} {goal.bound:g}",
                      "measured": value, "met": met if value is not None else None})  # fmt: skip
    return found


def report(result: dict[str, Any]) -> str:
    """The tables as text."""
    card = result["ceilings"]
    head = (f"{result['device']}: {card['flops_per_second'] / 1e12:.3g} TFLOP/s in bf16 products, "
            f"{card['copy_bytes_per_second'] / 1e12:.3g} TB/s in copies, "
            f"{card['launches_per_second'] / 1e3:.3g} thousand launches/s")  # fmt: skip
    columns = ("ms_per_pair", "pairs_per_second", "of_floor", "mfu", "peak_gib", "cpu_ms_per_step")
    rows = []
    for row in result["rows"]:
        figures = [_shown(row, column) for column in columns]
        rows.append([row["model"], row["variant"], str(row["pairs"]), *figures, row.get("failed", "")])
    header = ["model", "step", "pairs", "ms/pair", "pairs/s", "of floor", "MFU", "GiB", "CPU ms", "failed"]
    return "\n".join([head, "", table(header, rows), "", *_goal_table(result["goals"])])


def _goal_table(found: list[Row]) -> list[str]:
    if not found:
        return []
    rows = []
    for goal in found:
        measured = "not measured" if goal["measured"] is None else f"{goal['measured']:.3g}"
        rows.append([goal["model"], goal["what"], goal["goal"], measured, MET[goal["met"]]])
    return [table(["model", "what", "goal", "measured", "met"], rows)]


def _shown(row: dict[str, Any], column: str) -> str:
    if column not in row:
        return ""
    return f"{row[column]:.1%}" if column in ("of_floor", "mfu") else f"{row[column]:.4g}"
