"""Gradient checkpointing is decided by counting, and a run that does not fit says by how much and what would help."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from miniatures import FAMILIES, stable_diffusion_xl
from test_trainer import config as run_config

from diffalign.config import RunConfig, load_config
from diffalign.estimate import estimate
from diffalign.memory import USABLE, memory_budget, smaller, with_checkpointing_planned
from diffalign.startup import prepare_run
from diffalign.trainer import train


def config(**keys: Any) -> RunConfig:
    model = {"pretrained_model_name_or_path": str(stable_diffusion_xl()), "resolution": 64, "mixed_precision": "bf16",
             "train_batch_size": 8, "data": {"name": "pickapic", "path": "x"}}  # fmt: skip
    return load_config({**model, **keys})


def needs(**keys: Any) -> float:
    return estimate(config(**keys)).total_bytes / USABLE


def test_checkpointing_is_on_only_when_the_run_would_not_fit_without() -> None:
    without, within = needs(gradient_checkpointing=False), needs(gradient_checkpointing=True)
    assert within < 0.8 * without
    assert with_checkpointing_planned(config(), 1.01 * without).gradient_checkpointing is False
    assert with_checkpointing_planned(config(), 0.99 * without).gradient_checkpointing is True
    assert with_checkpointing_planned(config(), 1.01 * within).gradient_checkpointing is True
    assert with_checkpointing_planned(config(), None).gradient_checkpointing is False  # a CPU is not limited
    asked = config(gradient_checkpointing=True)
    for budget in (None, 10 * without):
        assert with_checkpointing_planned(asked, budget).gradient_checkpointing is True


def test_what_does_not_fit_says_by_how_much_and_what_helps() -> None:
    within = needs(gradient_checkpointing=True)
    with pytest.raises(ValueError, match=r"needs about .* GB too few; lower train_batch_size, and raise"):
        with_checkpointing_planned(config(), 0.9 * within)
    with pytest.raises(ValueError, match="set gradient_checkpointing: true"):
        with_checkpointing_planned(config(gradient_checkpointing=False), 1.1 * within)


def test_the_advice_goes_on_to_the_next_setting() -> None:
    assert smaller(config(mixed_precision="no")) == "set mixed_precision: bf16"
    last = {"gradient_checkpointing": True, "train_batch_size": 1}
    assert "lower resolution" in smaller(config(**last))
    assert smaller(config(**last, train="full")) == "set train: lora"


def test_the_budget_is_what_is_set_else_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    assert memory_budget(config(memory_gb=12), torch.device("cpu")) == 12e9
    assert memory_budget(config(), torch.device("cpu")) is None
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (5, 100))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 7)
    assert memory_budget(config(), torch.device("cuda")) == 12
    with pytest.raises(ValueError, match="memory_gb: expected a number above 0"):
        config(memory_gb=0)


@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3"])
def test_training_follows_the_plan(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    values = run_config(tmp_path, pretrained_model_name_or_path=str(FAMILIES[name]()), train_batch_size=8)
    without, within = (estimate(load_config({**values, "gradient_checkpointing": on})).total_bytes / USABLE / 1e9
                       for on in (False, True))  # fmt: skip
    caplog.set_level(logging.INFO, "diffalign")
    for number, (budget, expected) in enumerate([(1.01 * without, False), ((without + within) / 2, True)]):
        run = prepare_run({**values, "memory_gb": budget, "output_dir": str(tmp_path / f"run-{number}")}, ())
        assert run.config.gradient_checkpointing is expected
        assert run.pipe.network.is_gradient_checkpointing is expected
    assert "with gradient checkpointing" in caplog.text
    with pytest.raises(ValueError, match="GB too few; "):
        train({**values, "memory_gb": 0.5 * within, "output_dir": str(tmp_path / "run-small")})
