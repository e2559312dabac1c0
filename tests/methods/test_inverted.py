"""InPO, SmPO and Inversion-DPO: golden values, what they target and where, and short runs."""

from __future__ import annotations

import functools
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from miniatures import FAMILIES, stable_diffusion
from safetensors.torch import load_file
from test_trainer import config, metrics
from toy import PROCESSES, ROWS, Denoiser, sampling_times, variance_preserving

from diffalign import reference as reference_module
from diffalign.losses import log_ratio, smpo, soft_ce, win_probability
from diffalign.methods import METHODS
from diffalign.methods.base import Batch, Run, pair_batch
from diffalign.methods.inpo import InPO
from diffalign.methods.inversion_dpo import InversionDPO
from diffalign.methods.inverted import grid
from diffalign.methods.smpo import SmPO
from diffalign.pipelines.lora import WEIGHTS_NAME
from diffalign.process import VariancePreserving, at_timesteps, endpoints
from diffalign.table import build
from diffalign.trainer import train

INVERTED = ("inpo", "smpo", "inversion_dpo")


def batch(count: int = 6) -> Batch:
    g = torch.Generator().manual_seed(3)
    x = torch.randn(2, count, 3, generator=g) * 0.3
    prompt = torch.arange(count) % 2
    pairs = pair_batch(1 + x[0], x[1] - 1, {"prompt": prompt}, torch.ones(count))
    return replace(pairs, negative={"prompt": 1 - prompt})


def run(process: str, kind: str, seed: int = 0, moved: float = 0.0) -> Run:
    law = PROCESSES[process]
    policy, reference = Denoiser(law, kind), Denoiser(law, kind)
    with torch.no_grad():
        policy.mean += moved * torch.tensor([[1.0, -0.5, 0.3], [0.2, 0.7, -1.0]])
        reference.mean += 0.1
    return Run(policy, reference, law, kind, torch.Generator().manual_seed(seed),
               functools.partial(sampling_times, law))  # fmt: skip


def test_smpo_golden() -> None:
    """s_w .22, s_l .21 and the errors of the DPO golden values, beta 5000, h = 1."""
    scores = torch.tensor([[0.22, 0.21]], dtype=torch.float64)
    p = win_probability(scores, SmPO().score_range)
    rho_w, rho_l = (log_ratio(torch.tensor([m], dtype=torch.float64), r, 5000) for m, r in
                    ((0.1000, 0.1002), (0.1203, 0.1201)))  # fmt: skip
    assert p.item() == pytest.approx(0.5150032585, abs=1e-9)
    assert 10 * (2 * p - 1).item() == pytest.approx(0.3000651701, abs=1e-9)
    assert smpo(rho_w - rho_l, p, 10).item() == pytest.approx(0.5543275114, abs=1e-9)


def test_soft_labels_of_equal_scores_pull_neither_way() -> None:
    h = torch.linspace(-3, 3, 7, dtype=torch.float64)
    half = torch.full_like(h, 0.5)
    assert torch.equal(smpo(h, half, 10), torch.full_like(h, math.log(2)))
    torch.testing.assert_close(soft_ce(h, half), soft_ce(-h, half))
    one = half * 2
    torch.testing.assert_close(soft_ce(h, 0.9 * one), 0.9 * soft_ce(h, one) + 0.1 * soft_ce(-h, one))


@pytest.mark.parametrize(("process", "kind"), ROWS)
@pytest.mark.parametrize("rule", [InPO(), InPO(mode="exact"), SmPO(), InversionDPO(objective="x0", sampled=2)])
def test_the_target_leads_from_the_inverted_latent_to_the_picture(rule: Any, process: str, kind: str) -> None:
    state, pairs = run(process, kind), batch()
    x0 = torch.cat(pairs.members)
    for noised in rule.prepare(state, pairs):
        assert torch.equal(noised.t[:6], noised.t[6:])
        alpha, sigma = state.process.coefficients(noised.t)
        ends = endpoints(kind, noised.y, noised.x_t, alpha, sigma)
        certain = (alpha > 0.2) & (sigma > 0.2) if kind != "sample" else sigma > 0.2
        torch.testing.assert_close(ends.x0[certain], x0[certain], rtol=1e-3, atol=2e-3)
        assert not torch.equal(ends.eps[:6], ends.eps[6:])  # each picture has its own noise


@pytest.mark.parametrize("process", PROCESSES)
def test_times_are_levels_of_the_inversion(process: str) -> None:
    kind = "flow" if process == "flow" else "epsilon"
    levels = sampling_times(PROCESSES[process], 10)[:-1].tolist()
    t = torch.cat([InPO().prepare(run(process, kind, seed), batch())[0].t for seed in range(20)])
    assert set(t.tolist()) <= set(levels) and len(set(t.tolist())) >= 8


