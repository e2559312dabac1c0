"""The page of `diffalign optimize-noise`: before, after and on the way, with curves, in one file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from diffalign.pages import figure_uri, picture_uri, write_html

STRIP = "strip.png"  # pictures on the way, in a prompt's folder
IN_FULL = 40  # prompts with pictures and curves; the others are a line in the table
SIDE = 512  # pixels of a picture on the page, at most


@dataclass(frozen=True)
class Shown:
    """A prompt's result as it lies in its folder."""

    folder: Path
    report: dict[str, Any]


def write_noise_page(path: Path, model: str, results: Sequence[Shown]) -> None:
    """Writes the page in one piece; pictures are those of the folders."""
    names = list(results[0].report["best"]["rewards"]) if results else []
    rows = [row(one, number, names) for number, one in enumerate(results)]
    settings = results[0].report["settings"] if results else {}
    write_html(path, "noise.html.j2", model=model, names=names, rows=rows, settings=settings,
               parts=[part(one, number) for number, one in enumerate(results[:IN_FULL])])  # fmt: skip


def row(one: Shown, number: int, names: Sequence[str]) -> dict[str, Any]:
    """A line of the table: totals and rewards before and after."""
    first, best = one.report["first"], one.report["best"]
    numbers = [(first["total"][0], best["total"][0]),
               *((first["rewards"][name][0], best["rewards"][name][0]) for name in names)]  # fmt: skip
    return {"prompt": one.report["prompts"][0], "seed": one.report["seeds"][0], "numbers": numbers,
            "looks": len(one.report["history"]), "interrupted": one.report["interrupted"],
            "full": number < IN_FULL, "folder": one.folder.name}  # fmt: skip


def part(one: Shown, number: int) -> dict[str, Any]:
    """A prompt in full."""
    pictures = {kind: Image.open(one.folder / f"{kind}-0000.png").convert("RGB") for kind in ("first", "best")}
    for picture in pictures.values():
        picture.thumbnail((SIDE, SIDE))
    strip = one.folder / STRIP
    return {
        "prompt": one.report["prompts"][0], "folder": one.folder.name, "iteration": one.report["best"]["iteration"][0],
        "looks": len(one.report["history"]), "first": picture_uri(pictures["first"]),
        "best": picture_uri(pictures["best"]), "curves": figure_uri(curves(one.report["history"])),
        "strip": picture_uri(Image.open(strip)) if strip.exists() else "",
    }  # fmt: skip


def curves(history: Sequence[dict[str, Any]]) -> Figure:
    """The mean over prompts of total, each reward and the norm, look by look; history as in noise.json."""
    names = [name for name in history[0] if name != "ends"]
    figure = Figure(figsize=(2.9 * len(names), 2.1), layout="constrained")
    for axis, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        known = [[value for value in look[name] if value is not None] for look in history]
        values = np.array([np.mean(some) if some else np.nan for some in known])
        axis.plot(values, marker="." if len(values) < 30 else "", color="#2f6fb0")
        axis.set_title(name, fontsize=9)
        axis.set_xlabel("look", fontsize=8)
        axis.tick_params(labelsize=7)
        axis.grid(alpha=0.3)
    return figure
