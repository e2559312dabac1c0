"""The league's page and its JSON, from the rows that have run; what has not run is shown as such."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from diffalign.methods import METHODS
from diffalign.shapes.grammar import CATEGORIES, Scene
from diffalign.statistics import Interval, bootstrap_mean, mean_gain
from diffalign.writing import write_json, write_text

PAID = ("d3po", "prdp", "ddpo", "dpok", "grpo", "pref_grpo", "nft", "alignprop", "draft", "draft_lv", "refl",
        "drtune")  # fmt: skip
ELSEWHERE = ("ppd", *PAID)
MODELS = ("tiny-sd", "tiny-sdxl", "tiny-sd3")
HEAD = """# The league

Every method on every shipped model, with the same pictures and labels and at most 20,000 evaluations of the network.
`make league` fills it in, `benchmarks/league.py` says how. Rates are of 540 held-out captions that no setting was
chosen on; an interval is a bootstrap of 95 % over captions, where the mean of a caption's seeds is one value, and that
of a gain is a paired one. "Learned" is tiny-clip, which can be fooled; "distance" is the root mean square difference
from the base model's picture of the same noise, in [0, 1]. Time is of training alone, on the CPU.

Settings are those of configs/tiny-sd on every model, chosen on validation captions of tiny-sd (`python -m
benchmarks.league_tune`, the same budget). Two kinds of methods are not here: ppd needs users and wins by each one's own
taste, `python -m benchmarks.ppd`; those that are paid by a reward need a larger budget and have [a league of their
own](paid/README.md). tiny-sd3 is given 32 tokens of T5 (`max_sequence_length`): it takes a third of the time then.

Read it with this in mind. The pictures are each model's own, drawn at guidance 3, best of four. To imitate them
teaches guidance a second time: SFT on tiny-sd loses with them and stays where it was (-0.6 [-3.3, 2.2] on 360
validation captions) with as many pictures drawn without guidance, with which `dpo` gains less (+1.1 [-2.2, 4.4] in
place of +6.9 [3.3, 10.6]); this was measured once, by demo_sweep.py on pictures of league_data.py with its
GUIDANCE_SCALE at 1. mapo has no reference and the winner's own error in its loss, so it imitates too. Methods that set
a caption against another one of the same picture (tdpo, tkto) strengthen what the caption says, as guidance does, and
at the league's guidance of 4.5 more of it does not help. Methods that draw (seppo, spin, dro, online_dpo) have made 20
to 40 steps when the budget is spent, those that invert (inpo, smpo, inversion_dpo) 16 to 32, where dpo has made 155, so
they end a third as far from the base. With one seed an interval is about two points to either side: inpo and smpo gain
on each of the three models, and one seed is too few to tell that from nothing on two of them.

