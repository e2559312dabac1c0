"""Training on random miniatures: resume, identity, refusals, and what a run leaves behind."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import toy_pairs
import yaml
from accelerate import Accelerator
from diffusers import DiffusionPipeline
from miniatures import FAMILIES, stable_diffusion
from safetensors import safe_open
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

from diffalign import checkpoint as ckpt
from diffalign import startup
from diffalign import trainer as trainer_module
from diffalign.config import RunConfig, load_config
from diffalign.pipelines import load_pipeline
from diffalign.pipelines.lora import WEIGHTS_NAME, load_lora
from diffalign.run_folder import claim_folder
from diffalign.startup import make_accelerator, prepare_run
from diffalign.tracking import SkippedSteps
from diffalign.trainer import RunResult, Trainer, train


def config(tmp_path: Path, **changes: Any) -> dict[str, Any]:
    data = tmp_path / "data"
    if not data.exists():
        data.mkdir()
        toy_pairs.write("pickapic", data, count=12)
    values = {
        "pretrained_model_name_or_path": str(stable_diffusion()),
        "resolution": 32,
        "lora": {"rank": 2},
        "method": {"name": "dpo", "beta": 100},
        "data": {"name": "pickapic", "path": str(data / "pairs.parquet"), "val_fraction": 0.25},
        "train_batch_size": 2,
        "learning_rate": 1e-2,
        "max_train_steps": 4,
        "logging_steps": 1,
        "checkpointing_steps": 2,
        "report_to": "none",
        "output_dir": str(tmp_path / "run"),
        "cache_dir": str(tmp_path / "cache"),
    }
    return {**values, **changes}


def weights(result: RunResult) -> dict[str, torch.Tensor]:
    return load_file(result.folder / WEIGHTS_NAME)


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def metrics(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


class Reads(TorchDispatchMode):
    """Counts numbers that Python reads out of tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_a_run_trains_and_leaves_what_it_promises(tmp_path: Path) -> None:
    result = train(config(tmp_path, validation_prompts=["a red circle", "two blue squares"]))
    assert result.steps == 4
    rows = metrics(result.folder)
    first = next(row for row in rows if "loss" in row)
    assert first["loss"] == pytest.approx(0.6931472, abs=1e-6)  # ln 2 at the reference
    assert first["h"] == 0 and first["accuracy"] == 0.5
    assert {"d_w", "d_l", "m_w", "r_w", "grad_norm", "h_abs", "h_std"} <= first.keys()
    assert any("validation/accuracy" in row for row in rows)
    assert (result.folder / "samples" / "step-000004.png").is_file()
    drifts = [row["validation/pictures/drift"] for row in rows if "validation/pictures/drift" in row]
    assert len(drifts) == 2 and drifts[0] == 0 < drifts[1]
    assert (result.folder / "config.yaml").is_file()
    pipe = load_pipeline(stable_diffusion())
    load_lora(pipe, result.folder)
    assert any(value.abs().sum() > 0 for name, value in weights(result).items() if "lora_B" in name)


@pytest.mark.parametrize("name", ["sdxl", "sd3", "sd3.5", "sd3-without-t5"])
def test_every_family_trains_from_the_same_config_and_stock_diffusers_loads_the_result(name: str, tmp_path: Path):
    folder = FAMILIES[name]()
    result = train(config(tmp_path, pretrained_model_name_or_path=str(folder), validation_prompts=["a red circle"]))
    first = next(row for row in metrics(result.folder) if "loss" in row)
    assert first["loss"] == pytest.approx(0.6931472, abs=1e-6) and first["h"] == 0
    with safe_open(result.folder / WEIGHTS_NAME, "pt") as stored:
        facts = json.loads(stored.metadata()["diffalign"])
    assert facts["base_model"] == str(folder) and facts["method"] == {"name": "dpo", "beta": 100}
    assert facts["pairs"] == 9 and facts["steps"] == 4 and len(facts["data_sha256"]) == 64
    absent = {"text_encoder_3": None, "tokenizer_3": None} if name == "sd3-without-t5" else {}
    stock = DiffusionPipeline.from_pretrained(folder, **absent)
    stock.load_lora_weights(result.folder)
    pipe = load_pipeline(folder)
    load_lora(pipe, result.folder)
    expected = {key: value for key, value in pipe.network.state_dict().items() if "lora_B" in key}
    network = getattr(stock, pipe.lora_prefix)
    loaded = [value for key, value in network.state_dict().items() if "lora_B" in key]
    assert all(torch.equal(a, b) for a, b in zip(expected.values(), loaded, strict=True))
    assert any(value.abs().sum() > 0 for value in loaded)


