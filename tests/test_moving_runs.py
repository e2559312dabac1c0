"""Whole runs with what moves: references, selections, pictures drawn on the way, and an early stop."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from miniatures import FAMILIES
from PIL import Image
from test_trainer import config, metrics, same, weights

from diffalign import checkpoint as ckpt
from diffalign import trainer as trainer_module
from diffalign.pipelines.lora import WEIGHTS_NAME
from diffalign.trainer import train

DRAWN = {"steps": 2, "guidance": 2.0, "reuse": 2}
REWARD = {"rewards": {"shapes": {"mode": "score"}}}
RUNS: dict[str, dict[str, Any]] = {
    "ema": {"reference": {"name": "ema", "decay": 0.5}},
    "stages": {"reference": {"name": "stages", "steps": [1, 3]}},
    "seppo": {"method": {"name": "seppo", "beta": 100, **DRAWN}, "reference": {"name": "pool", "every": 1, "size": 2}},
    "online_dpo": {"method": {"name": "online_dpo", "beta": 100, "group": 2, "eta": 1.0, **DRAWN}, **REWARD,
                   "reference": {"name": "sync", "every": 1}},
    "dro": {"method": {"name": "dro", "margin": 0.1, "steps": 2}},
    "margin": {"selection": {"name": "margin", "keep": 0.5, "every": 1, "draws": 2}},
}  # fmt: skip


def values(tmp_path: Path, name: str, **changes: Any) -> dict[str, Any]:
    plain = config(tmp_path)
    data = {**plain["data"], "val_fraction": 0.0}
    return {**plain, **RUNS[name], "data": data, **changes}


@pytest.mark.parametrize("name", RUNS)
def test_a_resumed_run_repeats_what_moves(name: str, tmp_path: Path) -> None:
    whole = train(values(tmp_path, name, output_dir=str(tmp_path / "whole")))
    half = values(tmp_path, name, max_train_steps=2, output_dir=str(tmp_path / "halves"))
    train(half)
    resumed = train({**half, "max_train_steps": 4, "resume_from_checkpoint": "latest"})
    assert same(weights(whole), weights(resumed))
    kept = {"margin": "selection", "dro": "nothing"}.get(name, "reference")
    for stem in ("reference", "selection"):
        files = [r.folder / "checkpoint-4" / f"{stem}.safetensors" for r in (whole, resumed)]
        assert files[0].is_file() == files[1].is_file() == (stem == kept)
        if files[0].is_file():
            assert same(*(ckpt.load_tensors(file.parent, stem) for file in files))


def test_a_reference_that_has_not_moved_yet_is_the_start_in_16_bit_too(tmp_path: Path) -> None:
    """Under autocast, which remembers 16-bit copies of weights by the parameter."""
    still = {"sync": {"name": "sync", "every": 100}, "frozen_copy": {"name": "frozen_copy"}}
    runs = [train(values(tmp_path, "ema", reference=section, mixed_precision="bf16", output_dir=str(tmp_path / name)))
            for name, section in still.items()]  # fmt: skip
    assert same(*map(weights, runs))


@pytest.mark.parametrize("family", ["sdxl", "sd3"])
@pytest.mark.parametrize("name", ["seppo", "online_dpo", "dro"])
def test_every_family_draws(name: str, family: str, tmp_path: Path) -> None:
    folder = str(FAMILIES[family]())
    result = train(values(tmp_path, name, pretrained_model_name_or_path=folder, max_train_steps=1))
    first = next(row for row in metrics(result.folder) if "loss" in row)
    if name != "dro":
        assert first["h"] == 0 and first["d_w"] == first["d_l"] == 0
    assert {"m_w", "m_l", "accuracy", "grad_norm"} <= first.keys()


def test_a_curriculum_goes_by_the_scores_of_the_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Six prompts' rankings of known gaps: the first stage trains on the two largest alone."""
    plain = config(tmp_path)
    lines = []
    for number in range(6):
        names = []
        for which in range(2):
            names.append(f"{number}-{which}.png")
            _picture(tmp_path / "data" / names[-1], number * 40, which * 200)
        lines.append({"prompt": f"picture {number}", "images": names, "scores": [number / 10, 0.0]})
    (tmp_path / "data" / "ranked.jsonl").write_text("\n".join(map(json.dumps, lines[1:])))
    data = {"name": "jsonl", "path": str(tmp_path / "data" / "ranked.jsonl"), "val_fraction": 0.0}
    seen: list[set[str]] = []
    learn = trainer_module.Trainer._batch

    def spy(self: Any, *arguments: Any) -> Any:
        batch = learn(self, *arguments)
        seen.append(set(batch.prompts))
        return batch

    monkeypatch.setattr(trainer_module.Trainer, "_batch", spy)
    train({**plain, "data": data, "method": {"name": "curriculum_dpo", "beta": 100},
           "selection": {"name": "curriculum", "parts": 2, "every": 2, "most": 4}})  # fmt: skip
    early, late = seen[:2], seen[2:]
    assert set().union(*early) == {"picture 4", "picture 5"}
    assert set().union(*late) == {f"picture {number}" for number in (2, 3, 4, 5)}


