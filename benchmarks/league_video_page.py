"""The page of the video league, from the rows that have run."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.league_page import table_row
from diffalign.statistics import Interval, bootstrap_mean
from diffalign.writing import write_json, write_text

COLUMNS_OF = {"pass": "does what it is told, %", "frames": "frames that show the scene, %", "motion": "pixels gone",
              "flicker": "flicker, %"}  # fmt: skip
PERCENT = ("pass", "frames", "flicker")
HEAD = """# The video league

What preference learning does to motion, on tiny-video: `make league-video` fills it in, and
[league_video.py](../../../benchmarks/league_video.py) says how. All rows have as many pairs of the same captions, with
a label for each third of a clip by what its frames show, never by what moves; `dpo` takes their majority. Figures are
of held-out captions; in brackets the gain over the base, paired by caption and noise, and its bootstrap interval of
95 %. *Pixels gone* is how far the objects of a caption go in the whole clip, of 64, where they are seen; *flicker* is
how often the scene comes or goes from one frame to the next.

"""


def write_page(folder: Path) -> None:
    """README.md and league.json, of what lies in rows/."""
    rows = [json.loads(file.read_text()) for file in sorted((folder / "rows").glob("*.json"))]
    base = next((row for row in rows if row["row"] == "base"), None)
    table = [] if base is None else [entry(name, _named(rows, name), base) for name in _names(rows)]
    write_json(folder / "league.json", table, indent=1)
    lines = [
        table_row(["", "seeds", *COLUMNS_OF.values(), "steps", "time"]),
        table_row(["---"] * (4 + len(COLUMNS_OF))),
    ]
    lines += [_line(found) for found in table]
    write_text(folder / "README.md", HEAD + ("".join(lines) if table else "Nothing has run yet.\n"))


def entry(name: str, rows: Sequence[Mapping[str, Any]], base: Mapping[str, Any]) -> dict[str, Any]:
    """Mean and gain of each column over the seeds of one row."""
    found: dict[str, Any] = {"row": name, "seeds": [row["seed"] for row in rows if row["seed"] is not None]}
    for column in COLUMNS_OF:
        values = np.array([row["found"][column] for row in rows], dtype=float)  # null is NaN
        found[column] = float(np.nanmean(values))
        if name != "base":
            gain = gained(np.array(base["found"][column], dtype=float), values)
            found[f"{column}_gain"] = [gain.estimate, gain.low, gain.high]
    if name != "base":
        found |= {key: float(np.mean([row[key] for row in rows])) for key in ("steps", "evaluations", "seconds")}
    return found


def gained(base: np.ndarray, rows: np.ndarray) -> Interval:
    """The mean over captions of rows [seeds, N] minus base [N], where both have a number."""
    with np.errstate(invalid="ignore"):
        differences = (rows - base)[:, ~np.isnan(base)]
    kept = differences[:, ~np.isnan(differences).all(0)]
    return bootstrap_mean(np.nanmean(kept, 0), np.random.default_rng(0))


def _names(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    return ["base", *sorted({row["row"] for row in rows} - {"base"}, reverse=True)]


def _named(rows: Sequence[Mapping[str, Any]], name: str) -> list[Mapping[str, Any]]:
    return [row for row in rows if row["row"] == name]


def _line(found: Mapping[str, Any]) -> str:
    cells = [found["row"], " ".join(map(str, found["seeds"]))]
    for column in COLUMNS_OF:
        scale = 100 if column in PERCENT else 1
        gain = found.get(f"{column}_gain")
        said = "" if gain is None else " ({:+.1f} [{:+.1f}, {:+.1f}])".format(*(scale * value for value in gain))
        cells.append(f"{scale * found[column]:.1f}{said}")
    cells += [f"{found['steps']:.0f}", f"{found['seconds']:.0f} s"] if "steps" in found else ["", ""]
    return table_row(cells)
