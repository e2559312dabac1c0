"""Training in processes of its own: killed, ended politely, and on two ranks."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from test_trainer import config, same

from diffalign import checkpoint as ckpt
from diffalign.pipelines.lora import WEIGHTS_NAME
from diffalign.trainer import train

pytestmark = pytest.mark.slow

SCRIPT = """
import sys
from diffalign.trainer import train
result = train(sys.argv[1], sys.argv[2:])
print("STEPS", result.steps, result.interrupted)
"""


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


def test_two_ranks_end_with_the_same_weights(tmp_path: Path) -> None:
    """Two ranks really run, exchange their gradients, and end with the same weights."""
    values = config(tmp_path, max_train_steps=3, checkpointing_steps=3, cpu=True)
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(values))
    script = tmp_path / "rank.py"
    script.write_text(
        "import os, sys, torch\n"
        "from safetensors.torch import save_file\n"
        "from diffalign.startup import prepare_run\n"
        "from diffalign.trainer import Trainer\n"
        "trainer = Trainer(prepare_run(sys.argv[1], []))\n"
        "assert trainer.accelerator.num_processes == 2\n"
        "trainer.fit()\n"
        "named = {n: p.detach().clone() for n, p in trainer.pipe.network.named_parameters() if p.requires_grad}\n"
        "save_file(named, f'{sys.argv[2]}/rank{os.environ[\"RANK\"]}.safetensors')\n"
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(port),
               str(script), str(file), str(tmp_path)]  # fmt: skip
    done = subprocess.run(
        command, env=environment(ACCELERATE_USE_CPU="true"), capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stdout + done.stderr
    first, second = (load_file(tmp_path / f"rank{rank}.safetensors") for rank in (0, 1))
    assert same(first, second)
    assert any(value.abs().sum() > 0 for name, value in first.items() if "lora_B" in name)
