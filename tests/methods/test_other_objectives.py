"""What MaPO, CaPO, DSPO, TDPO, DCPO, DenseDPO and DPO's options promise beside the contract of all methods."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from toy import PROCESSES, Denoiser
from toy_views import PROMPTS, captioned_pairs, labeled_clips, labeled_parts, lists, pairs, perturbed

from diffalign.losses import squared_error
from diffalign.methods.base import Batch, Method, Run
from diffalign.methods.capo import CaPO
from diffalign.methods.dcpo import DCPO
from diffalign.methods.densedpo import DenseDPO
from diffalign.methods.dpo import DPO
from diffalign.methods.dspo import DSPO
from diffalign.methods.mapo import SCALES, MaPO
from diffalign.methods.tdpo import TDPO
from diffalign.process import PARAMETRIZATIONS


def setting(process: str = "vp", kind: str = "epsilon", std: float = 0.3) -> tuple[Run, Denoiser]:
    policy, reference = (Denoiser(PROCESSES[process], kind, PROMPTS) for _ in range(2))
    if std:
        torch.nn.init.normal_(policy.mean, std=std, generator=torch.Generator().manual_seed(1))
    return Run(policy, reference, policy.process, kind, torch.Generator().manual_seed(0)), policy


def loss_of(rule: Method, run: Run, batch: Batch):
    run.generator.manual_seed(0)
    [noised] = rule.prepare(run, batch)
    return rule.loss(run, noised)


def gradient(rule: Method, run: Run, policy: Denoiser, batch: Batch) -> torch.Tensor:
    policy.mean.grad = None
    loss_of(rule, run, batch).value.mean().backward()
    assert policy.mean.grad is not None
    return policy.mean.grad.clone()


# -- DPO's options -----------------------------------------------------------------------------------------------------


def test_winner_preserving_changes_the_gradient_and_not_the_value() -> None:
    run, policy = setting()
    plain, kept = DPO(beta=20.0), DPO(beta=20.0, winner_preserving=0.6)
    assert torch.equal(loss_of(plain, run, pairs(8)).value, loss_of(kept, run, pairs(8)).value)
    assert not torch.allclose(gradient(plain, run, policy, pairs(8)), gradient(kept, run, policy, pairs(8)))


def test_equal_pictures_with_winner_preserving_still_learn_the_winner() -> None:
    """Winner and loser alike: plain DPO has no gradient, and the scaled loser leaves the winner's."""
    run, policy = setting()
    batch = pairs(8)
    batch = replace(batch, members=(batch.winner, batch.winner))
    torch.testing.assert_close(gradient(DPO(beta=20.0), run, policy, batch), torch.zeros(PROMPTS, 3))
    assert gradient(DPO(beta=20.0, winner_preserving=0.6), run, policy, batch).abs().max() > 1e-3


def test_the_alpha_divergence_between_its_ends() -> None:
    run, _ = setting()
    values = [loss_of(DPO(beta=2.0, divergence=name, alpha=a), run, pairs(8)).value
              for name, a in (("reverse_kl", 0.5), ("alpha", 1.0), ("forward_kl", 0.5), ("alpha", 0.0))]  # fmt: skip
    torch.testing.assert_close(values[0], values[1])
    torch.testing.assert_close(values[2], values[3])
    assert not torch.allclose(values[0], values[2])


# -- MaPO --------------------------------------------------------------------------------------------------------------


def test_mapo_needs_no_reference_and_has_a_scale_for_every_parametrization() -> None:
    assert set(SCALES) == set(PARAMETRIZATIONS)
    run, _ = setting()
    found = loss_of(MaPO(), replace(run, reference=None), pairs(8))
    assert found.value.isfinite().all() and not {"d_w", "r_w"} & found.metrics.keys()


def test_mapo_without_its_margin_is_sft_on_the_winner() -> None:
    run, _ = setting("flow", "flow")
    found = loss_of(MaPO(beta=0.0), run, pairs(8))
    torch.testing.assert_close(found.value.detach(), found.metrics["m_w"])


# -- CaPO --------------------------------------------------------------------------------------------------------------


def test_capo_is_zero_where_the_margin_is_the_calibrated_one() -> None:
    run, _ = setting(std=0.0)
    batch = lists(8)
    at_reference = loss_of(CaPO(), run, batch)
    target = at_reference.metrics["target"]
    assert (at_reference.metrics["h"] == 0).all()
    torch.testing.assert_close(at_reference.value, target.square())
    ready = loss_of(CaPO(calibrated=True), run, batch).metrics["target"]
    assert ready.tolist() == [1.0] * 8  # the record's own 1 and 0
    cold = loss_of(CaPO(temperature=0.01), run, batch).metrics["target"]
    assert (cold > target).all()


def test_capo_compares_best_and_worst_with_one_noise() -> None:
    run, _ = setting()
    [noised] = CaPO().prepare(run, lists(4))
    assert len(noised.t) == 8 and torch.equal(noised.y[:4], noised.y[4:])


# -- DSPO --------------------------------------------------------------------------------------------------------------