@pytest.mark.parametrize("method", [{"name": "dpo", "beta": 100}, {"name": "sft"}])
@pytest.mark.parametrize(("name", "times"), [("sdxl", [249, 499, 749, 999]), ("sd3", [250, 1000])])
def test_any_method_and_family_trains_at_the_times_of_the_config_alone(
    method: dict[str, Any], name: str, times: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: set[float] = set()
    folder = FAMILIES[name]()
    kind = type(load_pipeline(folder))
    predict = kind.predict

    def spy(self: Any, x_t: torch.Tensor, t: torch.Tensor, condition: Any) -> torch.Tensor:
        told.update(self.process.network_time(t).tolist())
        return predict(self, x_t, t, condition)

    monkeypatch.setattr(kind, "predict", spy)
    train(config(tmp_path, pretrained_model_name_or_path=str(folder), method=method, train_timesteps=times,
                 train_batch_size=8))  # fmt: skip
    assert told == set(times)  # of 40 draws and more, so by chance one is missing once in 25,000 seeds


def test_a_resolution_that_the_network_cannot_take_is_refused_before_anything_is_encoded(tmp_path: Path) -> None:
    flow = str(FAMILIES["sd3"]())
    for resolution in (36, 104):
        with pytest.raises(ValueError, match=f"multiples of 8, at most 96, got {resolution} x {resolution}"):
            train(config(tmp_path, pretrained_model_name_or_path=flow, resolution=resolution,
                         output_dir=str(tmp_path / str(resolution))))  # fmt: skip


def test_held_out_rewards_are_logged(tmp_path: Path) -> None:
    result = train(config(tmp_path, validation_prompts=["a red circle"], rewards={"shapes": {"mode": "score"}}))
    rewards = [row["validation/reward/shapes"] for row in metrics(result.folder) if "validation/reward/shapes" in row]
    assert len(rewards) == 2  # before the first step and after the last
    assert all(0 <= value <= 1 for value in rewards)


def test_ten_steps_are_five_and_five(tmp_path: Path) -> None:
    whole = train(config(tmp_path, max_train_steps=10, checkpointing_steps=5, output_dir=str(tmp_path / "whole")))
    half = config(tmp_path, max_train_steps=5, checkpointing_steps=5, output_dir=str(tmp_path / "halves"))
    train(half)
    resumed = train({**half, "max_train_steps": 10, "resume_from_checkpoint": "latest"})
    assert same(weights(whole), weights(resumed))
    key = "loss"
    ours, theirs = ([row[key] for row in metrics(r.folder) if key in row] for r in (whole, resumed))
    assert ours == theirs and len(ours) == 10


def test_the_same_config_gives_the_same_weights_and_another_seed_others(tmp_path: Path) -> None:
    runs = [
        train(config(tmp_path, output_dir=str(tmp_path / f"run{i}"), seed=seed)) for i, seed in enumerate((0, 0, 1))
    ]
    assert same(weights(runs[0]), weights(runs[1]))
    assert not same(weights(runs[0]), weights(runs[2]))


def test_accumulation_equals_a_larger_batch_in_pairs_seen(tmp_path: Path) -> None:
    result = train(config(tmp_path, gradient_accumulation_steps=3))
    assert result.steps == 4


def test_ema_is_what_is_saved(tmp_path: Path) -> None:
    plain = train(config(tmp_path, output_dir=str(tmp_path / "plain")))
    averaged = train(config(tmp_path, output_dir=str(tmp_path / "averaged"), ema_decay=0.9))
    trained = [ckpt.load_tensors(r.folder / "checkpoint-4", "trainable") for r in (plain, averaged)]
    assert same(*trained)  # averaging does not change training
    assert not same(weights(plain), weights(averaged))


def test_full_fine_tuning_with_a_frozen_copy(tmp_path: Path) -> None:
    result = train(config(tmp_path, train="full", reference="frozen_copy", learning_rate=1e-4, max_train_steps=2))
    before, after = load_pipeline(stable_diffusion()), load_pipeline(result.folder / "model")
    changed = [
        not torch.equal(a, b) for a, b in zip(before.network.parameters(), after.network.parameters(), strict=True)
    ]
    assert sum(changed) > len(changed) / 2


def test_frozen_copy_and_adapter_off_are_one_reference(tmp_path: Path) -> None:
    runs = [train(config(tmp_path, reference=name, output_dir=str(tmp_path / name)))
            for name in ("adapter_off", "frozen_copy")]  # fmt: skip
    assert same(*map(weights, runs))


def test_init_lora_continues(tmp_path: Path) -> None:
    first = train(config(tmp_path, output_dir=str(tmp_path / "first")))
    second = train(config(tmp_path, output_dir=str(tmp_path / "second"), init_lora=str(first.folder), max_train_steps=1,
                          learning_rate=1e-9))  # fmt: skip
    for name, value in weights(first).items():
        torch.testing.assert_close(weights(second)[name], value, rtol=0, atol=1e-6)


def test_sft_needs_no_reference(tmp_path: Path) -> None:
    assert train(config(tmp_path, method="sft", reference="none")).steps == 4


def test_bf16_keeps_the_identity_within_its_bound(tmp_path: Path) -> None:
    result = train(config(tmp_path, mixed_precision="bf16", max_train_steps=2))
    assert all(value.dtype == torch.float32 for value in weights(result).values())


def test_non_finite_losses_are_skipped_counted_and_stop_the_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    broken = config(tmp_path, learning_rate=1e30, max_train_steps=30, max_nonfinite_steps=3, max_grad_norm=1e30)
    with pytest.raises(RuntimeError, match="not finite for 3 steps in a row"):
        train(broken)
    assert caplog.text.count("step skipped") == 3


def test_skips_count_in_all_in_a_row_and_the_longest_row() -> None:
    skips = SkippedSteps(torch.device("cpu"), total=1, row=1)
    for flag in (1, 1, 0, 1):
        skips.update(torch.tensor(float(flag)))
    assert skips.read(0, limit=9) == (4, 1, 3)
    skips.update(torch.tensor(1.0))
    assert skips.read(0, limit=9) == (5, 2, 2)


def test_a_skipped_step_changes_neither_weights_nor_the_optimizer(tmp_path: Path) -> None:
    run = Trainer(prepare_run(config(tmp_path), ()))
    run._train_step()
    before = copy.deepcopy((run.optimizer.state_dict()["state"], [p.detach().clone() for p in run.parameters]))
    sound = run.method
    run.method = dataclasses.replace(sound, beta=float("inf"))
    run._train_step()
    assert run.skipped.read(0, limit=9) == (1, 1, 1)
    after = (run.optimizer.state_dict()["state"], [p.detach() for p in run.parameters])
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    run.method = sound
    run._train_step()
    assert run.skipped.read(0, limit=9) == (1, 0, 0)
    assert any(not torch.equal(p, old) for p, old in zip(run.parameters, before[1], strict=True))


def test_gradients_that_overflow_are_a_skipped_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Trainer(prepare_run(config(tmp_path), ()))
    monkeypatch.setattr(trainer_module, "clip", lambda *_: torch.tensor(float("inf")))
    run._train_step()
    assert run.skipped.read(0, limit=9) == (1, 1, 1)


def test_fp16_finds_its_loss_scale_without_counting_skipped_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Accelerate knows fp16 on a GPU only, torch on a CPU too: here with a scale that overflows at first."""

    def in_fp16(config: RunConfig, folder: Path) -> Accelerator:
        accelerator = make_accelerator(dataclasses.replace(config, mixed_precision="no"), folder)
        accelerator.state._mixed_precision, accelerator.native_amp = "fp16", True
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
        return accelerator

    monkeypatch.setattr(startup, "make_accelerator", in_fp16)
    run = Trainer(prepare_run(config(tmp_path, mixed_precision="fp16", max_nonfinite_steps=2), ()))
    before = [p.detach().clone() for p in run.parameters]
    for _ in range(40):
        run._train_step()
    assert run.accelerator.scaler.get_scale() < 2.0**40
    assert run.skipped.read(0, limit=9) == (0, 0, 0)
    assert all(p.isfinite().all() for p in run.parameters)
    assert any(not torch.equal(p, old) for p, old in zip(run.parameters, before, strict=True))


@pytest.mark.parametrize("folder", [pytest.param(make, id=name) for name, make in FAMILIES.items()])
def test_a_step_waits_for_nothing_that_the_device_computes(
    folder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading a number back is a wait on a GPU; here it is only counted: none in a step, some where they are logged."""
    monkeypatch.setattr(Trainer, "_reading_is_free", False)
    values = config(tmp_path, pretrained_model_name_or_path=str(folder()), logging_steps=100, checkpointing_steps=100,
                    ema_decay=0.9)  # fmt: skip
    run = Trainer(prepare_run(values, ()))
    run._train_step()  # the optimizer makes its state
    batch = run._batch(0, run._run(run.policy, 0))  # comes from files, in main memory
    monkeypatch.setattr(run, "_batch", lambda *_: batch)
    with Reads() as reads:
        run._train_step()
        run._after_step(last=False)
    assert reads.count == 0
    with Reads() as reads:
        run._read()
    assert reads.count > 0 and len(run.averages.read()) == 0


def test_checkpoints_are_limited_and_half_written_ones_passed_over(tmp_path: Path) -> None:
    values = config(tmp_path, max_train_steps=6, checkpointing_steps=1, checkpoints_total_limit=2)
    folder = train(values).folder
    assert [c.name for c in ckpt.complete_checkpoints(folder)] == ["checkpoint-5", "checkpoint-6"]
    newest = folder / "checkpoint-6" / "trainable.safetensors"
    newest.write_bytes(newest.read_bytes()[:-10])
    assert ckpt.find_checkpoint(folder, "latest") == folder / "checkpoint-5"
    with pytest.raises(ValueError, match="not a complete checkpoint"):
        ckpt.find_checkpoint(folder, "checkpoint-6")
    assert train({**values, "resume_from_checkpoint": "latest"}).steps == 6


def test_a_folder_with_another_run_is_refused(tmp_path: Path) -> None:
    values = config(tmp_path)
    train(values)
    with pytest.raises(ValueError, match="already holds a run"):
        train(values)
    with pytest.raises(ValueError, match="another learning_rate"):
        train({**values, "learning_rate": 5e-3, "resume_from_checkpoint": "latest"})


def test_rewards_may_change_when_a_run_goes_on_unless_it_trains_on_them(tmp_path: Path) -> None:
    values = config(tmp_path, validation_prompts=["a red circle"], rewards={"shapes": 1.0})
    first = load_config(values)
    claim_folder(tmp_path / "run", first, trains_on_rewards=True)
    other = load_config({**values, "rewards": {"jpeg": 1.0}, "resume_from_checkpoint": "latest"})
    with pytest.raises(ValueError, match="another rewards"):
        claim_folder(tmp_path / "run", other, trains_on_rewards=True)
    assert claim_folder(tmp_path / "run", other, trains_on_rewards=False) is None


def test_a_run_of_an_older_version_goes_on_where_new_keys_have_their_defaults(tmp_path: Path) -> None:
    values = config(tmp_path, max_train_steps=2)
    stored = train(values).folder / "config.yaml"
    old = yaml.safe_load(stored.read_text())
    del old["micro_conditioning"], old["attention"]
    stored.write_text(yaml.safe_dump(old))
    resumed = {**values, "max_train_steps": 3, "resume_from_checkpoint": "latest"}
    with pytest.raises(ValueError, match="another micro_conditioning"):
        train({**resumed, "micro_conditioning": "fixed"})
    assert train(resumed).steps == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reference": "none"}, "needs a reference"),
        ({"rewards": {"shapes": 1.0}}, "validation_prompts"),
        ({"rewards": {"shape": 1.0}, "validation_prompts": ["a red circle"]}, "did you mean 'shapes'"),
        ({"train": "full"}, "no adapter to switch off"),
        ({"train": "full", "reference": "frozen_copy", "init_lora": "x"}, "init_lora continues a LoRA"),
        ({"method": "dpoo"}, "did you mean 'dpo'"),
        ({"reference": "adapter_of"}, "did you mean 'adapter_off'"),
        ({"train_timesteps": [249, 1000]}, "expected times of the model, .* got 1000"),
        (
            {"train_timesteps": [249], "method": {"name": "dpo", "time_high": 0.2}},
            "none of the train_timesteps lies in",
        ),
        ({"train_timesteps": []}, "train_timesteps: expected a list"),
        ({"train_timesteps": [249.5]}, "train_timesteps: expected a list"),
        ({"micro_conditioning": "true"}, "micro_conditioning: expected one of data, fixed"),
        ({"learnin_rate": 1}, "did you mean 'learning_rate'"),
        ({"data": {"name": "pickapic", "path": "/nowhere/at/all"}}, "/nowhere/at/all"),
        ({"pretrained_model_name_or_path": "/nowhere/at/all"}, "/nowhere/at/all"),
        ({"lora": {"rank": 2, "targets": ["nothing"]}}, "lora.targets"),
        ({"cuda_graph": True, "mixed_precision": "fp16"}, "cuda_graph: true needs a CUDA device and mixed_precision"),
        ({"attention": "cudnn"}, "what does: auto, flash, math"),
    ],
)
def test_refusals_are_one_sentence(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train(config(tmp_path, **changes))
