"""PPD through the trainer: what a run leaves, resumes and refuses, and the command line that draws for a user."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import toy_pairs
from miniatures import FAMILIES, stable_diffusion
from PIL import Image
from safetensors.torch import load_file
from typer.testing import CliRunner

from diffalign.cli import app
from diffalign.generation import generate
from diffalign.pipelines import load_pipeline
from diffalign.pipelines.user_adapter import USER_WEIGHTS, load_user_adapter
from diffalign.trainer import train
from diffalign.users import load_user


def config(tmp_path: Path, **changes: Any) -> dict[str, Any]:
    """Two users with opposite tastes in the same pairs, and one with too few."""
    data = tmp_path / "pairs.parquet"
    if not data.exists():
        rows = toy_pairs.pickapic_rows(12)
        users = [{**row, "user_id": "a"} for row in rows] + [swapped(row) | {"user_id": "b"} for row in rows]
        pq.write_table(pa.Table.from_pylist([*users, {**rows[0], "user_id": "c"}]), data)
    values = {
        "pretrained_model_name_or_path": str(stable_diffusion()),
        "resolution": 32,
        "method": {"name": "ppd", "beta": 100, "user_dropout": 0.1},
        "users": {"name": "clip", "shots": 2},
        "data": {"name": "pickapic", "path": str(data), "val_fraction": 0.25},
        "train_batch_size": 2,
        "learning_rate": 1e-2,
        "max_train_steps": 4,
        "logging_steps": 1,
        "checkpointing_steps": 2,
        "validation_prompts": ["a red circle", "two blue squares"],
        "num_inference_steps": 2,
        "report_to": "none",
        "output_dir": str(tmp_path / "run"),
        "cache_dir": str(tmp_path / "cache"),
    }
    return {**values, **changes}


def swapped(row: dict[str, Any]) -> dict[str, Any]:
    return {**row, "label_0": row["label_1"], "label_1": row["label_0"]}


def metrics(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3", "sd3.5"])
def test_every_family_trains_and_draws_for_its_users(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = FAMILIES[name]()
    with caplog.at_level("INFO", logger="diffalign"):
        result = train(config(tmp_path, pretrained_model_name_or_path=str(folder)))
    assert "2 users with 2 shots each" in caplog.text and "1 users with fewer than 3 training pairs" in caplog.text
    assert "step-0 identity holds" in caplog.text and "labeled both ways" not in caplog.text
    first = next(row for row in metrics(result.folder) if "loss" in row)
    assert first["loss"] == pytest.approx(0.6931472, abs=1e-6) and first["h"] == 0 and first["accuracy"] == 0.5
    assert {"d_w", "d_l"} <= first.keys()
    drifts = [row["validation/pictures/drift"] for row in metrics(result.folder) if "validation/pictures/drift" in row]
    assert drifts[0] == 0 < drifts[-1]
    assert sorted(file.name for file in (result.folder / "users").iterdir()) == ["a.safetensors", "b.safetensors"]
    pipe = load_pipeline(folder)
    base = generate(pipe, ["a red circle"], seeds=[1], steps=2)
    facts = load_user_adapter(pipe, result.folder)
    assert facts["users"] == {"name": "clip", "shots": 2} and facts["method"]["name"] == "ppd"
    a, b = (generate(pipe, ["a red circle"], seeds=[1], steps=2, user=load_user(user, result.folder)) for user in "ab")
    assert not torch.allclose(a, b) and not torch.allclose(a, base)


def test_four_steps_are_two_and_two(tmp_path: Path) -> None:
    whole = train(config(tmp_path, output_dir=str(tmp_path / "whole")))
    half = config(tmp_path, output_dir=str(tmp_path / "halves"), max_train_steps=2)
    train(half)
    resumed = train({**half, "max_train_steps": 4, "resume_from_checkpoint": "latest"})
    ours, theirs = (load_file(run.folder / USER_WEIGHTS) for run in (whole, resumed))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_a_frozen_copy_is_the_same_reference(tmp_path: Path) -> None:
    runs = [train(config(tmp_path, reference=name, output_dir=str(tmp_path / name), max_train_steps=2))
            for name in ("adapter_off", "frozen_copy")]  # fmt: skip
    ours, theirs = (load_file(run.folder / USER_WEIGHTS) for run in runs)
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": "lora"}, "train: user and a method that is told of users go together"),
        ({"method": "dpo", "train": "user"}, "train: user and a method that is told of users go together"),
        ({"reference": "none"}, "needs a reference"),
        ({"init_lora": "x"}, "train: user has none"),
        ({"users": {"name": "clip", "shots": 30}}, "no user has 31 training pairs"),
        ({"users": {"name": "clap"}}, "did you mean 'clip'"),
    ],
)
def test_refusals_are_one_sentence(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train(config(tmp_path, **changes))


def test_rows_without_users_are_refused_in_one_sentence(tmp_path: Path) -> None:
    rows = [{k: v for k, v in row.items() if k != "user_id"} for row in toy_pairs.pickapic_rows(4)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "nameless.parquet")
    nameless = {"name": "pickapic", "path": str(tmp_path / "nameless.parquet")}
    with pytest.raises(ValueError, match="4 broken rows: the row does not say who preferred: give it a user"):
        train(config(tmp_path, data=nameless))


def test_the_command_line_draws_and_evaluates_for_a_user(tmp_path: Path) -> None:
    run = str(train(config(tmp_path, max_train_steps=1)).folder)
    common = ["--model", str(stable_diffusion()), "--prompt", "a red circle", "--steps", "2"]
    drawn = {}
    for user in "ab":
        out = tmp_path / user
        told = ["--user-adapter", run, "--user", user]
        assert CliRunner().invoke(app, ["generate", *common, *told, "--out", str(out)]).exit_code == 0
        drawn[user] = Image.open(io.BytesIO((out / "00000.png").read_bytes())).tobytes()
    assert drawn["a"] != drawn["b"]
    judged = CliRunner().invoke(app, ["evaluate", *common, *told, "--reward", "jpeg", "--json"])
    assert judged.exit_code == 0 and "win_rate" in judged.stdout
    for wrong, message in (
        (["--user-adapter", run], "go together"), (["--user-adapter", run, "--user", "z"], "2 are there: a, b"),
    ):  # fmt: skip
        refused = CliRunner().invoke(app, ["generate", *common, *wrong, "--out", str(tmp_path / "no")])
        assert refused.exit_code != 0 and message in str(refused.exception)


@pytest.mark.slow
def test_tiny_sd_trains_a_few_steps_on_the_shipped_pairs(tmp_path: Path) -> None:
    overrides = ["max_train_steps=6", "data.max_pairs=80", f"output_dir={tmp_path / 'run'}", "validation_prompts=[]",
                 f"cache_dir={tmp_path / 'cache'}", "report_to=none", "logging_steps=1"]  # fmt: skip
    result = train("tiny-sd/ppd", overrides)
    losses = [row["loss"] for row in metrics(result.folder) if "loss" in row]
    assert losses[0] == pytest.approx(0.6931472, abs=1e-6) and len(losses) == 6
    weights = load_file(result.folder / USER_WEIGHTS)
    assert any(value.abs().sum() > 0 for key, value in weights.items() if key.endswith("value.weight"))
