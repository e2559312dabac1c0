"""The page of the rows at the larger budget: a table and the curves of each model, from the rows that have run."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from benchmarks.league_page import numbers, table_row
from diffalign.shapes.grammar import CATEGORIES, Scene
from diffalign.statistics import mean_gain
from diffalign.writing import write_json, write_text

matplotlib.use("Agg")
import matplotlib.pyplot as plt

FOLDER = Path("docs/league/paid")
SHOWN = ("tiny-sd", "tiny-sd3")
HEAD = """# The league of methods that are paid

What methods that are paid by a reward come to in 300,000 evaluations of the network, and the others at that budget.
`make league-paid` fills it in, `benchmarks/league_paid.py` says how. Rollouts, updates and held-out captions have ten
steps and no guidance, "guided" is the gain where the end point is drawn with guidance 4.5; rates are of 540 captions,
with paired bootstrap intervals of 95 %. A name ends in who pays: `verifier`, whose score is a black box, `tiny-clip`, a
learned reward that can be fooled, or `wins`, shares of wins by the verifier's score. "From" is the first of six looks
at which the gain of the pass rate has its interval above 0; "tiny-clip" is the mean of the learned reward, whoever
pays.

Methods that learn from their own steps do so from the first six of ten: "Rollouts" in docs/methods.md says why. A row
takes 40 minutes to an hour of a core.

"""
COLUMNS = ("row", "seeds", "all", "gain", *CATEGORIES, "from", "guided", "tiny-clip", "gain of tiny-clip", "distance",
           "steps", "time")  # fmt: skip


def write_page(names: Sequence[str], scenes: Sequence[Scene], folder: Path = FOLDER) -> None:
    """README.md, league.json, and a picture of the curves per model."""
    rows = [json.loads(file.read_text()) for file in sorted((folder / "rows").glob("*.json"))]
    kinds = np.array([scene.category for scene in scenes])
    table, parts = [], [HEAD]
    for model in SHOWN:
        own = [row for row in rows if row["model"] == model]
        entries = _entries(model, names, own, kinds)
        table += entries
        ran, idle = [row for row in entries if "points" in row], [row["row"] for row in entries if "points" not in row]
        parts.append(f"## {model}\n\n")
        if ran:
            parts += [table_row(COLUMNS), table_row(["---"] * len(COLUMNS)), *map(_line, ran), "\n"]
        if any(entry["seeds"] for entry in ran):
            _curves(ran, folder / f"{model}.png")
            parts.append(f"![pass rate and learned reward against evaluations]({model}.png)\n\n")
        if idle:
            parts.append(textwrap.fill(f"Not run: {', '.join(idle)}.", 120, break_on_hyphens=False) + "\n\n")
    write_json(folder / "league.json", table, indent=1)
    write_text(folder / "README.md", "".join(parts))


def _entries(
    model: str, names: Sequence[str], rows: Sequence[dict[str, Any]], kinds: np.ndarray
) -> list[dict[str, Any]]:
    """Base, then rows by their gain, then what has not run, which has no points."""
    base = next((row for row in rows if row["row"] == "base"), None)
    done = {name: [row for row in rows if row["row"] == name] for name in names}
    idle = [{"model": model, "row": name, "seeds": []} for name, some in done.items() if not some or base is None]
    if base is None:
        return [{"model": model, "row": "base", "seeds": []}, *idle]
    start = {"model": model, "row": "base", "seeds": [], "points": [_point([base], base)], **_rates([base], kinds),
             "guided": _point([base["guided"]], base["guided"])}  # fmt: skip
    ran = [_entry(model, name, some, base, kinds) for name, some in done.items() if some]
    return [start, *sorted(ran, key=lambda entry: -entry["points"][-1]["gain"]), *idle]


def _entry(
    model: str, name: str, rows: Sequence[dict[str, Any]], base: dict[str, Any], kinds: np.ndarray
) -> dict[str, Any]:
    looks = zip(*(row["points"] for row in rows), strict=True)
    points = [_point([base], base), *(_point(look, base) for look in looks)]
    shown = {key: float(np.mean([row[key] for row in rows])) for key in ("drift", "steps", "seconds")}
    guided = _point([row["guided"] for row in rows], base["guided"])
    return {"model": model, "row": name, "seeds": [row["seed"] for row in rows], "points": points, **shown,
            "guided": guided, **_rates([row["points"][-1] for row in rows], kinds)}  # fmt: skip


def _point(looks: Sequence[dict[str, Any]], base: dict[str, Any]) -> dict[str, Any]:
    """One look of some seeds: both judges, each with its paired gain, where a caption's seeds are one value."""
    found: dict[str, Any] = {"evaluations": float(np.mean([look["evaluations"] for look in looks]))}
    for key, read in (("passed", numbers), ("learned", np.array)):
        now, before = np.mean([read(look[key]) for look in looks], 0), read(base[key])
        interval = mean_gain(before, now, np.random.default_rng(0))
        name = "" if key == "passed" else "learned_"
        found |= {f"{name or 'pass_'}mean": float(now.mean()), f"{name}gain": float((now - before).mean()),
                  f"{name}gain_ci95": [interval.low, interval.high]}  # fmt: skip
    return found


def _rates(looks: Sequence[dict[str, Any]], kinds: np.ndarray) -> dict[str, Any]:
    marks = np.mean([numbers(look["passed"]) for look in looks], 0)
    return {"per_category": {kind: float(marks[kinds == kind].mean()) for kind in CATEGORIES}}


def _line(entry: dict[str, Any]) -> str:
    last, rates = entry["points"][-1], [f"{100 * rate:.1f}" for rate in entry["per_category"].values()]
    if entry["row"] == "base":
        guided = f"({100 * entry['guided']['pass_mean']:.1f})"
        return table_row(["base", "", f"{100 * last['pass_mean']:.1f}", "", *rates, "", guided,
                          f"{last['learned_mean']:.2f}", *[""] * 4])  # fmt: skip
    above = [point["evaluations"] for point in entry["points"] if point["gain_ci95"][0] > 0]
    return table_row([
        entry["row"], " ".join(map(str, entry["seeds"])), f"{100 * last['pass_mean']:.1f}",
        _gain(last), *rates, f"{min(above):,.0f}" if above else "not", _gain(entry["guided"]),
        f"{last['learned_mean']:.2f}",
        "{:+.2f} [{:+.2f}, {:+.2f}]".format(last["learned_gain"], *last["learned_gain_ci95"]),
        f"{entry['drift']:.3f}", f"{entry['steps']:.0f}", f"{entry['seconds']:.0f} s",
    ])  # fmt: skip


def _gain(point: dict[str, Any]) -> str:
    """Of the pass rate, in points, with its interval."""
    low, high = (100 * value for value in point["gain_ci95"])
    return f"{100 * point['gain']:+.1f} [{low:+.1f}, {high:+.1f}]"


def _curves(entries: Sequence[dict[str, Any]], file: Path) -> None:
    """Both judges against evaluations, a line each row."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for axis, key, title in zip(
        axes, ("pass_mean", "learned_mean"), ("verifier, share that passes", "tiny-clip"), strict=True
    ):
        for entry in (entry for entry in entries if entry["seeds"]):
            x, y = zip(*((point["evaluations"], point[key]) for point in entry["points"]), strict=True)
            axis.plot(x, y, marker="o", ms=3, label=entry["row"])
        axis.set(title=title, xlabel="evaluations of the network")
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=7)
    figure.savefig(file, dpi=110, metadata={"Software": None})
    plt.close(figure)
