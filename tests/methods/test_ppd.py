"""PPD: the golden value, who a loss looks at, and two users with opposite tastes on a network with an exact law."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from toy import PROCESSES, ROWS, Denoiser

from diffalign.methods.base import Batch, Run, pair_batch
from diffalign.methods.dpo import DPO
from diffalign.methods.ppd import PPD
from diffalign.pipelines.user_attention import USER
from diffalign.sampling import Condition

TASTES = torch.eye(2).unsqueeze(1)  # [2 users, N = 1 token, D = 2]


class Adapted(torch.nn.Module):
    """The toy network with the adapter's properties: its mean is u W, so nobody (u = 0) has the base's."""

    def __init__(self, process: str, kind: str) -> None:
        super().__init__()
        self.base = Denoiser(PROCESSES[process], kind, prompts=1)
        self.base.requires_grad_(False)
        self.weight = torch.nn.Parameter(torch.zeros(2, 3))

    def forward(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        mean = condition[USER].sum(1) @ self.weight
        rows = {"prompt": torch.arange(len(x_t))}
        return torch.func.functional_call(self.base, {"mean": mean}, (x_t, t, rows))


def pairs(count: int, seed: int = 0) -> Batch:
    """The same two pictures for both users, around +1 and -1: the first likes one, the second the other."""
    g = torch.Generator().manual_seed(seed)
    user = torch.arange(count) % 2
    side = (1.0 - 2.0 * user).view(-1, 1)
    noise = torch.randn(2, count, 3, generator=g) * 0.3
    return pair_batch(side + noise[0], -side + noise[1], {USER: TASTES[user]}, torch.ones(count))


def run(policy: Adapted, seed: int = 0) -> Run:
    reference = Adapted("vp", "epsilon")
    reference.base = policy.base
    return Run(policy, reference, policy.base.process, policy.base.kind, torch.Generator().manual_seed(seed))


def test_golden() -> None:
    """m_w .1000 m_l .1203 r_w .1002 r_l .1201 beta 5000: h = 1, loss .3132616875."""
    policy = Adapted("vp", "epsilon")
    state = run(policy)
    [batch] = PPD(beta=5000).prepare(state, pairs(1))
    said = {"policy": [0.1000, 0.1203], "reference": [0.1002, 0.1201]}

    def saying(errors: list[float]) -> Any:
        return lambda x_t, t, condition: batch.y + torch.tensor(errors).sqrt().view(-1, 1)

    state = replace(state, policy=saying(said["policy"]), reference=saying(said["reference"]))
    found = PPD(beta=5000).loss(state, batch)
    assert found.value.item() == pytest.approx(0.3132616875, abs=1e-3)  # fp32 errors
    assert found.metrics["h"].item() == pytest.approx(1.0, abs=2e-3)


def test_it_is_dpo_on_condition_of_a_user() -> None:
    policy = Adapted("vp", "epsilon")
    torch.nn.init.normal_(policy.weight, generator=torch.Generator().manual_seed(0))
    [ours], [theirs] = (rule.prepare(run(policy), pairs(4)) for rule in (PPD(beta=20), DPO(beta=20)))
    assert torch.equal(PPD(beta=20).loss(run(policy), ours).value, DPO(beta=20).loss(run(policy), theirs).value)


@pytest.mark.parametrize(("process", "kind"), ROWS)
def test_two_opposite_users_learn_opposite_things_and_nobody_stays_the_base(process: str, kind: str) -> None:
    policy = Adapted(process, kind)
    optimizer = torch.optim.Adam([policy.weight], lr=0.02)
    rule = PPD(beta=20)
    for step in range(40):
        state = run(policy, seed=step)
        [batch] = rule.prepare(state, pairs(64, seed=step))
        rule.loss(state, batch).value.mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert (policy.weight[0] > 0.02).all() and (policy.weight[1] < -0.02).all()
    x_t, t = torch.randn(3, 3), torch.full((3,), 0.5)
    nobody = {USER: torch.zeros(3, 1, 2)}
    assert torch.equal(policy(x_t, t, nobody), Adapted(process, kind)(x_t, t, nobody))


def test_a_pair_without_its_user_gives_no_gradient_and_the_logit_zero() -> None:
    policy = Adapted("vp", "epsilon")
    torch.nn.init.normal_(policy.weight)
    rule = PPD(beta=20, user_dropout=0.5)
    state = run(policy)
    [batch] = rule.prepare(state, pairs(64))
    dropped = (batch.condition[USER] == 0).flatten(1).all(1)
    assert torch.equal(dropped[:64], dropped[64:]) and 16 < dropped[:64].sum() < 48
    loss = rule.loss(state, batch)
    assert (loss.metrics["h"][dropped[:64]] == 0).all() and (loss.metrics["h"][~dropped[:64]] != 0).all()
    loss.value[dropped[:64]].sum().backward()
    assert policy.weight.grad is not None and (policy.weight.grad == 0).all()


def test_a_batch_without_users_is_refused() -> None:
    batch = pairs(2)
    nameless = replace(batch, conditions=({"prompt": torch.zeros(2)},) * 2)
    with pytest.raises(ValueError, match="names no users"):
        PPD().prepare(run(Adapted("vp", "epsilon")), nameless)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"beta": 0}, "method.beta"),
        ({"user_dropout": 1}, "user_dropout"),
        ({"time_low": 1.0}, "time_low"),
    ],
)
def test_bad_values_are_named(keywords: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PPD(**keywords)
