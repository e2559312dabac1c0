"""Scoring in processes of its own: killed with SIGKILL and gone on with, and on the workers of a Ray cluster."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from scoring_helpers import save_reds

from diffalign.manifests import read_manifest
from diffalign.scoring.engines import load_job
from diffalign.scoring.files import read_scores
from diffalign.scoring.run import Scored, score_entries

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2 * 600)]
ray_only = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed (extra ray)")
TESTS = Path(__file__).parent


@pytest.mark.skipif(os.name != "posix", reason="SIGKILL is of POSIX")
def test_a_run_that_is_killed_goes_on_where_it_was(tmp_path: Path) -> None:
    save_reds(tmp_path / "reds", 40)
    command = [sys.executable, "-m", "diffalign.cli", "score", "reds", "--prompt", "x", "--batch-size", "2",
               "--reward", "scoring_helpers:Slow", "--out", "scores.jsonl"]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)])}
    journal = tmp_path / "scores.jsonl.journal"
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE) as process:
        while process.poll() is None and (not journal.exists() or journal.read_bytes().count(b"\n") < 6):
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        process.wait()
    written = journal.read_bytes().count(b"\n") - 1  # without the header
    assert process.returncode == -signal.SIGKILL and 5 <= written < 40
    assert not (tmp_path / "scores.jsonl").exists()  # whole or not there
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f"40 pictures scored, {40 - written} of them now" in done.stdout
    assert [row.scores["scoring_helpers:Slow"] for row in read_scores(tmp_path / "scores.jsonl")] == [
        min(5.0 * (number + 1), 255) for number in range(40)
    ]


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """Two logical CPUs on this machine."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112  low priority gets nowhere on a machine that is busy
    import ray

    variables = {"PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)]), "OMP_NUM_THREADS": "1"}
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, runtime_env={"env_vars": variables})
    yield
    ray.shutdown()


def both(folder: Path, sections: dict[str, dict[str, object]], batch_size: int = 2) -> tuple[Scored, Scored]:
    """What the cluster gives, then what this process gives with as many threads as a worker has: sums differ else."""
    job = load_job(sections, "cpu", engine="ray")
    spread = score_entries(read_manifest([folder], ["a red circle"]), job, engine="ray", batch_size=batch_size)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return spread, score_entries(read_manifest([folder], ["a red circle"]), job, batch_size=batch_size)
    finally:
        torch.set_num_threads(threads)


@ray_only
def test_ray_gives_what_the_plain_path_gives(cluster: None, tmp_path: Path) -> None:
    files = save_reds(tmp_path, 21)
    files[3].write_text("no picture")
    spread, plain = both(tmp_path, {"tiny-clip": {"weight": 1.0}, "jpeg": {"weight": 0.5}})
    assert spread.rows == plain.rows and len(plain.rows) == 20
    assert spread.broken == plain.broken and len(plain.broken) == 1


@ray_only
def test_a_worker_that_is_killed_loses_nothing(cluster: None, tmp_path: Path) -> None:
    save_reds(tmp_path / "reds", 24)
    grave = tmp_path / "grave"
    spread, plain = both(tmp_path / "reds", {"scoring_helpers:Mortal": {"weight": 1.0, "grave": str(grave)}})
    assert grave.is_file() and int(grave.read_text()) != os.getpid()
    assert spread.rows == plain.rows and len(plain.rows) == 24


@ray_only
def test_more_than_the_cluster_has_is_refused_at_once(cluster: None, tmp_path: Path) -> None:
    save_reds(tmp_path, 2)
    for device, actors, message in (("cpu", 3, "3 workers, and the cluster has 2 CPUs"),
                                    ("cuda", None, "the cluster has 0 GPUs; .*--device cpu")):  # fmt: skip
        job = load_job({"scoring_helpers:Red": {"weight": 1.0}}, device, engine="ray", actors=actors)
        with pytest.raises(ValueError, match=message):
            score_entries(read_manifest([tmp_path], ["x"]), job, engine="ray")


@ray_only
def test_what_a_worker_refuses_is_said_in_a_sentence(cluster: None, tmp_path: Path) -> None:
    save_reds(tmp_path, 2)
    with pytest.raises(ValueError, match="caption"):
        both(tmp_path, {"scoring_helpers:RefusesAll": {"weight": 1.0}})
