"""Whole runs of methods that draw and are paid: resumed, on every family, and refused where they cannot work."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from miniatures import FAMILIES
from test_trainer import config, metrics, same, weights

from diffalign.methods.grpo import GRPO
from diffalign.refusals import refuse_uneven_groups
from diffalign.rewards.base import Card
from diffalign.startup import prepare_run
from diffalign.trainer import train

WALK = {"steps": 3, "guidance": 2.0}
VERIFIER = {"rewards": {"shapes": {"mode": "score"}, "jpeg": {"weight": 1e-3}}}
WINS = {"rewards": {"winrate": {"preference": {"name": "reward", "rewards": {"jpeg": 1.0}}}}}
LEARNED = {"rewards": {"clip": {"model": "tiny-clip"}}}
RUNS: dict[str, dict[str, Any]] = {
    "ddpo": {"method": {"name": "ddpo", **WALK}, **VERIFIER},
    "dpok": {"method": {"name": "dpok", "store": "float16", **WALK}, **VERIFIER},
    "grpo": {"method": {"name": "grpo", "group": 2, "combine": "per_reward", **WALK}, **VERIFIER},
    "pref_grpo": {
        "method": {"name": "pref_grpo", "group": 2, **WALK},
        **WINS,
    },
    "d3po": {"method": {"name": "d3po", "mode": "pairs", **WALK}, **VERIFIER},
    "prdp": {"method": {"name": "prdp", "group": 2, "updates": 2, **WALK}, **VERIFIER},
    "nft": {"method": {"name": "nft", "group": 2, **WALK}, **VERIFIER},
    "draft": {"method": {"name": "draft", "last": 2, **WALK}, **LEARNED},
    "alignprop": {"method": {"name": "alignprop", **WALK}, **LEARNED},
    "draft_lv": {"method": {"name": "draft_lv", **WALK}, **LEARNED},
    "refl": {"method": {"name": "refl", "late": 2, "goal": None, **WALK}, **LEARNED},
    "drtune": {"method": {"name": "drtune", "late": 1, "trained": 2, "kl_weight": 0.1, **WALK}, **LEARNED},
}


class Never:
    """A reward that is never to be had."""

    name = "never"
    card = Card(unit="", range=(0.0, 1.0), source="", code="", weights="", differentiable=False, side=None,
                across_prompts=True, checked="formula only")  # fmt: skip

    def __call__(self, images: Any, prompts: Sequence[str]) -> torch.Tensor:
        raise ConnectionError("no server")


def values(tmp_path: Path, name: str, **changes: Any) -> dict[str, Any]:
    plain = config(tmp_path)
    return {**plain, **RUNS[name], "data": {**plain["data"], "val_fraction": 0.0}, **changes}


@pytest.mark.parametrize("name", ["ddpo", "prdp", "nft", "draft"])
def test_a_resumed_run_draws_what_the_whole_one_drew(name: str, tmp_path: Path) -> None:
    whole = train(values(tmp_path, name, output_dir=str(tmp_path / "whole")))
    half = values(tmp_path, name, max_train_steps=2, output_dir=str(tmp_path / "halves"))
    train(half)
    resumed = train({**half, "max_train_steps": 4, "resume_from_checkpoint": "latest"})
    assert same(weights(whole), weights(resumed))


@pytest.mark.parametrize("name", [name for name in RUNS if name not in ("ddpo", "prdp", "nft", "draft")])
def test_each_learns_from_its_rewards(name: str, tmp_path: Path) -> None:
    rows = metrics(train(values(tmp_path, name, max_train_steps=1)).folder)
    first = next(row for row in rows if "loss" in row)
    assert {"reward", "missing", "grad_norm"} <= first.keys() and first["missing"] == 0
    assert first.get("ratio_off", 0) <= 1e-6


@pytest.mark.parametrize("family", ["sdxl", "sd3"])
@pytest.mark.parametrize("name", ["grpo", "draft"])
def test_every_family_is_paid(name: str, family: str, tmp_path: Path) -> None:
    folder = str(FAMILIES[family]())
    result = train(values(tmp_path, name, pretrained_model_name_or_path=folder, max_train_steps=1))
    assert any("reward" in row for row in metrics(result.folder))


def test_a_reward_that_fails_drops_pictures_and_not_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    lost = {"rewards": {"test_paid_runs:Never": 1.0}, "reward_retries": 0}
    with caplog.at_level(logging.WARNING):
        result = train(values(tmp_path, "ddpo", **lost, max_train_steps=2))
    assert "100% of a step's pictures have no score" in caplog.text
    rows = [row for row in metrics(result.folder) if "loss" in row]
    assert result.steps == 2 and all(row["missing"] == 1 and row["loss"] == 0 for row in rows)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("draft", VERIFIER, "'draft' needs rewards with a gradient, and shapes, jpeg has none: .* such as ddpo, grpo"),
        ("pref_grpo", VERIFIER, "none of the rewards compares"),
        (
            "pref_grpo",
            {"rewards": {"jpeg": 1.0, "winrate": {"weight": 0, **WINS["rewards"]["winrate"]}}},
            "none of the rewards compares",
        ),
        ("ddpo", {"rewards": {}}, "scores what it draws: set rewards"),
        ("prdp", {"checkpointing_steps": 3}, "checkpointing_steps: expected a multiple of method.updates, which is 2"),
        ("prdp", {"max_train_steps": 5}, "max_train_steps: expected a multiple of method.updates"),
        ("ddpo", {"lora": {"rank": 2, "dropout": 0.1}}, "lora.dropout: expected 0 with method 'ddpo'"),
        ("nft", {"train": "full", "reference": "frozen_copy"}, "'nft' compares with the base model under a LoRA"),
        ("ddpo", {"reward_timeout": 0}, "reward_timeout: expected seconds above 0"),
        ("grpo", {"method": {"name": "grpo", "group": 1}}, "at least 2 pictures of a prompt"),
        (
            "grpo",
            {"method": {"name": "grpo", "group": 2, "spread": True, **WALK}, **WINS},
            "method.spread: winrate compares the pictures of a prompt, and each rank has only a part",
        ),
    ],
)
def test_what_cannot_work_is_refused(name: str, changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        prepare_run(values(tmp_path, name, **changes), [])


def test_a_group_that_ranks_cannot_share_evenly_is_refused() -> None:
    with pytest.raises(ValueError, match="expected method.group to be a multiple of 3, got 4"):
        refuse_uneven_groups(GRPO(group=4, spread=True), 3)
    refuse_uneven_groups(GRPO(group=4), 3)
    refuse_uneven_groups(GRPO(group=6, spread=True), 3)


def test_a_replay_that_is_another_network_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffalign.transition import Gaussian

    true = Gaussian.log_prob
    calls: list[int] = []

    def drifting(law: Gaussian, x: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return true(law, x) + 1e-4 * len(calls)

    monkeypatch.setattr(Gaussian, "log_prob", drifting)
    with pytest.raises(RuntimeError, match="a step's ratio to its rollout must be 1, and it is off by"):
        train(values(tmp_path, "ddpo"))
