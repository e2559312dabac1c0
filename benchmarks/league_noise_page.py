"""The page of noise optimization's rows: a table and curves, from the rows that have run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from benchmarks.league_page import numbers, table_row
from diffalign.statistics import Interval, bootstrap_mean, mean_gain
from diffalign.writing import write_json, write_text

matplotlib.use("Agg")
import matplotlib.pyplot as plt

FOLDER = Path("docs/league/noise")
PLAIN = "best_of_n"  # its first look is the plain picture, and it is what the others have to beat
HEAD = """# Ways to look for better noise

200 held-out captions of two objects, each with one picture of tiny-sd-turbo in four steps without guidance, and 50
looks, or 200 evaluations of the network, to find a better one. `make league-noise` fills it in,
`benchmarks/league_noise.py` says how. tiny-clip, a learned reward, says which look is the best one; "passes" is the
verifier's verdict on that look, and the verifier cannot be fooled. "Any look" is the share of captions with a look that
passes, whether tiny-clip chose it or not: what lies between the two is lost by the learned reward, not by the search.
Differences are paired, with bootstrap intervals of 95 % over captions. An iteration with a gradient counts as one look,
as papers count, and takes longer: seconds are of one core, a caption, and a row of best_of_n has as many of them as
reno.

"""
COLUMNS = ("row", "passes, %", "over the plain picture", f"over {PLAIN}", "any look, %", "tiny-clip",
           f"tiny-clip over {PLAIN}", "evaluations", "seconds")  # fmt: skip


def write_page(names: Sequence[str], folder: Path = FOLDER) -> None:
    """README.md, noise.json and curves.png."""
    rows = {row["row"]: row for row in map(json.loads, (f.read_text() for f in sorted(folder.glob("rows/*.json"))))}
    found = [entry_of(rows[name], rows[PLAIN]) for name in names if name in rows] if PLAIN in rows else []
    parts = [HEAD, table_row(COLUMNS), table_row(["---", *["---:"] * (len(COLUMNS) - 1)])]
    if found:
        ordered = sorted(found, key=lambda entry: -entry["passes"])
        parts += [_plain_line(rows[PLAIN]), _true_choice(rows[PLAIN]), *map(_line, ordered)]
    parts += [table_row([name, "not run", *[""] * (len(COLUMNS) - 2)]) for name in names
              if name not in [entry["row"] for entry in found]]  # fmt: skip
    if found:
        curves([rows[entry["row"]] for entry in found], folder / "curves.png")
        parts.append("\n![share that passes, and tiny-clip, against evaluations](curves.png)\n")
    write_json(folder / "noise.json", found, indent=1)
    write_text(folder / "README.md", "".join(parts))


def entry_of(row: dict[str, Any], plain: dict[str, Any]) -> dict[str, Any]:
    """A row's numbers at its end, against the plain picture and against best of N."""
    end, before, rival = numbers(row["passed"][-1]), numbers(plain["passed"][0]), numbers(plain["passed"][-1])
    learned, other = np.array(row["learned"][-1]), np.array(plain["learned"][-1])
    return {
        "row": row["row"], "method": row["method"], "options": row["options"], "pay": row["pay"],
        "passes": float(end.mean()), "over_plain": _as_list(before, end), "over_best_of_n": _as_list(rival, end),
        "any_look": float(numbers(row["any"][-1]).mean()), "learned": float(learned.mean()),
        "learned_over_best_of_n": _as_list(other, learned), "evaluations": row["evaluations"],
        "seconds": row["seconds"],
    }  # fmt: skip


def _as_list(base: np.ndarray, now: np.ndarray) -> list[float]:
    gain: Interval = mean_gain(base, now, np.random.default_rng(0))
    return [gain.estimate, gain.low, gain.high]


def _plain_line(row: dict[str, Any]) -> str:
    passed = bootstrap_mean(numbers(row["passed"][0]), np.random.default_rng(0))
    low, high, looks = 100 * passed.low, 100 * passed.high, row["marks"][-1]
    return table_row([
        "plain picture", f"{100 * passed.estimate:.1f} [{low:.1f}, {high:.1f}]", "", "", "",
        f"{np.mean(row['learned'][0]):.2f}", "", f"{row['evaluations'] / looks:.0f}", f"{row['seconds'] / looks:.2f}",
    ])  # fmt: skip


def _true_choice(row: dict[str, Any]) -> str:
    """The same looks, had the verifier chosen among them: no other choice of them does better."""
    before, rival, best = numbers(row["passed"][0]), numbers(row["passed"][-1]), numbers(row["any"][-1])
    return table_row([
        f"{PLAIN}, chosen by the verifier", f"{100 * best.mean():.1f}", _points(_as_list(before, best)),
        _points(_as_list(rival, best)), f"{100 * best.mean():.1f}", "", "", f"{row['evaluations']:.0f}",
        f"{row['seconds']:.1f}",
    ])  # fmt: skip


def _line(entry: dict[str, Any]) -> str:
    same = entry["row"] == PLAIN
    return table_row([
        entry["row"], f"{100 * entry['passes']:.1f}", _points(entry["over_plain"]),
        "" if same else _points(entry["over_best_of_n"]), f"{100 * entry['any_look']:.1f}", f"{entry['learned']:.2f}",
        "" if same else "{:+.2f} [{:+.2f}, {:+.2f}]".format(*entry["learned_over_best_of_n"]),
        f"{entry['evaluations']:.0f}", f"{entry['seconds']:.1f}",
    ])  # fmt: skip


def _points(gain: Sequence[float]) -> str:
    return "{:+.1f} [{:+.1f}, {:+.1f}]".format(*(100 * value for value in gain))


def curves(rows: Sequence[dict[str, Any]], file: Path) -> None:
    """Both judges against evaluations, a line each row; a method whose looks come all at once is a dot."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    titles = ("verifier, share that passes", "tiny-clip")
    for axis, key, title in zip(axes, ("passed", "learned"), titles, strict=True):
        for row in rows:
            x = [row["evaluations"] * mark / row["marks"][-1] for mark in row["marks"]]
            y = [np.mean(numbers(one) if key == "passed" else one) for one in row[key]]
            axis.plot(x, y, marker="o", ms=3 if len(x) > 1 else 6, label=row["row"])
        axis.set(title=title, xlabel="evaluations of the network, a caption")
        axis.grid(alpha=0.3)
    [best] = [row for row in rows if row["row"] == PLAIN]
    x = [best["evaluations"] * mark / best["marks"][-1] for mark in best["marks"]]
    axes[0].plot(x, [numbers(one).mean() for one in best["any"]], "k--", lw=1, label=f"{PLAIN}, chosen by the verifier")
    axes[0].legend(fontsize=7)
    figure.savefig(file, dpi=110, metadata={"Software": None})
    plt.close(figure)