def test_dspo_at_the_reference_is_sft_with_a_gradient_scaled_by_the_gate() -> None:
    run, policy = setting(std=0.0)
    rule = DSPO(strength=0.5)
    found = loss_of(rule, run, pairs(8))
    torch.testing.assert_close(found.value.detach(), found.metrics["m_w"])
    run.generator.manual_seed(0)
    [noised] = rule.prepare(run, pairs(8))
    policy.mean.grad = None
    squared_error(policy(noised.x_t, noised.t, noised.condition), noised.y)[:8].mean().backward()
    assert policy.mean.grad is not None
    sft = policy.mean.grad.clone()
    torch.testing.assert_close(gradient(rule, run, policy, pairs(8)), (1 - 0.5 * 0.5) * sft)


def test_as_released_is_within_a_thousandth_of_sft() -> None:
    run, _ = setting()
    found = loss_of(DSPO(strength=0.001, as_released=True), run, pairs(8))
    torch.testing.assert_close(found.value.detach(), found.metrics["m_w"], rtol=2e-3, atol=0)
    own = loss_of(DSPO(beta=50.0, strength=0.5), run, pairs(8))
    assert ((own.value - own.metrics["m_w"]).abs() > 2e-3 * own.metrics["m_w"]).any()


def test_the_brier_form_is_the_squared_gate() -> None:
    run, _ = setting()
    found = loss_of(DSPO(beta=20.0, form="brier"), run, pairs(8))
    torch.testing.assert_close(found.value.detach(), torch.sigmoid(-found.metrics["h"]).square())


# -- two captions ------------------------------------------------------------------------------------------------------


def test_dcpo_with_one_caption_is_dpo() -> None:
    run, _ = setting()
    one, other = (loss_of(rule, run, pairs(8)).value for rule in (DCPO(beta=20.0), DPO(beta=20.0)))
    torch.testing.assert_close(one, other)
    assert not torch.allclose(loss_of(DCPO(beta=20.0), run, captioned_pairs(8)).value, other)


def test_dropped_prompts_of_both_captions_teach_nothing() -> None:
    """What prompt dropout does to a row of tdpo: both captions are the empty one."""
    run, policy = setting()
    batch = perturbed(8)
    dropped = replace(batch, conditions=(batch.conditions[0],) * 2)
    assert (loss_of(TDPO(beta=20.0), run, dropped).metrics["h"] == 0).all()
    torch.testing.assert_close(gradient(TDPO(beta=20.0), run, policy, dropped), torch.zeros(PROMPTS, 3))
    assert gradient(TDPO(beta=20.0), run, policy, batch).abs().max() > 1e-3


# -- DenseDPO ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [labeled_clips, labeled_parts])
def test_flipped_labels_flip_the_logit(make) -> None:
    run, _ = setting()
    batch = make(6)
    assert batch.signs is not None
    one, other = (loss_of(DenseDPO(beta=20.0), run, b).metrics for b in (batch, replace(batch, signs=-batch.signs)))
    torch.testing.assert_close(one["h"], -other["h"])
    torch.testing.assert_close(one["d_w"], other["d_l"])


@pytest.mark.parametrize("make", [labeled_clips, labeled_parts])
def test_one_label_for_all_parts_is_dpo(make) -> None:
    run, _ = setting()
    batch = make(6)
    alike = replace(batch, signs=torch.ones_like(batch.signs))
    dense, plain = (loss_of(rule, run, alike) for rule in (DenseDPO(beta=20.0), DPO(beta=20.0)))
    torch.testing.assert_close(dense.value, plain.value, rtol=1e-4, atol=1e-5)
    for name in ("d_w", "d_l", "accuracy"):
        torch.testing.assert_close(dense.metrics[name], plain.metrics[name], rtol=1e-4, atol=1e-5)


def test_clips_move_towards_their_better_parts_too() -> None:
    run, policy = setting(std=0.0)
    move = -gradient(DenseDPO(beta=20.0), run, policy, labeled_clips(32))
    assert (move[0] > 0).all() and (move[1] < 0).all()


def test_noise_is_shared_unless_asked() -> None:
    run, _ = setting()
    [shared], [own] = (DenseDPO(share_noise=s).prepare(run, labeled_parts(2)) for s in (True, False))
    assert torch.equal(shared.y[:2], shared.y[2:]) and not torch.equal(own.y[:2], own.y[2:])


def test_pairs_without_labels_of_parts_are_refused() -> None:
    run, _ = setting()
    with pytest.raises(ValueError, match="densedpo needs labels of parts"):
        DenseDPO().prepare(run, pairs(2))


@pytest.mark.parametrize(
    ("rule", "options", "message"),
    [
        (DPO, {"divergence": "kl"}, "method.divergence: expected one of reverse_kl, forward_kl, js, alpha"),
        (DPO, {"winner_preserving": 1.5}, "method.winner_preserving"),
        (MaPO, {"scale": 0.0}, "method.scale: expected a number above 0"),
        (MaPO, {"beta": -0.1}, "method.beta"),
        (CaPO, {"temperature": 0.0}, "method.temperature"),
        (DSPO, {"strength": 2.0}, "method.strength: expected a number above 0 and at most 1"),
        (DSPO, {"form": "sdxl"}, "method.form: expected one of score, brier"),
        (DenseDPO, {"segment_norm": "mean"}, "method.segment_norm: expected one of mean_all, mean_nontie, sum"),
        (DCPO, {"beta": float("nan")}, "method.beta"),
        (TDPO, {"perturber": {"name": "rules", "seed": "x"}}, "method.perturber.seed: expected int"),
    ],
)
def test_bad_options_are_named(rule: type, options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rule(**options)
