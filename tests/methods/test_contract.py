"""Every row of METHODS keeps the same promises, on networks whose law is known exactly."""

from dataclasses import fields, replace

import pytest
import torch
from toy import ROWS
from toy_views import BETA, batch_for, networks, pairs, run, toy_method

from diffalign.methods import METHODS
from diffalign.methods.base import Method, Need, Noised, reference_errors
from diffalign.sampling import Condition
from diffalign.table import build, resolve

ROW = {name: {"name": name} for name in METHODS}
VARIANTS = {
    **ROW,
    **{f"dpo-{link}": {"name": "dpo", "link": link, "label_smoothing": 0.05} for link in
       ("robust", "hinge", "exo", "nca", "sigmoid")},
    "dpo-ipo": {"name": "dpo", "link": "ipo", "beta": 2.0},  # its optimum h = 1/2 is near the reference at a large beta
    "dpo-anchored": {"name": "dpo", "sft_weight": 0.1, "dpop_weight": 2.0, "loser_weight": 0.5},
    "dpo-x0": {"name": "dpo", "timestep_weight": "x0"},
    **{f"dpo-{divergence}": {"name": "dpo", "divergence": divergence} for divergence in ("forward_kl", "js", "alpha")},
    "dpo-preserving": {"name": "dpo", "winner_preserving": 0.6},
    "sft-snr": {"name": "sft", "timestep_weight": "snr_clip"},
    "rankdpo-scores": {"name": "rankdpo", "phi": "scores", "rank_source": "model", "share_noise": True},
    **{f"kto-{utility}": {"name": "kto", "utility": utility} for utility in ("loss_averse", "risk_seeking")},
    "kto-balanced": {"name": "kto", "baseline": "balanced", "liked_weight": 0.5},
    "kto-none": {"name": "kto", "baseline": "none"},
    "tkto-averse": {"name": "tkto", "utility": "loss_averse", "baseline": "none"},
    "mapo-eps": {"name": "mapo", "timestep_weight": "eps", "scale": 0.5},
    "capo-calibrated": {"name": "capo", "calibrated": True, "bias": 1.0},
    "dspo-brier": {"name": "dspo", "form": "brier"},
    "dspo-released": {"name": "dspo", "as_released": True},
    **{f"densedpo-{norm}": {"name": "densedpo", "segment_norm": norm, "share_noise": False}
       for norm in ("mean_nontie", "sum")},
    **{f"inpo-{mode}": {"name": "inpo", "mode": mode} for mode in ("exact", "round_up")},
    "inpo-noisy": {"name": "inpo", "eta": 0.1, "renoise": 1},
    "inpo-reference": {"name": "inpo", "model": "reference", "timestep_weight": "x0"},
    "smpo-soft_ce": {"name": "smpo", "soft": "soft_ce"},
    "inversion_dpo-x0": {"name": "inversion_dpo", "objective": "x0", "beta": 5.0, "renoise": 1},
    "inversion_dpo-guided": {"name": "inversion_dpo", "guidance": 2.0},
    "seppo-indicator": {"name": "seppo", "flip": "indicator", "share_noise": True},
    "seppo-reuse": {"name": "seppo", "reuse": 2, "guidance": 3.0, "eta": 1.0, "timestep_weight": "x0"},
    "dro-reuse": {"name": "dro", "reuse": 2},
    "online_dpo-reference": {"name": "online_dpo", "drawn_by": "reference", "group": 3, "reuse": 2},
    "ppd-x0": {"name": "ppd", "timestep_weight": "x0"},
    "d3po-pairs": {"name": "d3po", "mode": "pairs"},
    "prdp-sum": {"name": "prdp", "reduction": "sum", "beta": 2.0, "clip": 1.0},
    "prdp-centred": {"name": "prdp", "form": "centred", "beta": 2.0},
    "grpo-fast": {"name": "grpo", "window": 1, "kl_weight": 0.0, "advantage": "group", "same_start": True},
    "ddpo-bf16": {"name": "ddpo", "store": "bfloat16", "advantage": "centre"},
    "alignprop-uniform": {"name": "alignprop", "truncation": "uniform", "kl_weight": 0.1},
    "draft-whole": {"name": "draft", "last": 4},
}  # fmt: skip
# learn from groups of pictures, a microbatch of several a prompt: their own tests are in test_paid.py
IN_GROUPS = ("d3po", "prdp", "ddpo", "dpok", "grpo", "pref_grpo", "nft")
DIRECT = ("alignprop", "draft", "draft_lv", "refl", "drtune")  # their own in test_direct.py
# a pair's logit against a reference, which is 0 where the two agree
WITH_LOGIT = [v for v in VARIANTS if VARIANTS[v]["name"] not in
              ("sft", "dro", "mapo", "kto", "tkto", "capo", "rankdpo", "densedpo", *IN_GROUPS, *DIRECT)]  # fmt: skip


