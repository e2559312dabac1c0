"""Training in processes of its own: killed, ended politely, and on two ranks, as wrapped networks and as shards."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from diffusers import StableDiffusionPipeline
from miniatures import stable_diffusion
from PIL import Image
from safetensors.torch import load_file
from test_trainer import config, same

from diffalign import checkpoint as ckpt
from diffalign.pipelines import load_pipeline
from diffalign.pipelines.lora import WEIGHTS_NAME, attach_lora
from diffalign.trainer import train

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3 * 600)]

SCRIPT = """
import sys
from diffalign.trainer import train
result = train(sys.argv[1], sys.argv[2:])
print("STEPS", result.steps, result.interrupted)
"""


# one rank: says why the first runs are refused, trains the last, and leaves what it holds of what was trained
RANK = """
import json, os, pathlib, sys
from safetensors.torch import save_file
from diffalign.startup import prepare_run
from diffalign.trainer import Trainer

home, rank = pathlib.Path(sys.argv[1]), os.environ["RANK"]
(home / f"pid{rank}").write_text(str(os.getpid()))
*refused, overrides = json.loads(sys.argv[2])
for bad in refused:
    try:
        prepare_run(home / "config.yaml", bad)
        sys.exit("not refused")
    except ValueError as error:
        print("REFUSED", error)
prepared = prepare_run(home / "config.yaml", overrides)
total = sum(p.numel() for p in prepared.parameters)
trainer = Trainer(prepared)
assert trainer.accelerator.num_processes == 2
trainer.fit()
parameters = {n: p.detach() for n, p in trainer.pipe.network.named_parameters() if p.requires_grad}
if os.environ.get("ACCELERATE_USE_FSDP") == "true":
    moments = [m["exp_avg"] for m in trainer.optimizer.state_dict()["state"].values()]
    frozen = trainer.reference.network.parameters()
    for held in (parameters.values(), trainer.ema.values.values(), moments, frozen):
        assert 0.4 * total < sum(t.to_local().numel() for t in held) < 0.6 * total
elif os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
    [part] = trainer.optimizer._zero.single_partition_of_fp32_groups
    assert 0.4 * total < part.numel() < 0.6 * total
else:
    save_file({n: p.clone() for n, p in parameters.items()}, home / f"rank{rank}.safetensors")
"""
PATIENCE = 600  # seconds for a launch that takes half a minute alone on a machine: against a hang, not a measurement
LAUNCHES = Path(__file__).resolve().parent.parent / "configs" / "accelerate"


def environment(**extra: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", **extra}


def start(tmp_path: Path, values: dict[str, Any], *overrides: str) -> subprocess.Popen[str]:
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(values))
    command = [sys.executable, "-c", SCRIPT, str(file), *overrides]
    return subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for(condition: Any, process: subprocess.Popen[str], seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.01)


@pytest.fixture
def one_thread() -> Any:
    """The comparison run computes with as many threads as the processes, or sums differ in their last bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_kill_9_costs_nothing_but_time(tmp_path: Path, one_thread: None) -> None:
    values = config(tmp_path, max_train_steps=400, checkpointing_steps=5, checkpoints_total_limit=2)
    folder = Path(values["output_dir"])
    process = start(tmp_path, values)
    wait_for(lambda: ckpt.complete_checkpoints(folder), process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    reached = ckpt.read_manifest(ckpt.complete_checkpoints(folder)[-1])["step"]
    assert 5 <= reached < 400
    steps = reached + 10
    # another end than the killed run had is allowed on resume: the steps before it do not depend on it
    resumed = train({**values, "max_train_steps": steps, "resume_from_checkpoint": "latest"})
    whole = train({**values, "max_train_steps": steps, "output_dir": str(tmp_path / "whole")})
    assert same(*(load_file(r.folder / WEIGHTS_NAME) for r in (resumed, whole)))
    losses = [
        {
            row["step"]: row["loss"]
            for row in map(json.loads, (r.folder / "metrics.jsonl").read_text().splitlines())
            if "loss" in row
        }
        for r in (resumed, whole)
    ]
    assert losses[0] == losses[1]
    assert list(losses[0]) == list(range(1, steps + 1))


def test_sigterm_saves_and_exits_0(tmp_path: Path) -> None:
    values = config(tmp_path, max_train_steps=100_000, checkpointing_steps=100_000)
    folder = Path(values["output_dir"])
    process = start(tmp_path, values)
    wait_for(
        lambda: (folder / "metrics.jsonl").is_file() and '"loss"' in (folder / "metrics.jsonl").read_text(), process
    )
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert "True" in output.splitlines()[-1]
    [checkpoint] = ckpt.complete_checkpoints(folder)
    assert (folder / WEIGHTS_NAME).is_file()
    assert ckpt.read_manifest(checkpoint)["step"] > 0


@contextlib.contextmanager
def launch(kind: str, tmp_path: Path, values: dict[str, Any], runs: list[list[str]]) -> Iterator[subprocess.Popen[str]]:
    """Two ranks by `accelerate launch` with a file of configs/accelerate, on runs of RANK, a list of overrides each.

    None of them outlives the block.
    """
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
    (tmp_path / "rank.py").write_text(RANK)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(LAUNCHES / f"{kind}.yaml"),
               "--num_processes", "2", str(tmp_path / "rank.py"), str(tmp_path), json.dumps(runs)]  # fmt: skip
    process = subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        yield process
    finally:
        for pid in [process.pid, *(int(file.read_text()) for file in tmp_path.glob("pid[01]"))]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def both_ranks(kind: str, tmp_path: Path, values: dict[str, Any], runs: list[list[str]]) -> str:
    """What two ranks say that end well."""
    with launch(kind, tmp_path, values, runs) as process:
        output = process.communicate(timeout=PATIENCE)[0]
    assert process.returncode == 0, output
    return output