"""
COLUMNS = (
    "method",
    "seeds",
    "all",
    "gain",
    *CATEGORIES,
    "learned",
    "distance",
    "steps",
    "evaluations per example",
    "time",
)


def write_page(folder: Path, scenes: Sequence[Scene]) -> None:
    """docs/league/README.md and league.json."""
    rows = [json.loads(file.read_text()) for file in sorted((folder / "rows").glob("*.json"))]
    categories = np.array([scene.category for scene in scenes])
    table = [entry for model in MODELS for entry in _of_model(model, rows, categories)]
    write_json(folder / "league.json", table, indent=1)
    parts = [HEAD, verdicts(table, {name: pooled(rows, name) for name in METHODS if name not in ELSEWHERE})]
    for model in MODELS:
        lines = [_line(entry) for entry in table if entry["model"] == model]
        parts += [f"## {model}\n\n", table_row(COLUMNS), table_row(["---"] * len(COLUMNS)), *lines, "\n"]
    write_text(folder / "README.md", "".join(parts))


def pooled(rows: Sequence[dict[str, Any]], method: str) -> Interval | None:
    """The gain of a method over the base in the mean of the models that it ran on, which have the same captions."""
    gains = []
    for model in MODELS:
        base = [row for row in rows if row["model"] == model and row["method"] == "base"]
        own = [numbers(row["passed"]) for row in rows if row["model"] == model and row["method"] == method]
        if base and own:
            gains.append(np.mean(own, 0) - numbers(base[0]["passed"]))
    return bootstrap_mean(np.mean(gains, 0), np.random.default_rng(0)) if gains else None


def verdicts(table: Sequence[dict[str, Any]], together: Mapping[str, Interval | None]) -> str:
    """On how many models each method beats the base with its interval above 0, and what it gains on all `together`."""
    ran: dict[str, list[str]] = {}
    above: dict[str, list[str]] = {}
    for entry in table:
        if entry["method"] != "base" and "gain" in entry:
            ran.setdefault(entry["method"], []).append(entry["model"])
            above.setdefault(entry["method"], []).extend([entry["model"]] * (entry["gain_ci95"][0] > 0))
    if not ran:
        return ""
    twice = [name for name, models in above.items() if len(models) > 1]
    once = [f"{name} ({models[0]}; {_all(ran[name], together.get(name))})"
            for name, models in above.items() if len(models) == 1]  # fmt: skip
    never = [f"{name} ({_all(ran[name], together.get(name))})" for name, models in above.items() if not models]
    said = {"two models or more": twice, "one of those that they ran on": once, "none of them": never}
    lines = [f"- on {where}: {', '.join(names) or 'no method'}\n" for where, names in said.items()]
    return "The gain over the base has its interval above 0\n\n" + "".join(lines) + "\n"


def _all(models: Sequence[str], gain: Interval | None) -> str:
    said = "" if gain is None else f" {100 * gain.estimate:+.1f} [{100 * gain.low:+.1f}, {100 * gain.high:+.1f}]"
    where = "all three" if len(models) == len(MODELS) else " and ".join(models)
    return f"{where}{' together' if len(models) > 1 else ''}{said}"


def _of_model(model: str, rows: Sequence[dict[str, Any]], categories: np.ndarray) -> list[dict[str, Any]]:
    """Base, then methods by their gain, then what has not run."""
    own = [row for row in rows if row["model"] == model]
    base = next((row for row in own if row["method"] == "base"), None)
    if base is None:
        return [{"model": model, "method": name, "seeds": []} for name in ("base", *METHODS) if name not in ELSEWHERE]
    found = [_entry(model, "base", [base], base, categories)]
    done = {name: [row for row in own if row["method"] == name] for name in METHODS if name not in ELSEWHERE}
    ran = [_entry(model, name, some, base, categories) for name, some in done.items() if some]
    found += sorted(ran, key=lambda entry: -entry["gain"])
    return found + [{"model": model, "method": name, "seeds": []} for name, some in done.items() if not some]


def _entry(
    model: str, method: str, rows: Sequence[dict[str, Any]], base: dict[str, Any], categories: np.ndarray
) -> dict[str, Any]:
    marks, before = np.array([numbers(row["passed"]) for row in rows]), numbers(base["passed"])
    gain = mean_gain(before, marks.mean(0), np.random.default_rng(0))
    whole = bootstrap_mean(marks.mean(0), np.random.default_rng(0))
    entry: dict[str, Any] = {
        "model": model, "method": method, "seeds": [row["seed"] for row in rows if row["seed"] is not None],
        "pass_rate": float(marks.mean()), "pass_rate_ci95": [whole.low, whole.high],
        "gain": float((marks.mean(0) - before).mean()), "gain_ci95": [gain.low, gain.high],
        "per_category": {name: _category(marks[:, categories == name]) for name in CATEGORIES},
        "learned": float(np.mean([row["learned"] for row in rows])),
    }  # fmt: skip
    if method != "base":
        entry |= {name: float(np.mean([row[name] for row in rows])) for name in ("drift", "steps", "seconds")}
        entry["evaluations_per_example"] = float(np.mean([row["evaluations"] / row["examples"] for row in rows]))
        entry["gain_by_seed"] = [float(some.mean() - before.mean()) for some in marks]
    return entry


def _category(marks: np.ndarray) -> dict[str, float]:
    interval = bootstrap_mean(marks.mean(0), np.random.default_rng(0))
    return {"rate": float(marks.mean()), "low": interval.low, "high": interval.high}


def _line(entry: dict[str, Any]) -> str:
    if "pass_rate" not in entry:
        return table_row([entry["method"], "not run", *[""] * (len(COLUMNS) - 2)])
    base = entry["method"] == "base"
    low, high = (100 * value for value in entry["gain_ci95"])
    shown = [f"{100 * part['rate']:.1f} ({100 * part['low']:.0f}-{100 * part['high']:.0f})"
             for part in entry["per_category"].values()]  # fmt: skip
    return table_row([
        entry["method"], "" if base else " ".join(map(str, entry["seeds"])), f"{100 * entry['pass_rate']:.1f}",
        "" if base else f"{100 * entry['gain']:+.1f} [{low:+.1f}, {high:+.1f}]", *shown, f"{entry['learned']:.2f}",
        *([""] * 4 if base else [f"{entry['drift']:.3f}", f"{entry['steps']:.0f}",
                                 f"{entry['evaluations_per_example']:.1f}", f"{entry['seconds']:.0f} s"]),
    ])  # fmt: skip


def numbers(marks: str) -> np.ndarray:
    """One number a caption, of "0110..."."""
    return np.array([float(mark) for mark in marks])


def table_row(cells: Sequence[str]) -> str:
    """A line of a Markdown table."""
    return "| " + " | ".join(cells) + " |\n"
