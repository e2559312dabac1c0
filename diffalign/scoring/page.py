"""The page of scores: the best and the worst pictures of every reward, in one HTML file that needs nothing else."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

from diffalign.data.clips import contact_sheet
from diffalign.data.records import BrokenRow
from diffalign.manifests import Entry
from diffalign.pages import figure_uri, picture_uri, write_html
from diffalign.scoring.files import ScoreRow

SHOWN = 12  # pictures at either end
SIDE = 256  # pixels of a thumbnail
NAMED = 50  # broken rows that are named one by one
NAME = "index.html"


def page_file(place: Path) -> Path:
    """The file that --page names: itself if it ends in .html, else index.html in that folder."""
    return place if place.suffix.lower() in (".html", ".htm") else place / NAME


def write_page(
    path: Path,
    entries: Sequence[Entry],
    rows: Sequence[ScoreRow],
    summary: Mapping[str, Mapping[str, Any]],
    broken: Sequence[BrokenRow],
) -> None:
    """Writes the page in one piece. Shown are the `SHOWN` best and worst of all rows, whatever is kept of them.

    Args:
        entries: of the rows, in their order; those that are shown are opened again.
        summary: of `diffalign.scoring.run.summarize`.
    """
    names = [name for name in summary if name != "weighted" or len(summary) > 2]
    thumbnails: dict[int, str] = {}
    sections = [_section(name, entries, rows, summary[name], thumbnails) for name in names]
    write_html(
        path, "scores.html.j2", sections=sections, count=len(rows), broken=broken[:NAMED], num_broken=len(broken)
    )


def ends(scores: Sequence[float], shown: int = SHOWN) -> tuple[list[int], list[int]]:
    """Indices of the best, best first, and of the worst, worst first; none is in both, and a missing score in neither.

    >>> ends([0.1, float("nan"), 0.3, 0.2], 2)
    ([2, 3], [0])
    """
    order = sorted((i for i, score in enumerate(scores) if not math.isnan(score)), key=lambda i: -scores[i])
    best = order[: min(shown, (len(order) + 1) // 2)]
    return best, order[: len(best) - 1 : -1][:shown]


def _section(
    name: str, entries: Sequence[Entry], rows: Sequence[ScoreRow], facts: Mapping[str, Any], thumbnails: dict[int, str]
) -> dict[str, Any]:
    scores = [row.scores[name] for row in rows]
    parts = [[_figure(i, entries[i], rows[i], name, thumbnails) for i in end] for end in ends(scores)]
    there = [score for score in scores if not math.isnan(score)]
    return {"name": name, **facts, "best": parts[0], "worst": parts[1], "plot": _histogram(there, facts["unit"])}


def _figure(index: int, entry: Entry, row: ScoreRow, name: str, thumbnails: dict[int, str]) -> dict[str, Any]:
    if index not in thumbnails:
        thumbnails[index] = thumbnail(entry)
    return {"uri": thumbnails[index], "score": row.scores[name], "prompt": row.prompt, "image": row.image}


def thumbnail(entry: Entry) -> str:
    """A data URI; "" of a picture that has gone since it was scored."""
    try:
        picture = _quarters(entry.frames()) if entry.clip else entry.open().convert("RGB")
    except ValueError:
        return ""
    picture.thumbnail((SIDE, SIDE))
    return picture_uri(picture, "JPEG", quality=85)


def _quarters(frames: NDArray[np.uint8]) -> Image.Image:
    """Four frames of a clip, two in a row."""
    return contact_sheet(frames[np.linspace(0, len(frames) - 1, 4).round().astype(int)], columns=2)


def _histogram(scores: Sequence[float], unit: str) -> str:
    """How the scores lie, as an SVG in a data URI; "" if there is none."""
    if not scores:
        return ""
    figure = Figure(figsize=(4.2, 1.6), layout="constrained")
    axes = figure.subplots()
    axes.hist(np.array(scores), bins=min(40, max(5, round(len(scores) ** 0.5))), color="#4a7fb5")
    axes.set_xlabel(unit if len(unit) <= 60 else unit[:57] + "...", fontsize=8, parse_math=False)
    axes.set_ylabel("pictures", fontsize=8)
    axes.tick_params(labelsize=7)
    return figure_uri(figure)