def metrics(folder: Path, *kinds: str) -> dict[str, list[float]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {kind: [row[kind] for row in rows if kind in row] for kind in kinds}


def assert_same_curves(ours: Path, theirs: Path, tolerance: float) -> None:
    kinds = "loss", "accuracy", "d_w", "grad_norm", "validation/loss", "validation/accuracy", "validation/d_w"
    expected = metrics(theirs, *kinds)
    assert len(expected["loss"]) == 4 and len(expected["validation/loss"]) == 3
    for kind, values in metrics(ours, *kinds).items():
        assert values == pytest.approx(expected[kind], rel=tolerance, abs=tolerance), kind


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)


def test_two_ranks_of_a_lora_are_one_process_with_the_same_global_batch(tmp_path: Path, one_thread: None) -> None:
    """DDP, stopped after 2 steps and resumed to 4: the curves and weights of one process with twice the microbatches.

    Tolerance: 1e-6, in units of weights that have moved by more than 1e-2.
    """
    prompts = ["a red circle", "a blue square", "two green triangles"]
    values = config(tmp_path, cpu=True, validation_batch_size=2, validation_prompts=prompts, num_inference_steps=2,
                    rewards={"shapes": {"mode": "score"}})  # fmt: skip
    few = ["train_batch_size=8", f"output_dir={tmp_path}/few", "pretrained_model_name_or_path=/nowhere/at/all"]
    output = both_ranks("ddp", tmp_path, values, [few, ["max_train_steps=2"]])
    # a model that is not there would have been another error, had it come to loading
    refusal = "2 processes with train_batch_size 8 take 16 different pairs at a time, but there are 9 to train on"
    assert output.count(refusal) == 2 and "/nowhere" not in output
    both_ranks("ddp", tmp_path, values, [["resume_from_checkpoint=latest"]])

    both, one = Path(values["output_dir"]), tmp_path / "one"
    train({**values, "output_dir": str(one), "gradient_accumulation_steps": 2, "validation_steps": 2})
    ranks = [load_file(tmp_path / f"rank{rank}.safetensors") for rank in (0, 1)]
    assert same(*ranks)
    ours, theirs = (load_file(folder / WEIGHTS_NAME) for folder in (both, one))
    assert distance(ours, theirs) <= 1e-6
    assert max(value.abs().max().item() for name, value in theirs.items() if "lora_B" in name) > 1e-2
    assert_same_curves(both, one, 1e-6)
    rewards = [metrics(folder, "validation/reward/shapes")["validation/reward/shapes"] for folder in (both, one)]
    assert rewards[0] == pytest.approx(rewards[1], abs=1e-3)  # other batches: a pixel may round to the next level
    for step in (0, 2, 4):
        grids = [np.asarray(Image.open(f / "samples" / f"step-{step:06d}.png")).astype(int) for f in (both, one)]
        assert abs(grids[0] - grids[1]).max() <= 1 < np.ptp(grids[0])
    assert_only_the_lora(both)


def assert_only_the_lora(folder: Path) -> None:
    """Every tensor file of a run has the adapter's numbers and nothing else, and the optimizer's twice as many."""
    size = 4 * sum(p.numel() for p in attach_lora(load_pipeline(stable_diffusion()), rank=2))
    tensors = sorted(folder.rglob("*.safetensors"))
    assert {file.name for file in tensors} == {WEIGHTS_NAME, "trainable.safetensors"} and len(tensors) == 3
    for file in tensors:
        state = load_file(file)
        assert all("lora" in name for name in state) and sum(v.nbytes for v in state.values()) == size
        assert size < file.stat().st_size < size + 20_000  # names and metadata
    for file in folder.rglob("optimizer.pt"):
        assert 2 * size < file.stat().st_size < 2 * size + 120_000
    assert not (folder / "model").exists()