def method(variant: str) -> Method:
    return toy_method(VARIANTS[variant])


def rows(batch: Noised, index: int, pairs_in_batch: int) -> Noised:
    """One pair (or winner) of a microbatch."""
    picked = list(range(index, len(batch.t), pairs_in_batch))
    known = None if batch.reference_errors is None else batch.reference_errors[picked]
    condition: Condition = {name: value[picked] for name, value in batch.condition.items()}
    aux = {name: value[index : index + 1] for name, value in batch.aux.items()}
    return replace(batch, x_t=batch.x_t[picked], y=batch.y[picked], t=batch.t[picked], condition=condition,
                   label=batch.label[index : index + 1], reference_errors=known, aux=aux)  # fmt: skip


STEPS = {"d3po": 40, "d3po-pairs": 40}  # whose few pictures of a prompt make its steps noisy; of the others
FEW = 12
LEAST_MOVE = 0.02  # of each prompt's mean in so many, on the winners' side; a bounded link (IPO) stops early


@pytest.mark.parametrize(("process", "kind"), ROWS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_some_steps_move_towards_the_winners(variant: str, process: str, kind: str) -> None:
    policy, reference = networks(process, kind)
    rule = method(variant)
    optimizer = torch.optim.Adam(policy.parameters(), lr=0.02)
    for step in range(STEPS.get(variant, FEW)):
        state = run(policy, reference, seed=step)
        with torch.no_grad():
            batches = rule.prepare(state, batch_for(rule, 64, step))
        for batch in batches:
            rule.loss(state, batch).value.mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert (policy.mean[0] > LEAST_MOVE).all(), policy.mean
    assert (policy.mean[1] < -LEAST_MOVE).all(), policy.mean


@pytest.mark.parametrize(("process", "kind"), ROWS)
@pytest.mark.parametrize("variant", [v for v in VARIANTS if VARIANTS[v]["name"] not in IN_GROUPS])
def test_a_loss_does_not_depend_on_its_batch_mates(variant: str, process: str, kind: str) -> None:
    policy, reference = networks(process, kind)
    torch.nn.init.normal_(policy.mean, generator=torch.Generator().manual_seed(0))
    state, rule = run(policy, reference), method(variant)
    for batch in rule.prepare(state, batch_for(rule, 4)):
        together = rule.loss(state, batch)
        assert together.value.shape == together.time.shape == (4,)
        for index in range(4):
            alone = rule.loss(state, rows(batch, index, 4))
            torch.testing.assert_close(alone.value[0], together.value[index], rtol=1e-5, atol=1e-6)
            for name, values in together.metrics.items():
                torch.testing.assert_close(alone.metrics[name][0], values[index], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("variant", WITH_LOGIT)
def test_at_the_reference_the_logit_is_exactly_zero(variant: str) -> None:
    policy, reference = networks("vp", "epsilon")
    state, rule = run(policy, reference), method(variant)
    for batch in rule.prepare(state, batch_for(rule, 8)):
        metrics = rule.loss(state, batch).metrics
        assert (metrics["h"] == 0).all() and (metrics["accuracy"] == 0.5).all()
        assert (metrics["d_w"] == 0).all() and (metrics["d_l"] == 0).all()


def test_plain_dpo_starts_at_ln_2() -> None:
    policy, reference = networks("flow", "flow")
    state, rule = run(policy, reference), method("dpo")
    [batch] = rule.prepare(state, pairs(8))
    torch.testing.assert_close(rule.loss(state, batch).value, torch.full((8,), 2.0).log())


@pytest.mark.parametrize("variant", VARIANTS)
def test_only_the_policy_gets_a_gradient(variant: str) -> None:
    policy, reference = networks("vp", "epsilon")
    state, rule = run(policy, reference), method(variant)
    with torch.no_grad():
        batches = rule.prepare(state, batch_for(rule, 8))
    for batch in batches:
        rule.loss(state, batch).value.mean().backward()
    assert policy.mean.grad is not None and policy.mean.grad.abs().sum() > 0
    assert reference.mean.grad is None


def test_the_released_expression() -> None:
    """Diffusion-DPO's own arithmetic, written out: -0.5 beta [(m_w - m_l) - (r_w - r_l)] inside -logsigmoid."""
    policy, reference = networks("vp", "epsilon")
    torch.nn.init.normal_(policy.mean, generator=torch.Generator().manual_seed(0))
    state, rule = run(policy, reference), method("dpo")
    [batch] = rule.prepare(state, pairs(4))
    m = (policy(batch.x_t, batch.t, batch.condition) - batch.y).pow(2).mean(1)
    r = (reference(batch.x_t, batch.t, batch.condition) - batch.y).pow(2).mean(1)
    inside = -0.5 * BETA * ((m[:4] - m[4:]) - (r[:4] - r[4:]))
    torch.testing.assert_close(rule.loss(state, batch).value, -torch.nn.functional.logsigmoid(inside))


def test_swapping_winner_and_loser_flips_the_logit() -> None:
    policy, reference = networks("vp", "epsilon")
    torch.nn.init.normal_(policy.mean, generator=torch.Generator().manual_seed(0))
    rule, batch = method("dpo"), pairs(4)
    swapped = replace(batch, members=batch.members[::-1])
    one, other = (
        rule.loss(run(policy, reference), rule.prepare(run(policy, reference), b)[0]) for b in (batch, swapped)
    )
    torch.testing.assert_close(one.metrics["h"], -other.metrics["h"])


def test_a_tie_pulls_neither_way() -> None:
    policy, reference = networks("vp", "epsilon")
    state, rule = run(policy, reference), method("dpo")
    [batch] = rule.prepare(state, pairs(8, label=0.5))
    rule.loss(state, batch).value.mean().backward()
    assert policy.mean.grad is not None
    torch.testing.assert_close(policy.mean.grad, torch.zeros_like(policy.mean), rtol=0, atol=1e-7)


def test_pairs_share_time_and_noise() -> None:
    policy, reference = networks("vp", "epsilon")
    state = run(policy, reference)
    [batch] = method("dpo").prepare(state, pairs(4))
    assert torch.equal(batch.t[:4], batch.t[4:])
    assert torch.equal(batch.y[:4], batch.y[4:])  # the target of an epsilon network is the noise


def test_time_range_is_kept() -> None:
    rule = build(METHODS, {"name": "dpo", "time_low": 0.5, "time_high": 0.6}, what="method")
    policy, reference = networks("vp", "epsilon")
    [batch] = rule.prepare(run(policy, reference), pairs(200))
    assert batch.t.min() >= 499 and batch.t.max() <= 600


def test_a_missing_reference_is_named() -> None:
    policy, reference = networks("vp", "epsilon")
    state, rule = run(policy, reference), method("dpo")
    [batch] = rule.prepare(state, pairs(2))
    with pytest.raises(ValueError, match="reference: {name: adapter_off}"):
        rule.loss(replace(state, reference=None), batch)


@pytest.mark.parametrize("name", METHODS)
def test_needs_are_declared_and_sections_build(name: str) -> None:
    rule = build(METHODS, ROW[name], what="method")
    assert rule.needs <= set(Need) and rule.needs & {Need.PAIRS, Need.PROMPTS}


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"name": "dpo", "beta": -1}, "method.beta"),
        ({"name": "dpo", "link": "logistic"}, "method.link"),
        ({"name": "dpo", "link": "exo"}, "method.label_smoothing"),
        ({"name": "dpo", "time_low": 0.9, "time_high": 0.1}, "method.time_low"),
        ({"name": "dpo", "betta": 1}, "did you mean 'beta'"),
        ({"name": "dpoo"}, "did you mean 'dpo'"),
        ({"name": "dpo", "beta": "high"}, "method.beta: expected float, got 'high'"),
    ],
)
def test_bad_sections_are_named(section: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(METHODS, section, what="method")


BAD = {"beta": (0, -1, float("nan")), "reuse": (0,), "timestep_weight": ("snr",), "time_low": (-0.1, 1.0),
       "time_high": (0.0, 1.1), "steps": (0,), "guidance": (float("nan"),), "at_once": (0,), "renoise": (-1,),
       "eta": (-0.1,)}  # fmt: skip


@pytest.mark.parametrize("name", METHODS)
def test_a_value_outside_its_range_is_refused_by_its_name(name: str) -> None:
    known = [
        (field.name, value) for field in fields(resolve(METHODS, name, "method")) for value in BAD.get(field.name, ())
    ]
    assert known
    for key, value in known:
        if (name, key) == ("mapo", "beta") and value == 0:
            continue  # without its margin MaPO is SFT
        with pytest.raises(ValueError, match=key):
            build(METHODS, {"name": name, key: value}, what="method")


def test_known_reference_errors_spare_the_reference_and_change_nothing() -> None:
    policy, reference = networks("vp", "epsilon")
    torch.nn.init.normal_(policy.mean)
    state = run(policy, reference)
    rule = method("dpo")
    with torch.no_grad():
        (noised,) = rule.prepare(state, pairs(4))
    known = replace(noised, reference_errors=reference_errors(state, noised))
    alone = replace(state, reference=None)
    with pytest.raises(ValueError, match="needs|has none"):
        rule.loss(alone, noised)
    assert torch.equal(rule.loss(alone, known).value, rule.loss(state, noised).value)
    assert not known.reference_errors.requires_grad
