"""The model card beside every LoRA: what it was made of, what was measured, and how to use it.

Everything on it is read from the run's folder, so it can be written again when an evaluation has come to it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from diffalign.pages import templates
from diffalign.pipelines import SHIPPED
from diffalign.pipelines.export import read_lora
from diffalign.writing import write_json, write_text

CARD, EVALUATION, CONFIG = "README.md", "evaluation.json", "config.yaml"


def write_card(folder: Path) -> Path:
    """Writes folder/README.md of a finished LoRA run; returns the file.

    Raises:
        ValueError: the folder holds no LoRA.
    """
    config = yaml.safe_load((folder / CONFIG).read_text(encoding="utf-8"))
    stored = folder / EVALUATION
    environment = templates(trim_blocks=True, keep_trailing_newline=True)
    environment.filters |= {"said": _said, "interval": _interval}
    facts = json.loads(read_lora(folder).metadata["diffalign"])
    text = environment.get_template("card.md.j2").render(
        facts=facts,
        config=config,
        name=folder.name,
        folder=folder,
        shipped=facts["base_model"] in SHIPPED,
        pairs_a_step=config["train_batch_size"] * config["gradient_accumulation_steps"],
        evaluation=json.loads(stored.read_text(encoding="utf-8")) if stored.exists() else None,
    )
    write_text(folder / CARD, text)
    return folder / CARD


def add_evaluation(folder: Path, report: Mapping[str, Any]) -> None:
    """Keeps an evaluation of a run's LoRA beside it, in place of an earlier one, and writes the card again."""
    write_json(folder / EVALUATION, report)
    write_card(folder)


def _said(section: Mapping[str, Any]) -> str:
    """{"name": "dpo", "beta": 100} -> "dpo, beta 100"."""
    rest = [f"{key} {value}" for key, value in section.items() if key != "name"]
    return ", ".join([str(section["name"]), *rest] if "name" in section else rest)


def _interval(row: Mapping[str, Any], column: str) -> str:
    if row[column] is None:
        return "missing"
    low, high = row[f"{column}_ci95"]
    return f"{row[column]:.3f}" if low is None else f"{row[column]:.3f} [{low:.3f}, {high:.3f}]"