@pytest.mark.parametrize("kind", ["fsdp2", "deepspeed_zero2"])
def test_two_ranks_in_shards_are_one_process_with_the_same_global_batch(
    kind: str, tmp_path: Path, one_thread: None
) -> None:
    """All of tiny-sd with accumulation, resumed in the middle, with averaged weights and a frozen copy.

    Tolerance: 2e-6 for weights that have moved by more than 1e-4 (norms are summed in another order), 1e-4 for metrics.
    """
    if kind == "deepspeed_zero2":
        pytest.importorskip("deepspeed")
    values = config(tmp_path, cpu=True, pretrained_model_name_or_path="tiny-sd", resolution=128, train="full",
                    reference="frozen_copy", learning_rate=1e-4, ema_decay=0.9, validation_batch_size=2,
                    train_batch_size=1, gradient_accumulation_steps=2)  # fmt: skip
    del values["lora"]
    both_ranks(kind, tmp_path, values, [["max_train_steps=2"]])
    both_ranks(kind, tmp_path, values, [["resume_from_checkpoint=latest"]])

    both, one = Path(values["output_dir"]), tmp_path / "one"
    train({**values, "output_dir": str(one), "gradient_accumulation_steps": 4, "validation_steps": 2})
    before = load_pipeline("tiny-sd").network.state_dict()
    for stem in ("trainable", "ema"):
        ours, theirs = (ckpt.load_tensors(folder / "checkpoint-4", stem) for folder in (both, one))
        assert distance(ours, theirs) <= 2e-6
        assert distance(theirs, {name: before[name] for name in theirs}) > 1e-4
    assert_same_curves(both, one, 1e-4)
    stock = StableDiffusionPipeline.from_pretrained(both / "model")
    assert same(stock.unet.state_dict(), {**stock.unet.state_dict(), **ours})
    # checkpoints are of whole tensors: one process can go on where two ranks stopped
    moments = [ckpt.load_optimizer(folder / "checkpoint-4")["state"] for folder in (both, one)]
    for name in ("step", "exp_avg", "exp_avg_sq"):
        ours, theirs = ({str(index): state[name] for index, state in m.items()} for m in moments)
        assert distance(ours, theirs) <= 1e-3 * max(value.abs().max().item() for value in theirs.values())
    assert train({**values, "max_train_steps": 5, "resume_from_checkpoint": "latest"}).steps == 5
    assert metrics(both, "loss")["loss"][-1] > 0


def test_a_killed_rank_ends_the_run_with_an_error(tmp_path: Path) -> None:
    values = config(tmp_path, cpu=True, max_train_steps=100_000, checkpointing_steps=100_000)
    log = Path(values["output_dir"]) / "metrics.jsonl"
    with launch("ddp", tmp_path, values, [[]]) as process:
        wait_for(lambda: log.is_file() and '"loss"' in log.read_text(), process, PATIENCE)
        os.kill(int((tmp_path / "pid1").read_text()), signal.SIGKILL)
        output = process.communicate(timeout=PATIENCE)[0]
        assert process.returncode not in (0, None), output
        assert "Signal 9" in output, output
        assert not Path(f"/proc/{(tmp_path / 'pid0').read_text()}").exists(), output


def test_two_ranks_share_a_group(tmp_path: Path, one_thread: None) -> None:
    """Of two pictures of a prompt each rank draws one: alone none could be better than the others of its group."""
    method = {"name": "grpo", "group": 2, "steps": 3, "guidance": 2.0, "advantage": "group", "spread": True}
    values = config(tmp_path, cpu=True, method=method, rewards={"jpeg": 1.0}, max_train_steps=2,
                    data={**config(tmp_path)["data"], "val_fraction": 0.0})  # fmt: skip
    both_ranks("ddp", tmp_path, values, [[]])
    folder = Path(values["output_dir"])
    found = metrics(folder, "same", "grad_norm")
    assert found["same"] == [0.0] * len(found["same"]) and min(found["grad_norm"]) > 0
    moved = load_file(folder / WEIGHTS_NAME)
    assert max(value.abs().max().item() for name, value in moved.items() if "lora_B" in name) > 1e-4


def test_two_ranks_are_paid_alike(tmp_path: Path, one_thread: None) -> None:
    """Groups of pictures drawn on two ranks: what one process draws in twice the microbatches, and the same step.

    Tolerance: 1e-4 of weights that have moved by more than 1e-3: the second rollout is drawn with weights that differ
    in their last bits, and Adam divides by gradients of any size.
    """
    method = {"name": "grpo", "group": 2, "steps": 3, "guidance": 2.0, "advantage": "group", "at_once": 4}
    values = config(tmp_path, cpu=True, method=method, rewards={"jpeg": 1.0}, max_train_steps=2,
                    data={**config(tmp_path)["data"], "val_fraction": 0.0})  # fmt: skip
    both_ranks("ddp", tmp_path, values, [[]])
    both, one = Path(values["output_dir"]), tmp_path / "one"
    train({**values, "output_dir": str(one), "gradient_accumulation_steps": 2})
    ours, theirs = (load_file(folder / WEIGHTS_NAME) for folder in (both, one))
    assert distance(ours, theirs) <= 1e-4
    assert max(value.abs().max().item() for name, value in theirs.items() if "lora_B" in name) > 1e-3
    for kind, found in metrics(both, "reward", "loss", "grad_norm").items():
        assert found == pytest.approx(metrics(one, kind)[kind], rel=1e-4, abs=1e-6), kind
