"""RankDPO: the gradient by single pictures is that of the whole sum, whatever the options."""

from __future__ import annotations

import pytest
import torch
from toy import PROCESSES, ROWS, Denoiser
from toy_views import PROMPTS, lists

from diffalign.losses import log_ratio, squared_error
from diffalign.losses.listwise import rank_preference, rank_weights, share_of_wins
from diffalign.methods.base import Run, reference_errors
from diffalign.methods.rankdpo import RankDPO
from diffalign.process import time_weight

OPTIONS = [{}, {"phi": "scores"}, {"rank_source": "model"}, {"share_noise": True}, {"timestep_weight": "x0"}]


def setting(process: str, kind: str) -> tuple[Run, Denoiser]:
    policy, reference = (Denoiser(PROCESSES[process], kind, PROMPTS) for _ in range(2))
    torch.nn.init.normal_(policy.mean, std=0.3, generator=torch.Generator().manual_seed(1))
    return Run(policy, reference, policy.process, kind, torch.Generator().manual_seed(0)), policy


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize(("process", "kind"), ROWS)
def test_two_passes_give_the_gradient_of_one(options: dict[str, object], process: str, kind: str) -> None:
    run, policy = setting(process, kind)
    rule, batch = RankDPO(beta=20.0, **options), lists(6)
    with torch.no_grad():
        parts = rule.prepare(run, batch)
    assert len(parts) == 4 and all(len(part.t) == 6 for part in parts)
    for part in parts:
        (rule.loss(run, part).value.mean() / len(parts)).backward()
    assert policy.mean.grad is not None
    by_parts = policy.mean.grad.clone()
    policy.mean.grad = None

    m = torch.stack([squared_error(policy(p.x_t, p.t, p.condition), p.y) for p in parts], 1)
    r = torch.stack([reference_errors(run, part) for part in parts], 1)
    weight = time_weight(rule.timestep_weight, kind, *run.process.coefficients(parts[0].t))
    rho = weight[:, None] * log_ratio(m, r, rule.beta)
    phi = batch.scores if rule.phi == "scores" else share_of_wins(batch.scores)
    weights = rank_weights(phi, phi if rule.rank_source == "phi" else rho.detach())
    whole = rank_preference(rho, phi, weights)
    whole.mean().backward()
    torch.testing.assert_close(by_parts, policy.mean.grad, rtol=1e-4, atol=1e-6)
    assert by_parts.abs().max() > 1e-3
    for part in parts:
        torch.testing.assert_close(rule.loss(run, part).value, whole)


def test_members_share_time_and_have_noise_of_their_own_unless_asked() -> None:
    run, _ = setting("vp", "epsilon")  # the target of an epsilon network is the noise
    own = RankDPO().prepare(run, lists(3))
    assert all(torch.equal(part.t, own[0].t) for part in own) and not torch.equal(own[0].y, own[1].y)
    shared = RankDPO(share_noise=True).prepare(run, lists(3))
    assert all(torch.equal(part.y, shared[0].y) for part in shared)


def test_at_the_reference_nothing_is_ordered_and_the_pair_metrics_are_zero() -> None:
    run, policy = setting("flow", "flow")
    torch.nn.init.zeros_(policy.mean)
    metrics = RankDPO().loss(run, RankDPO().prepare(run, lists(4))[0]).metrics
    assert (metrics["h"] == 0).all() and (metrics["accuracy"] == 0.5).all() and (metrics["d_w"] == 0).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": 0}, "method.beta: expected a number above 0"),
        ({"phi": "ranks"}, "method.phi: expected one of wins, scores"),
        ({"rank_source": "me"}, "method.rank_source: expected one of phi, model"),
        ({"timestep_weight": "snr"}, "method.timestep_weight: expected one of native"),
        ({"time_low": 1.0}, "method.time_low"),
    ],
)
def test_bad_options_are_named(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RankDPO(**options)
