"""The benchmarks run, compare equal work, and the operators of our step do not grow unseen. No timings."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import dpo_step, gpu
from benchmarks.gpu_report import GOALS, goals
from benchmarks.measure import counts
from benchmarks.models import (
    CLIP_BIG_G,
    CLIP_L,
    pair_flops,
    sd3_medium,
    sd3_mini,
    sdxl,
    sdxl_8m,
    sdxl_mini,
    shares,
    wan_1_3b,
)
from benchmarks.plain import cached_from, plain, random_raw
from benchmarks.steps import Ours, Recorded, build_subject, gradients, random_cached
from diffalign.pipelines.attention import Routed
from diffalign.pipelines.compiling import compiled
from diffalign.pipelines.fused_lora import FusedLinear

HOW = "if it is meant, run `python -m benchmarks.dpo_step --update-counts` and commit benchmarks/op_counts.json"


@pytest.fixture(scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_the_operators_of_our_step_have_not_grown(one_thread):
    committed = json.loads(dpo_step.COUNTS.read_text())
    steps = dpo_step.variants(sdxl_8m())
    found = {name: counts(steps[name], dpo_step.SEED) for name in committed["variants"]}
    grown = dpo_step.grown(found, committed["variants"])
    assert not grown, f"{'; '.join(grown)} (counted with {committed['versions']}); {HOW}"
    assert set(committed["variants"]) == {name for name in steps if name.startswith("ours")}


def test_a_grown_count_and_a_lost_variant_are_named():
    committed = {"ours": {"operators": 1000, "moved_bytes": 50}, "gone": {"operators": 1}}
    assert dpo_step.grown({"ours": {"operators": 1020, "moved_bytes": 40}, "gone": {"operators": 1}}, committed) == []
    grown = dpo_step.grown({"ours": {"operators": 1021, "moved_bytes": 50}}, committed)
    assert grown == ["ours: operators 1000 -> 1021", "gone: operators 1 -> None"]


def test_the_small_model_has_the_shares_that_the_benchmark_promises():
    found = shares(sdxl_8m())
    assert 8e6 <= found.network_parameters <= 9e6
    assert 0.6 <= found.vae <= 0.72 and found.text <= 0.05


@pytest.mark.slow
def test_the_full_size_models_are_the_published_ones():
    found = shares(sdxl())
    assert found.network_parameters == 2_567_463_684
    assert found.vae == pytest.approx(0.72, abs=0.005) and found.text == pytest.approx(0.016, abs=0.003)
    for model, flops in ((sdxl(), 42.7e12), (sd3_medium(), 62.2e12), (wan_1_3b(), 2303e12)):
        assert pair_flops(model, 16) == pytest.approx(flops, rel=0.01)
    assert (CLIP_L["hidden_size"], CLIP_BIG_G["num_hidden_layers"]) == (768, 32)


@pytest.mark.parametrize("build", [sdxl_mini, sd3_mini])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_ours_and_the_plain_step_find_the_same_loss_and_gradient(build, checkpointing):
    cpu = torch.device("cpu")
    model = build()
    subject = build_subject(model, cpu, torch.float32, rank=4)
    encoders = gpu.build_encoders(model, cpu, torch.float32)
    slow = plain(subject, encoders, random_raw(model, 2, cpu), checkpointing)
    cached = cached_from(slow, seed=3)
    wanted, direction = gradients(slow, seed=3)
    assert abs(wanted - 0.6931) > 1e-4 and direction.norm() > 0
    for step in (Ours(subject, cached, checkpointing), Ours(subject, cached, checkpointing, cached_reference=True)):
        for _ in range(2):  # the second time the reference's errors are looked up
            loss, vector = gradients(step, seed=3)
            assert loss == pytest.approx(wanted, rel=1e-5)
            assert (vector - direction).norm() <= 1e-5 * direction.norm()


@pytest.mark.parametrize("build", [sdxl_mini, sd3_mini])
def test_the_recorded_step_does_what_ours_does(build):
    steps = []
    for kind in (Ours, Recorded):
        subject = build_subject(build(), torch.device("cpu"), torch.float32, rank=2)
        step = kind(subject, random_cached(subject.model, 2, subject.device))
        step.enter()
        for seed in (0, 1, 0):
            step(seed)
        steps.append([p.detach() for p in subject.parameters])
    torch.testing.assert_close(*steps, rtol=0, atol=0)


@pytest.mark.slow
def test_the_compiled_step_finds_the_same_and_leaves_the_other_variants_as_they_are(one_thread):
    subject = build_subject(sdxl_mini(), torch.device("cpu"), torch.float32, rank=2)
    cached = random_cached(subject.model, 2, subject.device)
    ours, fast = Ours(subject, cached), Ours(subject, cached, compiled=True)
    wanted, direction = gradients(ours, seed=3)
    loss, vector = gradients(fast, seed=3)
    assert compiled(subject.pipe.network) and loss == pytest.approx(wanted, rel=dpo_step.COMPILED_TOLERANCE)
    assert (vector - direction).norm() <= dpo_step.COMPILED_TOLERANCE * direction.norm()
    assert gradients(ours, seed=3)[0] == wanted and not compiled(subject.pipe.network)


def test_the_plain_step_runs_stock_layers_and_ours_its_own():
    cpu = torch.device("cpu")
    subject = build_subject(sdxl_mini(), cpu, torch.float32, rank=2)
    slow = plain(
        subject, gpu.build_encoders(subject.model, cpu, torch.float32), random_raw(subject.model, 1, cpu), False
    )
    ours = Ours(subject, random_cached(subject.model, 1, cpu), attention="math")
    for step, equipped in ((ours, True), (slow, False), (ours, True)):
        step.enter()
        modules = list(subject.pipe.network.modules())
        assert any(isinstance(m, FusedLinear) for m in modules) is equipped
        assert any(isinstance(getattr(m, "processor", None), Routed) for m in modules) is equipped


def test_the_cpu_benchmark_runs_and_writes_its_figures(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setattr(dpo_step, "sdxl_8m", sdxl_mini)
    monkeypatch.setattr(dpo_step, "LEAST_LOGIT", 0.0)
    monkeypatch.setenv("CXX", "no-such-compiler")  # the compiled variants have a slow test of their own
    threads = torch.get_num_threads()
    assert dpo_step.main(["--rounds", "1", "--out", str(tmp_path / "b" / "bench.json")]) == 0
    assert torch.get_num_threads() == threads
    result = json.loads((tmp_path / "b" / "bench.json").read_text())
    rows = result["rows"]
    assert list(rows) == ["plain, checkpointing", "plain", "ours", "ours, checkpointing", "ours, cached reference"]
    assert all(row["cpu_ms"] > 0 for row in rows.values()) and len(result["goals"]) == 3
    assert rows["ours, cached reference"]["operators"] < rows["ours"]["operators"] < rows["plain"]["operators"]
    assert rows["ours, checkpointing"]["kept_bytes"] < rows["ours"]["kept_bytes"]
    said = capsys.readouterr().out
    assert "goal: ours at least 1.8 times faster" in said and "the compiled variants are left out" in said


@pytest.mark.slow
def test_the_gpu_benchmark_runs_in_small(tmp_path: Path, capsys):
    out = tmp_path / "gpu.json"
    assert gpu.main(["--small", "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    assert len(result["rows"]) == 2 * len(gpu.VARIANTS) * len(gpu.SMALL.pairs) + len(gpu.CLIP_VARIANTS)
    failed = {row["variant"]: row["failed"] for row in result["rows"] if "failed" in row}
    assert list(failed) == ["ours, cudnn attention", "ours, checkpointing, cudnn attention"]  # there is none on a CPU
    assert failed["ours, cudnn attention"].endswith("what does: auto, flash, math")
    assert all(value > 0 for value in result["ceilings"].values())
    assert "failed" in capsys.readouterr().out  # the header


def test_the_gpu_benchmark_leaves_out_what_does_not_fit_into_the_time(tmp_path: Path):
    out = tmp_path / "gpu.json"
    assert gpu.main(["--small", "--minutes", "0", "--models", "sdxl", "--out", str(out)]) == 0
    assert {row["failed"] for row in json.loads(out.read_text())["rows"]} == {"no time left"}


def test_a_row_that_fails_says_why_and_costs_no_other(monkeypatch):
    cpu = torch.device("cpu")
    subject = build_subject(sdxl_mini(), cpu, torch.bfloat16, rank=2)

    def fail(error):
        def make(*_):
            raise error

        return gpu.measured_row(gpu.Variant(make), subject, None, 1, gpu.SMALL)

    assert fail(torch.OutOfMemoryError("Tried to allocate")) == {"failed": "out of memory"}
    assert fail(RuntimeError("no such kernel\nsecond line")) == {"failed": "no such kernel"}


def test_without_a_gpu_the_full_size_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 1
    assert "--small" in capsys.readouterr().err


def test_goals_are_compared_with_the_best_of_our_rows_that_a_single_epoch_can_have():
    def row(variant: str, pairs: int, ms: float) -> dict:
        return {"model": "sdxl", "variant": variant, "pairs": pairs, "ms_per_pair": ms, "peak_gib": 7.0}

    rows = [
        row("plain, checkpointing", 8, 330),
        row("ours", 8, 110),
        row("ours, graph", 8, 99),
        row("ours, cached reference", 8, 60),
        row("ours", 1, 500),
        {**row("ours", 8, 1), "model": "other"},
    ]
    found = {(goal["model"], goal["what"]): goal for goal in goals(rows)}
    assert len(found) == len(GOALS)
    assert found["sdxl", "ms a pair at 8 pairs"]["measured"] == 99 and found["sdxl", "ms a pair at 8 pairs"]["met"]
    assert not found["sdxl", "ms a pair at 1 pair"]["met"]
    assert found["sdxl", "times faster than plain at 8 pairs"]["measured"] == pytest.approx(330 / 99)
    assert found["sdxl", "times faster than plain at 1 pair"]["met"] is None
    assert found["sd3-medium", "ms a pair at 8 pairs"]["measured"] is None
