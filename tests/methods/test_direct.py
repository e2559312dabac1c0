"""Methods that differentiate a reward: the gradient is that of the joint graph, taken in parts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from toy import PROCESSES, ROWS, sampling_times
from toy_views import batch_for, prompts, run, toy_method

from diffalign.methods.base import Method, Run
from diffalign.sampling import Condition, carries, ddim_stepper, guided, sample
from diffalign.scores import Scores, scores_of

DIRECT = ("alignprop", "draft", "draft_lv", "refl", "drtune")


class Bent(torch.nn.Module):
    """A network that is not linear in what it is given, so that its Jacobians count."""

    def __init__(self, process: str, kind: str) -> None:
        super().__init__()
        self.process, self.kind = PROCESSES[process], kind
        g = torch.Generator().manual_seed(0)
        self.weight = torch.nn.Parameter(0.4 * torch.randn(3, 3, generator=g))
        self.bias = torch.nn.Parameter(0.4 * torch.randn(5, 3, generator=g))
        self.calls = 0

    def forward(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        self.calls += 1
        return torch.tanh(x_t @ self.weight + self.bias[condition["prompt"]])


def reward(latents: Tensor) -> Tensor:
    return torch.sin(latents).sum(1) - 0.1 * latents.square().sum(1)


@torch.enable_grad()
def slope(latents: Tensor, prompts: Sequence[str]) -> tuple[Scores, Tensor]:
    leaf = latents.detach().requires_grad_()
    total = reward(leaf)
    return scores_of({"toy": total.detach()}, {"toy": 1.0}), torch.autograd.grad(total.sum(), leaf)[0]


def state_of(network: Any, seed: int = 0) -> Run:
    return replace(run(network, network, seed), reward_gradient=slope)


def in_parts(rule: Method, network: Bent, count: int = 4) -> list[Tensor]:
    """The gradient as the trainer takes it."""
    state = state_of(network)
    with torch.no_grad():
        batches = rule.prepare(state, batch_for(rule, count))
    network.zero_grad()
    for batch in batches:
        (rule.loss(state, batch).value.mean() / len(batches)).backward()
    return [p.grad.clone() for p in network.parameters() if p.grad is not None]


def joint(
    network: Bent, walk: Callable[[Tensor, Tensor, Condition, Condition], Tensor], steps: int, count: int = 4
) -> list[Tensor]:
    """The gradient of the whole graph at once: noise, walk, reward."""
    batch, g = prompts(count), torch.Generator().manual_seed(0)
    network.zero_grad()
    x = torch.randn(count, 3, generator=g)
    end = walk(x, sampling_times(network.process, steps), batch.conditions[0], batch.negative)
    (-reward(end).mean()).backward()
    return [p.grad.clone() for p in network.parameters() if p.grad is not None]


@pytest.mark.parametrize(("process", "kind"), ROWS)
@pytest.mark.parametrize(("last", "guidance"), [(1, 1.0), (3, 2.0), (5, 2.0)])
def test_drafts_gradient_is_that_of_the_joint_graph(process: str, kind: str, last: int, guidance: float) -> None:
    network = Bent(process, kind)
    rule = toy_method({"name": "draft", "last": last, "steps": 5, "guidance": guidance, "at_once": 3})

    def walk(x: Tensor, times: Tensor, condition: Condition, negative: Condition) -> Tensor:
        step = ddim_stepper(guided(network, negative, guidance), network.process, kind, condition)
        return sample(step, x, times, grad_steps=range(5 - last, 5)).x

    for ours, theirs in zip(in_parts(rule, network, 3), joint(network, walk, 5, 3), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("process", "kind"), [("vp", "v_prediction"), ("flow", "flow")])
def test_whole_walks_agree_with_finite_differences_in_fp64(process: str, kind: str) -> None:
    network = Bent(process, kind).double()
    batch, noise = prompts(2), torch.randn(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    times = sampling_times(network.process, 5)

    def end() -> Tensor:
        step = ddim_stepper(network, network.process, kind, batch.conditions[0])
        return sample(step, noise, times, grad_steps=range(5), checkpoint=True).x

    reward(end()).sum().backward()
    h = 1e-6
    for parameter in network.parameters():
        assert parameter.grad is not None
        for place in [(0, 0), (1, 2)]:
            with torch.no_grad():
                found = []
                for side in (h, -h):
                    parameter[place] += side
                    found.append(float(reward(end()).sum()))
                    parameter[place] -= side
            # coefficients are fp32, the same ones on both sides
            assert float(parameter.grad[place]) == pytest.approx((found[0] - found[1]) / (2 * h), rel=1e-5, abs=1e-8)


@pytest.mark.parametrize(("process", "kind"), ROWS)
def test_drtune_is_the_walk_with_what_the_network_is_given_cut_off(process: str, kind: str) -> None:
    network = Bent(process, kind)
    rule = toy_method({"name": "drtune", "steps": 5, "late": 1, "trained": 5, "guidance": 1.0})

    def walk(x: Tensor, times: Tensor, condition: Condition, negative: Condition) -> Tensor:
        cut = lambda x_t, t, c: network(x_t.detach(), t, c)  # noqa: E731
        return sample(ddim_stepper(cut, network.process, kind, condition), x, times, grad_steps=range(5)).x

    ours = [5 * part for part in in_parts(rule, network)]  # five microbatches, of which the trainer takes the mean
    # the random step is drawn before the noise is, so the walks differ unless it is drawn here too
    batch, g = prompts(4), torch.Generator().manual_seed(0)
    torch.randint(1, (1,), generator=g)
    x = torch.randn(4, 3, generator=g)
    network.zero_grad()
    (-reward(walk(x, sampling_times(network.process, 5), batch.conditions[0], {})).mean()).backward()
    for mine, theirs in zip(ours, network.parameters(), strict=True):
        assert theirs.grad is not None
        torch.testing.assert_close(mine, theirs.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("process", "kind"), ROWS)
def test_what_a_step_carries_of_its_own_x(process: str, kind: str) -> None:
    noise_process = PROCESSES[process]
    times = sampling_times(noise_process, 4)
    held = torch.randn(1, 3, generator=torch.Generator().manual_seed(0))
    step = ddim_stepper(lambda *_: held, noise_process, kind, {})
    for k, carried in enumerate(carries(noise_process, kind, times)):
        a, b = (step(torch.full((1, 3), x), times[k : k + 1], times[k + 1 : k + 2]).mean for x in (0.0, 1.0))
        torch.testing.assert_close((b - a)[0, 0], carried, rtol=1e-4, atol=1e-5)


def test_the_truncation_is_drawn_once_a_rollout_and_comes_to_nine_steps_of_fifty() -> None:
    """N(42, 5) of 50, as the paper has it: mean 9 differentiated steps, deviation 4.4, at most 26 of 20,000 or so."""
    rule: Any = toy_method({"name": "alignprop", "steps": 50})
    g = torch.Generator().manual_seed(0)
    left = torch.tensor([50.0 - rule.first(g) for _ in range(4000)])
    assert left.mean().item() == pytest.approx(9.0, abs=0.25) and left.std().item() == pytest.approx(4.4, abs=0.4)
    assert left.min() >= 1 and left.max() < 50
    uniform: Any = toy_method({"name": "alignprop", "steps": 10, "truncation": "uniform"})
    assert {uniform.first(g) for _ in range(200)} == set(range(1, 10))
    network = Bent("vp", "epsilon")
    batches = uniform.prepare(state_of(network), batch_for(uniform, 4))
    assert len({batch.aux["path"].shape[1] for batch in batches}) == 1


def test_steps_before_the_gradient_keep_no_graph() -> None:
    """What the backward pass holds does not grow with the walk."""
    sizes = []
    for steps in (10, 50):
        network = Bent("flow", "flow")
        rule = toy_method({"name": "draft", "last": 3, "steps": steps, "guidance": 1.0})
        state = state_of(network)
        batches = rule.prepare(state, batch_for(rule, 8))
        sizes.append(0)

        def counted(tensor: Tensor) -> Tensor:
            sizes[-1] += tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(counted, lambda t: t):
            rule.loss(state, batches[0])
    assert sizes[0] == sizes[1] > 0


def test_pictures_that_have_reached_the_goal_give_no_gradient() -> None:
    network = Bent("vp", "epsilon")
    free = toy_method({"name": "refl", "goal": 1e9})
    held = toy_method({"name": "refl", "goal": -1e9})
    assert all(g.abs().sum() > 0 for g in in_parts(free, network))
    assert all((g == 0).all() for g in in_parts(held, network))


def test_low_variance_has_a_noising_of_its_own_for_every_draw() -> None:
    network = Bent("vp", "epsilon")
    rule = toy_method({"name": "draft_lv", "draws": 3})
    batches = rule.prepare(state_of(network), batch_for(rule, 4))
    assert len(batches) == 3 and len({tuple(b.x_t.flatten().tolist()) for b in batches}) == 3
    assert len({float(b.t[0]) for b in batches}) == 1


@pytest.mark.parametrize("name", DIRECT)
def test_a_picture_without_a_score_gives_no_gradient(name: str) -> None:
    network = Bent("flow", "flow")

    def missing(latents: Tensor, texts: Sequence[str]) -> tuple[Scores, Tensor]:
        nothing = torch.full((len(latents),), torch.nan)
        return scores_of({"toy": nothing}, {"toy": 1.0}), torch.full_like(latents, torch.nan)

    rule = toy_method({"name": name})
    state = replace(state_of(network), reward_gradient=missing)
    for batch in rule.prepare(state, batch_for(rule, 2)):
        loss = rule.loss(state, batch)
        loss.value.sum().backward()
        assert loss.value.isfinite().all() and (loss.metrics["missing"] == 1).all()
    assert all((p.grad == 0).all() for p in network.parameters() if p.grad is not None)


def test_the_leash_holds_at_the_first_differentiated_step() -> None:
    network, other = Bent("vp", "epsilon"), Bent("vp", "epsilon")
    torch.nn.init.zeros_(other.weight)
    rule = toy_method({"name": "draft", "kl_weight": 2.0})
    state = replace(state_of(network), reference=other)
    [batch] = rule.prepare(state, batch_for(rule, 4))
    loss = rule.loss(state, batch)
    apart = (network(batch.x_t, batch.t, batch.condition) - other(batch.x_t, batch.t, batch.condition)).square().mean(1)
    torch.testing.assert_close(loss.metrics["kl"], apart.detach())
    torch.testing.assert_close(loss.value, -batch.aux["reward"] + 2 * apart)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"name": "draft", "last": 5, "steps": 4}, "method.last: expected 1 to 4 of the walk's steps, got 5"),
        ({"name": "refl", "late": 0}, "method.late"),
        ({"name": "drtune", "late": 2, "trained": 4, "steps": 4}, "method.trained: expected 1 to 3"),
        ({"name": "alignprop", "mean": 1.2}, "method.mean"),
        ({"name": "alignprop", "truncation": "none"}, "method.truncation: expected one of normal, uniform"),
        ({"name": "draft_lv", "draws": 0}, "method.draws"),
    ],
)
def test_bad_keywords_are_named(section: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        toy_method(section)
