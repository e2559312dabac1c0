"""KTO and TKTO: where z comes from, what the labels do, and that the reference is passed once."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from toy import PROCESSES, Denoiser
from toy_views import PROMPTS, perturbed, thumbs

from diffalign.methods.base import Run
from diffalign.methods.kto import KTO
from diffalign.methods.tkto import TKTO


def setting(std: float = 0.3) -> tuple[Run, Denoiser]:
    policy, reference = (Denoiser(PROCESSES["vp"], "epsilon", PROMPTS) for _ in range(2))
    torch.nn.init.normal_(policy.mean, std=std, generator=torch.Generator().manual_seed(1))
    return Run(policy, reference, policy.process, "epsilon", torch.Generator().manual_seed(0)), policy


def test_at_the_reference_a_kto_loss_is_one_half() -> None:
    run, policy = setting()
    torch.nn.init.zeros_(policy.mean)
    [noised] = KTO().prepare(run, thumbs(8))
    assert KTO().loss(run, noised).value.tolist() == [0.5] * 8
    assert (noised.aux["z"] == 0).all()


def test_the_baseline_is_the_mean_gain_of_all_ranks_and_never_below_zero() -> None:
    run, _ = setting()
    asked: list[float] = []

    def of_two_ranks(value: torch.Tensor) -> torch.Tensor:
        asked.append(value.item())
        return value + 3.0  # as if the other rank were better

    [noised] = KTO().prepare(replace(run, mean=of_two_ranks), thumbs(8))
    gain = KTO().loss(run, noised).metrics["gain"]
    assert asked == [pytest.approx(gain.mean().item())]
    torch.testing.assert_close(noised.aux["z"], gain.mean().expand(8) + 3.0)
    [below] = KTO().prepare(replace(run, mean=lambda value: value - 9.0), thumbs(8))
    assert (below.aux["z"] == 0).all()


def test_balanced_weighs_likes_and_dislikes_alike_and_stands_a_batch_of_one_kind() -> None:
    run, _ = setting()
    rule, batch = KTO(baseline="balanced"), thumbs(8)
    batch = replace(batch, label=torch.tensor([1.0, 0, 0, 0, 0, 0, 0, 0]))
    seen: list[torch.Tensor] = []
    [noised] = rule.prepare(replace(run, mean=lambda value: (seen.append(value), value)[1]), batch)
    gain = rule.loss(run, noised).metrics["gain"]
    expected = 0.5 * (gain[0] + gain[1:].mean())
    torch.testing.assert_close(noised.aux["z"][0], expected.clamp(min=0))
    [alone] = rule.prepare(replace(run, mean=lambda value: value), replace(batch, label=torch.ones(8)))
    assert alone.aux["z"].isfinite().all()


def test_no_baseline_needs_no_pass() -> None:
    run, _ = setting()

    def never(*_: object) -> torch.Tensor:
        raise AssertionError("the policy was called")

    [noised] = KTO(baseline="none").prepare(replace(run, policy=never), thumbs(4))
    assert (noised.aux["z"] == 0).all() and noised.reference_errors is None


def test_the_references_errors_are_kept_from_the_first_pass() -> None:
    run, _ = setting()
    [noised] = KTO().prepare(run, thumbs(4))
    known = KTO().loss(replace(run, reference=None), noised).value
    torch.testing.assert_close(known, KTO().loss(run, replace(noised, reference_errors=None)).value)


def test_weights_of_either_label() -> None:
    run, _ = setting()
    [noised] = KTO().prepare(run, thumbs(8))
    plain, liked = (KTO(beta=1.0, liked_weight=w).loss(run, noised).value for w in (1.0, 3.0))
    ratio = (liked / plain).tolist()
    assert ratio == pytest.approx([3.0 if label else 1.0 for label in noised.label.tolist()])


def test_every_picture_has_its_own_time_and_noise() -> None:
    run, _ = setting()
    [noised] = KTO().prepare(run, thumbs(16))
    assert len(noised.t.unique()) > 8 and len(noised.y.unique(dim=0)) == 16


def test_tkto_is_kto_on_both_captions_of_a_picture() -> None:
    run, _ = setting()
    [noised] = TKTO(beta=10.0).prepare(run, perturbed(6))
    value = TKTO(beta=10.0).loss(run, noised).value
    label = torch.cat([torch.ones(6), torch.zeros(6)])
    z = noised.aux["z"].repeat(2)
    single = KTO(beta=10.0).loss(run, replace(noised, label=label, aux={"z": z})).value
    torch.testing.assert_close(value, (single[:6] + single[6:]) / 2)
    assert torch.equal(noised.x_t[:6], noised.x_t[6:])


@pytest.mark.parametrize(
    ("rule", "options", "message"),
    [
        (KTO, {"utility": "bold"}, "method.utility: expected one of kto, loss_averse, risk_seeking"),
        (KTO, {"baseline": "ema"}, "method.baseline: expected one of batch, balanced, none"),
        (KTO, {"disliked_weight": -1.0}, "method.disliked_weight: expected a number of at least 0"),
        (TKTO, {"perturber": "rule"}, "unknown method.perturber 'rule', did you mean 'rules'"),
        (TKTO, {"perturber": {"name": "rules", "sed": 1}}, "did you mean 'seed'"),
        (TKTO, {"perturber": "llm"}, "needs base_url, model"),
    ],
)
def test_bad_options_are_named(rule: type, options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rule(**options)