def test_a_range_without_levels_is_named_and_others_are_kept_to() -> None:
    state = run("vp", "epsilon")
    for rule in (InPO(time_low=0.52, time_high=0.58), InversionDPO(steps=10, time_low=0.52, time_high=0.58)):
        with pytest.raises(ValueError, match="none of the 10 levels of the inversion lies in the trained part"):
            rule.prepare(state, batch())
    for rule in (InPO(time_low=0.45, time_high=0.75), InversionDPO(steps=10, sampled=2, time_low=0.45, time_high=0.75)):
        t = torch.cat([n.t for seed in range(20) for n in rule.prepare(run("vp", "epsilon", seed), batch())])
        assert set(t.tolist()) == {501, 601, 701}


def test_inversion_dpo_leaves_out_levels_at_which_nothing_of_the_picture_is_left() -> None:
    """CogVideoX's schedule ends there, where the weight of an error is infinite."""
    usual = variance_preserving()
    law = VariancePreserving(usual.alphas_cumprod.clone().index_fill(0, torch.arange(901, 1000), 0.0), usual.final)
    state = replace(run("vp", "v_prediction"), process=law, times=functools.partial(sampling_times, law))
    assert float(grid(state, 10)[-1]) == 901
    for noised in InversionDPO(steps=10, sampled=9).prepare(state, batch()):
        assert noised.t.max() < 901 and noised.aux["weight"].isfinite().all()
    with pytest.raises(ValueError, match="lies no level at which anything of the picture is left"):
        InversionDPO(steps=10, time_low=0.85).prepare(state, batch())


def test_a_network_that_knows_few_times_is_asked_at_those_alone() -> None:
    state, told = run("vp", "epsilon"), set()
    policy = state.policy

    def spy(x: torch.Tensor, t: torch.Tensor, condition: Any) -> torch.Tensor:
        told.update(t.tolist())
        return policy(x, t, condition)

    few = replace(state, policy=spy, reference=spy, process=at_timesteps(state.process, [249, 499, 749, 999]))
    for name in INVERTED:
        for noised in build(METHODS, {"name": name}, what="method").prepare(few, batch()):
            told.update(noised.t.tolist())
    assert told == {249, 499, 749, 999}


def loss_of(rule: Any, state: Run) -> list[float]:
    return [rule.loss(state, noised).value.mean().item() for noised in rule.prepare(state, batch())]


def test_inversion_dpo_weighs_alike_in_every_parametrization() -> None:
    values = [loss_of(InversionDPO(steps=10, sampled=3, beta=5), run("vp", kind, moved=0.3))
              for kind in ("epsilon", "v_prediction", "sample")]  # fmt: skip
    assert abs(values[0][0] - math.log(2)) > 1e-3
    for other in values[1:]:
        assert other == pytest.approx(values[0], rel=2e-2)


@pytest.mark.parametrize(("process", "kind"), ROWS)
def test_as_released_starts_without_a_gradient_and_transition_with_one(process: str, kind: str) -> None:
    norms = {}
    for objective in ("as_released", "transition"):
        state = run(process, kind)
        state = replace(state, reference=Denoiser(state.process, kind))
        rule = InversionDPO(objective=objective, steps=10, sampled=10)
        for noised in rule.prepare(state, batch()):
            loss = rule.loss(state, noised)
            torch.testing.assert_close(loss.value, torch.full((6,), 2.0).log())
            loss.value.mean().backward()
        norms[objective] = state.policy.mean.grad.norm().item()  # type: ignore[attr-defined]
    assert norms["as_released"] == 0 < norms["transition"]


def test_as_released_drives_the_winner_away_from_the_reference() -> None:
    """Its sign: the loss falls as the winner's distance to the reference grows, whatever the direction."""
    rule = InversionDPO(objective="as_released", steps=10, sampled=10)
    state = run("vp", "epsilon", moved=0.3)
    (noised,) = rule.prepare(state, batch())
    assert noised.x_t.shape == (2 * 10 * 6, 3)
    metrics = rule.loss(state, noised).metrics
    torch.testing.assert_close(metrics["h"], 0.5 * rule.beta * (metrics["d_w"] - metrics["d_l"]))
    assert (metrics["d_w"] > 0).all() and (metrics["d_l"] > 0).all()


def test_the_steps_of_a_trajectory_are_drawn_without_repetition() -> None:
    made = InversionDPO(steps=10, sampled=10).prepare(run("vp", "epsilon"), batch())
    t = torch.stack([noised.t for noised in made])
    assert len(made) == 10 and all(len(set(column)) == 10 for column in t.T.tolist())
    assert len(set(t[0].tolist())) > 1


def test_guidance_without_an_empty_prompt_is_named() -> None:
    pairs = replace(batch(), negative={})
    with pytest.raises(ValueError, match=r"method.guidance: there is no empty prompt"):
        InversionDPO(guidance=2.0, steps=4).prepare(run("vp", "epsilon"), pairs)