def _picture(path: Path, red: int, blue: int) -> None:
    Image.new("RGB", (32, 32), (red, 100, blue)).save(path)


def scripted(monkeypatch: pytest.MonkeyPatch, accuracies: list[float]) -> list[float]:
    """Validations find these accuracies, one after the other; returns what is left of them."""
    left = list(accuracies)
    monkeypatch.setattr(trainer_module, "held_out_metrics", lambda *_: {"validation/accuracy": left.pop(0)})
    return left


STOPPING = {"validation_steps": 1, "early_stopping_patience": 2, "max_train_steps": 9, "checkpointing_steps": 1,
            "checkpoints_total_limit": None}  # fmt: skip


def test_an_early_stop_keeps_the_best_weights_and_stays_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = scripted(monkeypatch, [0.5, 0.7, 0.7, 0.6, 0.9])
    run = config(tmp_path, **{**STOPPING, "checkpointing_steps": 5})
    result = train(run)
    assert result.steps == 3 and left == [0.9] and not result.interrupted
    assert (result.folder / "checkpoint-3").is_dir()  # where it stopped, though none was due
    best = ckpt.load_tensors(result.folder / "checkpoint-3", "best")
    kept = weights(result)
    assert sorted(float(value.abs().sum()) for value in best.values()) == sorted(
        float(value.abs().sum()) for value in kept.values()
    )
    (result.folder / WEIGHTS_NAME).unlink()
    again = train({**run, "resume_from_checkpoint": "latest"})
    assert again.steps == 3 and left == [0.9] and same(weights(again), kept)


def test_an_early_stop_is_the_same_after_a_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    accuracies = [0.5, 0.7, 0.6, 0.6]
    scripted(monkeypatch, accuracies)
    whole = train(config(tmp_path, **STOPPING, output_dir=str(tmp_path / "whole")))
    half = config(tmp_path, **{**STOPPING, "max_train_steps": 2}, output_dir=str(tmp_path / "halves"))
    scripted(monkeypatch, accuracies)
    train(half)
    resumed = train({**half, "max_train_steps": 9, "resume_from_checkpoint": "latest"})
    assert whole.steps == resumed.steps == 3 and same(weights(whole), weights(resumed))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reference": {"name": "pool", "size": 0}}, "an empty pool has no reference to offer"),
        ({"reference": "sync", "cuda_graph": True}, "reference 'sync' moves"),
        ({"selection": {"name": "curriculum"}}, "all gaps here are 1: give the data scores"),
        ({"selection": {"name": "margin", "draws": 1}}, "draws of at least 2"),
        ({"method": "sft", "selection": "margin"}, "goes by the logit h of pairs, and method 'sft' has none"),
        ({"early_stopping_patience": 2}, "set validation_steps"),
        ({"method": {"name": "online_dpo", "steps": 1}}, "set rewards, such as"),
        ({"method": {"name": "online_dpo", "steps": 1}, "data": None, **REWARD}, "needs prompts: set data"),
        ({"method": {"name": "seppo"}, "reference": "none"}, "needs a reference"),
    ],
)
def test_refusals_leave_the_folder_free(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train({key: value for key, value in config(tmp_path, **changes).items() if value is not None})
    if changes.get("selection") != "margin":  # that one is seen at the first batch, in a run that has begun
        assert not (tmp_path / "run" / "config.yaml").exists()


def test_an_early_stop_without_held_out_pairs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="goes by held-out examples, and there are none"):
        train(values(tmp_path, "ema", **STOPPING))


def test_reference_weights_in_a_checkpoint_are_of_the_documented_step(tmp_path: Path) -> None:
    result = train(values(tmp_path, "stages", checkpointing_steps=1, checkpoints_total_limit=None))
    trained = {step: ckpt.load_tensors(result.folder / f"checkpoint-{step}", "trainable") for step in (1, 2, 3, 4)}
    for step, of in ((1, 1), (2, 1), (3, 3), (4, 3)):
        assert same(ckpt.load_tensors(result.folder / f"checkpoint-{step}", "reference"), trained[of])
    assert not torch.equal(*(next(reversed(trained[step].values())) for step in (1, 3)))
