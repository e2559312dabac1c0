"""Methods that draw pictures while they train: their own promises, and short real runs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from toy_views import EMPTY, batch_for, networks, run, toy_method

from diffalign.config import load_config
from diffalign.methods.base import Method
from diffalign.methods.online_dpo import best_and_worst
from diffalign.scores import known, scores_of
from diffalign.trainer import train

REUSED = {
    "seppo-reuse": {"name": "seppo", "reuse": 2, "guidance": 3.0, "eta": 1.0, "timestep_weight": "x0"},
    "dro-reuse": {"name": "dro", "reuse": 2},
    "online_dpo-reference": {"name": "online_dpo", "drawn_by": "reference", "group": 3, "reuse": 2},
}


def method(variant: str) -> Method:
    return toy_method(REUSED.get(variant, {"name": variant}))


def told(total: torch.Tensor) -> Any:
    """An answer of these scores."""
    return known(scores_of({"toy": total}, {"toy": 1.0}))


def test_best_and_worst_of_a_group() -> None:
    latents = torch.arange(4 * 3, dtype=torch.float32).view(4, 3, 1)
    nan = float("nan")
    scores = torch.tensor([[0.2, 0.9, 0.1], [0.5, 0.5, 0.5], [nan, 0.3, 0.1], [nan, nan, 0.7]])
    (best, worst), found = best_and_worst(latents, scores)
    assert best.flatten().tolist()[:1] + best.flatten().tolist()[2:3] == [1.0, 7.0]
    assert worst.flatten().tolist()[:1] + worst.flatten().tolist()[2:3] == [2.0, 8.0]
    assert found["skipped"].tolist() == [0, 1, 0, 1]
    torch.testing.assert_close(found["reward_gap"], torch.tensor([0.8, 0, 0.2, 0]))
    torch.testing.assert_close(found["reward"], torch.tensor([0.4, 0.5, 0.2, 0.7]))
    assert torch.equal(best[[1, 3]], worst[[1, 3]])


def test_a_group_without_a_gap_gives_no_gradient() -> None:
    policy, reference = networks("vp", "epsilon")
    state = replace(run(policy, reference), score=lambda latents, prompts: told(torch.zeros(len(latents))))
    rule = method("online_dpo")
    [batch] = rule.prepare(state, batch_for(rule, 4))
    loss = rule.loss(state, batch)
    loss.value.sum().backward()
    assert (loss.value == 0).all() and (loss.metrics["skipped"] == 1).all() and (policy.mean.grad == 0).all()


def test_a_group_is_of_one_prompt_and_the_reward_is_told_so() -> None:
    asked: list[str] = []

    def score(latents: torch.Tensor, prompts: Any) -> Any:
        asked.extend(prompts)
        return told(torch.arange(float(len(latents))))

    state = replace(run(*networks("flow", "flow")), score=score)
    rule = method("online_dpo-reference")
    first = rule.prepare(state, batch_for(rule, 2))[0]
    assert asked == ["0"] * 3 + ["1"] * 3
    assert first.condition["prompt"].tolist() == [0, 1, 0, 1] and first.aux["reward_gap"].tolist() == [2, 2]


@pytest.mark.parametrize(("variant", "mean"), [("seppo", 3.0), ("online_dpo-reference", 3.0), ("online_dpo", 0.0)])
def test_who_draws(variant: str, mean: float) -> None:
    """The reference believes in pictures around 3, the policy in ones around 0."""
    policy, reference = networks("flow", "flow")
    torch.nn.init.constant_(reference.mean, 3.0)
    state, rule = run(policy, reference), method(variant)
    rule = replace(rule, time_high=1e-3)  # x_t is the picture
    with torch.no_grad():
        batch = rule.prepare(state, batch_for(rule, 200))[0]
    assert batch.x_t[200:].mean().item() == pytest.approx(mean, abs=1.0)


def test_guidance_leans_away_from_the_empty_prompt() -> None:
    policy, reference = networks("flow", "flow")
    with torch.no_grad():
        reference.mean[:EMPTY], reference.mean[EMPTY] = 1.0, 0.0
    drawn = []
    for guidance in (1.0, 3.0):
        rule = replace(method("seppo"), guidance=guidance, time_high=1e-3)
        with torch.no_grad():
            drawn.append(rule.prepare(run(policy, reference), batch_for(rule, 200))[0].x_t[200:].mean().item())
    assert drawn[1] > drawn[0] + 1


@pytest.mark.parametrize("shared", [True, False])
def test_winner_and_opponent_share_noise_if_asked(shared: bool) -> None:
    rule = replace(method("seppo"), share_noise=shared)
    [batch] = rule.prepare(run(*networks("vp", "epsilon")), batch_for(rule, 4))
    assert torch.equal(batch.y[:4], batch.y[4:]) == shared  # the target of an epsilon network is the noise
    assert torch.equal(batch.t[:4], batch.t[4:])


def test_spin_is_seppo_without_a_flip() -> None:
    policy, reference = networks("vp", "epsilon")
    torch.nn.init.normal_(policy.mean, generator=torch.Generator().manual_seed(0))
    values = []
    for rule in (method("spin"), replace(method("seppo"), flip="none")):
        state = run(policy, reference)
        [batch] = rule.prepare(state, batch_for(rule, 8))
        values.append(rule.loss(state, batch).value)
    assert torch.equal(*values)


@pytest.mark.parametrize("variant", ["seppo-reuse", "dro-reuse", "online_dpo-reference"])
def test_pictures_are_drawn_once_and_noised_several_times(variant: str) -> None:
    policy, reference = networks("flow", "flow")
    rule = method(variant)
    one, two = rule.prepare(run(policy, reference), batch_for(rule, 4))
    assert not torch.equal(one.x_t, two.x_t) and not torch.equal(one.t, two.t)


@pytest.mark.parametrize(("process", "kind"), [("vp", "epsilon"), ("vp", "v_prediction"), ("flow", "flow")])
def test_the_policys_own_answer_is_dropped_from_dros_gradient_but_not_from_its_threshold(
    process: str, kind: str
) -> None:
    policy, reference = networks(process, kind)
    torch.nn.init.normal_(policy.mean, std=0.5, generator=torch.Generator().manual_seed(0))
    state, rule = run(policy, reference), method("dro")
    with torch.no_grad():
        [batch] = rule.prepare(state, batch_for(rule, 64))
    loss = rule.loss(state, batch)
    assert loss.metrics["m_l"].max().item() < 1e-8 < loss.metrics["r_l"].mean().item()
    expected = torch.relu(loss.metrics["d_w"] + loss.metrics["r_l"] + rule.margin)
    torch.testing.assert_close(loss.value.detach(), expected)
    assert torch.equal(batch.t[:64], batch.t[64:])


SMALL = {"method.steps": 2, "method.at_once": 2, "train_batch_size": 2, "max_train_steps": 2, "validation_prompts": [],
         "ema_decay": None, "report_to": "none", "data.max_pairs": 12, "lora.rank": 2}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("model", ["tiny-sd", "tiny-sdxl", "tiny-sd3"])
@pytest.mark.parametrize("name", ["seppo", "spin", "dro", "online_dpo"])
def test_a_short_run_of_the_shipped_models(name: str, model: str, tmp_path: Path) -> None:
    overrides = {**SMALL, "pretrained_model_name_or_path": model, "output_dir": tmp_path / "run",
                 "cache_dir": tmp_path / "cache"}  # fmt: skip
    given = [f"{key}={'null' if value is None else value}" for key, value in overrides.items()]
    assert load_config(f"tiny-sd/{name}", given).reference_name in ("pool", "sync", "adapter_off")
    result = train(f"tiny-sd/{name}", given)
    assert result.steps == 2 and all(value == value for value in result.metrics.values())