@pytest.mark.parametrize("name", ["inpo", "smpo"])
def test_ranks_that_must_call_together_call_equally_often(name: str) -> None:
    rule = build(METHODS, {"name": name, "steps": 7}, what="method")
    for seed in range(5):
        state, calls = run("vp", "epsilon", seed), []
        policy = state.policy
        spied = replace(state, policy=lambda *a: calls.append(0) or policy(*a), ranks=2)  # noqa: B023
        rule.prepare(spied, batch(2))
        assert len(calls) == 7 * (2 if name == "smpo" else 1)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"name": "inpo", "mode": "nearest"}, "method.mode: expected one of snap, exact, round_up"),
        ({"name": "inpo", "steps": 0}, "method.steps"),
        ({"name": "inpo", "model": "teacher"}, "method.model: expected one of policy, reference"),
        ({"name": "inpo", "eta": -1}, "method.eta"),
        ({"name": "inpo", "beta": 0}, "method.beta"),
        ({"name": "inpo", "time_low": 1}, "method.time_low"),
        ({"name": "smpo", "soft": "hard"}, "method.soft: expected one of smpo, soft_ce"),
        ({"name": "smpo", "score_range": 0}, "method.score_range: expected a number above 0"),
        ({"name": "inversion_dpo", "objective": "released"}, "method.objective"),
        ({"name": "inversion_dpo", "sampled": 41}, "method.sampled: expected 1 to method.steps, which is 40, got 41"),
        ({"name": "inversion_dpo", "renoise": 1}, "method.renoise: expected 0 with objective transition"),
    ],
)
def test_bad_keywords_are_named(section: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(METHODS, section, what="method")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reference": {"name": "ema"}}, "needs a reference that stays as it is, and 'ema' moves"),
        ({"posterior": "sample"}, "set posterior: mean, or method.cache: false"),
    ],
)
def test_what_cannot_be_kept_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train(config(tmp_path, method="inversion_dpo", **changes))


SHORT = {
    "inpo": {"beta": 100, "steps": 4},
    "smpo": {"beta": 100, "steps": 3},
    "inversion_dpo": {"steps": 4, "sampled": 2},
}


@pytest.mark.parametrize("name", INVERTED)
@pytest.mark.parametrize("family", ["sd", "sdxl", "sd3"])
def test_every_method_trains_every_family(name: str, family: str, tmp_path: Path) -> None:
    folder = stable_diffusion("v_prediction") if family == "sd" else FAMILIES[family]()
    result = train(config(tmp_path, pretrained_model_name_or_path=str(folder), max_train_steps=2,
                          method={"name": name, **SHORT[name]}))  # fmt: skip
    first = next(row for row in metrics(result.folder) if "loss" in row)
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6) and first["h"] == 0
    assert first["grad_norm"] > 0
    assert any(value.abs().sum() > 0 for key, value in load_file(result.folder / WEIGHTS_NAME).items() if "_B" in key)


@pytest.mark.slow
@pytest.mark.parametrize("name", INVERTED)
def test_the_packaged_config_of_tiny_sd_trains(name: str, tmp_path: Path) -> None:
    result = train(f"tiny-sd/{name}", [
        "max_train_steps=3", "train_batch_size=2", "data.max_pairs=12", "data.val_fraction=0.2", "logging_steps=1",
        "validation_prompts=[]", "report_to=none", f"output_dir={tmp_path / 'run'}", f"cache_dir={tmp_path / 'cache'}",
    ])  # fmt: skip
    rows = [row for row in metrics(result.folder) if "loss" in row]
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-6) and rows[0]["h"] == 0
    assert len(rows) == 3 and rows[-1]["h_abs"] > 0 and all(math.isfinite(row["grad_norm"]) for row in rows)


def evaluations(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Counts what the reference is asked, in rows."""
    asked: list[int] = []
    call = reference_module.Fixed.__call__

    def spy(self: Any, x_t: torch.Tensor, t: torch.Tensor, condition: Any) -> torch.Tensor:
        asked.append(len(x_t))
        return call(self, x_t, t, condition)

    monkeypatch.setattr(reference_module.Fixed, "__call__", spy)
    return asked


def test_kept_trajectories_are_not_walked_again_and_a_resumed_run_is_the_same_to_the_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = {"name": "inversion_dpo", **SHORT["inversion_dpo"]}
    asked = evaluations(monkeypatch)

    def trained(name: str, cache: str, **changes: Any) -> dict[str, torch.Tensor]:
        asked.clear()
        values = {"method": method, "output_dir": str(tmp_path / name), "cache_dir": str(tmp_path / cache)}
        return load_file(train(config(tmp_path, **values, **changes)).folder / WEIGHTS_NAME)

    whole = trained("whole", "a", max_train_steps=6)
    cold = sum(asked)
    warm = trained("warm", "a", max_train_steps=6)
    assert sum(asked) < cold
    trained("halves", "b", max_train_steps=2)
    halves = trained("halves", "b", max_train_steps=6, resume_from_checkpoint="latest")
    for other in (warm, halves):
        assert whole.keys() == other.keys() and all(torch.equal(whole[key], other[key]) for key in whole)
    stored = list((tmp_path / "a").glob("trajectories-*/*.safetensors"))
    assert stored and not list((tmp_path / "a").glob("trajectories-*/*.partial"))
