"""The demo's page: pictures side by side, curves, the table per category, in one self-contained HTML file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from PIL import Image

from diffalign.pages import figure_uri, picture_uri, write_html
from diffalign.prompts import Prompt

Example = tuple[Prompt, Image.Image, Image.Image, bool, bool]  # prompt, before, after, passed before, passed after
Metrics = Sequence[dict[str, float]]

SHOWN_PER_CATEGORY = 12
CURVES = (
    ("dpo", "loss", "DPO loss (ln 2 at the start)"),
    ("dpo", "accuracy", "implicit accuracy"),
    ("dpo", "d_w", "winner's excess error d_w"),
    ("dpo", "d_l", "loser's excess error d_l"),
    ("dpo", "h_abs", "|logit|"),
    ("sft", "loss", "SFT loss"),
)


def write_report(
    path: Path, report: dict[str, Any], examples: Sequence[Example], curves: Mapping[str, Metrics]
) -> None:
    """Writes the page in one piece.

    Args:
        report: the content of report.json.
        examples: every draw; the first few of each category are shown, not picked by their outcome.
        curves: metrics.jsonl of the runs "dpo" and "sft".
    """
    plots = [_plot(curves[run], key, title) for run, key, title in CURVES]
    write_html(path, "demo.html.j2", report=report, groups=_groups(examples), plots=plots)


def _groups(examples: Sequence[Example]) -> dict[str, list[dict[str, Any]]]:
    groups: dict[str, list[dict[str, Any]]] = {}
    for prompt, before, after, passed_before, passed_after in examples:
        group = groups.setdefault(str(prompt.category), [])
        if len(group) < SHOWN_PER_CATEGORY:
            group.append({"prompt": prompt.text, "before": picture_uri(before), "after": picture_uri(after),
                          "passed_before": passed_before, "passed_after": passed_after})  # fmt: skip
    return groups


def _plot(metrics: Metrics, key: str, title: str) -> dict[str, str]:
    """One small curve as inline SVG, training and, where there is one, validation."""
    figure = Figure(figsize=(3.6, 2.2), layout="constrained")
    axes = figure.subplots()
    for prefix, style in (("", "-"), ("validation/", "o--")):
        points = [(row["step"], row[prefix + key]) for row in metrics if prefix + key in row]
        if points:
            axes.plot(*zip(*points, strict=True), style, label="validation" if prefix else "training", markersize=4)
    axes.set_title(title, fontsize=9)
    axes.set_xlabel("step", fontsize=8)
    axes.tick_params(labelsize=7)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    return {"title": title, "uri": figure_uri(figure)}
