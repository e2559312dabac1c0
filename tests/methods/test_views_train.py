"""Methods of the other views through the trainer, on data in files: a step with every one of them, resume, refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import toy_pairs
from miniatures import FAMILIES, stable_diffusion
from safetensors.torch import load_file

from diffalign.pipelines.lora import WEIGHTS_NAME
from diffalign.trainer import train

METHODS: dict[str, dict[str, Any]] = {
    "rankdpo": {"phi": "scores"},
    "kto": {},
    "tkto": {},
    "mapo": {},
    "capo": {},
    "dspo": {},
    "tdpo": {},
    "dcpo": {},
    "densedpo": {},
    "dpo": {"divergence": "js", "winner_preserving": 0.6},
}
AT_START = {"kto": 0.5, "tkto": 0.5, "tdpo": 0.6931472, "dcpo": 0.6931472, "densedpo": 0.6931472}


def data(folder: Path, count: int = 6) -> dict[str, Any]:
    """Lists of three with shares for scores and a second caption, and pairs with regions: every view finds its own."""
    lines = []
    for i in range(count):
        caption = toy_pairs.CAPTIONS[i % 4]
        for j in range(3):
            (folder / f"{i}-{j}.png").write_bytes(toy_pairs.png(toy_pairs.CAPTIONS[(i + j) % 4], 3 * i + j))
        names = [f"{i}-{j}.png" for j in range(3)]
        lines.append({"prompt": caption, "images": names, "scores": [1.0, 0.5, 0.0],
                      "prompt_loser": toy_pairs.CAPTIONS[(i + 2) % 4]})  # fmt: skip
        if i < 4:
            lines.append({"prompt": caption, "images": names[:2], "scores": [1.0, 0.0],
                          "prompt_loser": toy_pairs.CAPTIONS[(i + 1) % 4], "regions": [[1, 0], [0, -1]]})  # fmt: skip
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return {"name": "jsonl", "path": str(folder), "val_fraction": 0.25}


def config(tmp_path: Path, name: str, **changes: Any) -> dict[str, Any]:
    (tmp_path / "data").mkdir(exist_ok=True)
    values = {
        "pretrained_model_name_or_path": str(stable_diffusion()),
        "resolution": 32,
        "lora": {"rank": 2},
        "method": {"name": name, **METHODS[name]},
        "data": data(tmp_path / "data"),
        "train_batch_size": 2,
        "learning_rate": 1e-2,
        "max_train_steps": 2,
        "logging_steps": 1,
        "checkpointing_steps": 1,
        "report_to": "none",
        "output_dir": str(tmp_path / "run"),
        "cache_dir": str(tmp_path / "cache"),
    }
    return {**values, **changes}


def rows(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", METHODS)
def test_a_run_trains_and_goes_on_where_it_was_stopped(name: str, tmp_path: Path) -> None:
    whole = train(config(tmp_path, name))
    first = next(row for row in rows(whole.folder) if "loss" in row)
    if name in AT_START:
        assert first["loss"] == pytest.approx(AT_START[name], abs=1e-6)
    if name != "mapo":
        assert first["accuracy"] == 0.5 and first["d_w"] == first["d_l"] == 0
    assert any("validation/loss" in row for row in rows(whole.folder))
    part = config(tmp_path, name, output_dir=str(tmp_path / "part"), max_train_steps=1)
    train(part)
    resumed = train({**part, "max_train_steps": 2, "resume_from_checkpoint": "latest"})
    one, other = (load_file(run.folder / WEIGHTS_NAME) for run in (whole, resumed))
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert any(value.abs().sum() > 0 for key, value in one.items() if "lora_B" in key)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["sdxl", "sd3"])
@pytest.mark.parametrize("name", METHODS)
def test_every_family_trains(name: str, family: str, tmp_path: Path) -> None:
    """Random weights in the hub's layout; no real checkpoint has been trained by these tests."""
    result = train(config(tmp_path, name, pretrained_model_name_or_path=str(FAMILIES[family]())))
    assert result.steps == 2 and any(v.abs().sum() > 0 for v in load_file(result.folder / WEIGHTS_NAME).values())


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in METHODS if name not in ("densedpo",)])
def test_tiny_sd_takes_a_few_steps(name: str, tmp_path: Path) -> None:
    """The packaged config on the shipped model and pairs, cut to four steps of four."""
    result = train(f"tiny-sd/{name}", [
        "data.max_pairs=16", "data.val_fraction=0.25", "train_batch_size=4", "max_train_steps=4", "report_to=none",
        "logging_steps=1", "validation_prompts=[]", f"output_dir={tmp_path / 'run'}", f"cache_dir={tmp_path / 'cache'}",
    ])  # fmt: skip
    losses = [row["loss"] for row in rows(result.folder) if "loss" in row]
    assert len(losses) == 4 and all(torch.tensor(losses).isfinite())


@pytest.mark.parametrize(
    ("name", "line", "message"),
    [
        ("dcpo", {"chosen": "a.png", "rejected": "b.png"}, "the loser has no caption of its own"),
        ("densedpo", {"chosen": "a.png", "rejected": "b.png"}, "no labels of parts"),
        ("densedpo", {"chosen": "a.png", "rejected": "b.png", "segments": [1, 0]}, "do not match the frame count"),
        ("densedpo", {"chosen": "a.png", "rejected": "b.png", "regions": [[0]]}, "no usable training example"),
        ("rankdpo", {"images": ["a.png"], "scores": [1]}, "one picture cannot be ranked"),
        ("rankdpo", {"images": ["a.png", "b.png"], "scores": [1, 1]}, "no usable training example; .* 1 ties"),
        ("rankdpo", {"images": ["a.png", "b.png"], "scores": [21, 20]}, r"expected scores in \[0, 1\]"),
        ("tdpo", {"prompt": "xyzzy", "image": "a.png", "liked": True}, "know no word of this caption"),
    ],
)
def test_data_that_a_method_cannot_use_are_one_sentence(
    name: str, line: dict[str, Any], message: str, tmp_path: Path
) -> None:
    values = config(tmp_path, name)
    folder = tmp_path / "bad"
    folder.mkdir()
    for picture in ("a.png", "b.png"):
        (folder / picture).write_bytes(toy_pairs.png("a red circle", ord(picture[0])))
    (folder / "metadata.jsonl").write_text(json.dumps({"prompt": "a red circle", **line}))
    with pytest.raises(ValueError, match=message) as refused:
        train({**values, "data": {"name": "jsonl", "path": str(folder)}})
    assert "\n" not in str(refused.value)
