"""Methods that are paid for what they draw: replay, clips, pairs, the exact gradient in two passes, advantages."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from toy import ROWS, Denoiser
from toy_views import batch_for, networks, prompts, run, toy_method

from diffalign.advantages import ADVANTAGES, COMBINATIONS, dominated
from diffalign.episodes import Explorer, Replays, every_step, explore, log_probs_of
from diffalign.groups import Group
from diffalign.losses.policy import (
    centred_differences,
    clamped_ratio,
    clipped_ratio,
    forward_process,
    pairs_of,
    reward_differences,
    step_preferences,
)
from diffalign.methods.base import Method, Run
from diffalign.methods.paid import advantages_of, seen
from diffalign.scores import known, scores_of
from diffalign.transition import Gaussian

REPLAYING = ("d3po", "prdp", "ddpo", "dpok", "grpo", "pref_grpo")


def moved_policy(process: str = "vp", kind: str = "epsilon", by: float = 0.3) -> tuple[Denoiser, Denoiser]:
    policy, reference = networks(process, kind)
    torch.nn.init.normal_(policy.mean, std=by, generator=torch.Generator().manual_seed(0))
    return policy, reference


def scored(state: Run, table: Sequence[float]) -> Run:
    """A run whose pictures get these scores, in turn."""
    given = iter(table)

    def score(latents: Tensor, prompts: Sequence[str]) -> Any:
        return known(scores_of({"toy": torch.tensor([next(given) for _ in prompts])}, {"toy": 1.0}))

    return replace(state, score=score)


def gradient(rule: Method, state: Run, policy: Denoiser, count: int = 4) -> Tensor:
    """Of the mean over microbatches, as the trainer takes it."""
    with torch.no_grad():
        batches = rule.prepare(state, batch_for(rule, count))
    policy.zero_grad()
    for batch in batches:
        (rule.loss(state, batch).value.mean() / len(batches)).backward()
    assert policy.mean.grad is not None
    return policy.mean.grad.clone()


# -- rollouts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("process", "kind"), ROWS)
@pytest.mark.parametrize("name", REPLAYING)
def test_before_an_update_every_ratio_is_1_to_the_bit(name: str, process: str, kind: str) -> None:
    policy, reference = networks(process, kind)
    rule = toy_method({"name": name, "at_once": 8})
    assert isinstance(rule, Replays)
    state = run(policy, reference)
    for batch in rule.prepare(state, batch_for(rule, 4)):
        again = rule.explorer.law(state, policy, batch).log_prob(batch.y)
        assert torch.equal(again, batch.aux["log_prob"]) and again.isfinite().all()


@pytest.mark.parametrize("name", [name for name in REPLAYING if name != "pref_grpo"])
@pytest.mark.parametrize(("group", "at_once"), [(3, 8), (10, 8), (2, 8), (3, 2)])
def test_a_replay_asks_the_network_for_as_many_pictures_as_the_rollout(name: str, group: int, at_once: int) -> None:
    """Kernels round otherwise in batches of another size, so a ratio of 1 asks for the same ones."""
    policy, reference = networks("vp", "epsilon")
    rule, sizes = toy_method({"name": name, "group": group, "at_once": at_once, "steps": 3}), []
    assert isinstance(rule, Replays)
    policy.register_forward_hook(lambda module, args, output: sizes.append(len(args[0])))
    state = replace(run(policy, reference), same=True, ranks=2)
    batches = rule.prepare(state, batch_for(rule, 5))
    drawn, sizes[:] = sizes[::3], []  # three steps of each part
    for batch in batches:
        rule.explorer.law(state, policy, batch)
    assert sizes[::2] == drawn and sum(drawn) == 5 * group  # two of them random


@pytest.mark.parametrize("store", ["float32", "bfloat16", "float16"])
def test_what_is_judged_is_what_is_stored(store: str) -> None:
    """In other batches too, where kernels may round otherwise: 1e-6."""
    policy, reference = moved_policy()
    how, state = Explorer(6, 2.0, group=3, at_once=4, store=store), run(policy, reference)
    episodes = explore(state, policy, prompts(4), how)
    assert str(episodes.states.dtype) == f"torch.{store}" and episodes.states.shape == (12, 6, 3)
    for at_once in (4, 12, 1):
        new = log_probs_of(state, policy, episodes, replace(how, at_once=at_once))
        torch.testing.assert_close(new, episodes.log_probs, rtol=0, atol=1e-6)


def test_pictures_do_not_depend_on_how_many_are_drawn_at_once() -> None:
    policy, reference = moved_policy("flow", "flow")
    drawn = [explore(run(policy, reference), policy, prompts(3), Explorer(5, 1.0, group=4, at_once=n)).x
             for n in (1, 5, 12)]  # fmt: skip
    torch.testing.assert_close(drawn[0], drawn[1])
    torch.testing.assert_close(drawn[0], drawn[2])


def test_groups_start_from_one_noise_if_asked_and_differ_all_the_same() -> None:
    policy, reference = networks("vp", "epsilon")
    together = explore(run(policy, reference), policy, prompts(2), Explorer(4, 1.0, group=3, same_start=True))
    first = together.states[:, 0].view(2, 3, -1)
    assert torch.equal(first[:, :1].expand_as(first), first) and len(together.x.unique(dim=0)) == 6
    apart = explore(run(policy, reference), policy, prompts(2), Explorer(4, 1.0, group=3))
    assert len(apart.states[:, 0].unique(dim=0)) == 6


@pytest.mark.parametrize("name", REPLAYING)
def test_every_method_that_replays_learns_from_a_window_alone(name: str) -> None:
    policy, reference = moved_policy()
    rule = toy_method({"name": name, "group": 2, "window": 2, "at_once": 8})
    state = run(policy, reference)
    batches = rule.prepare(state, batch_for(rule, 4))
    assert isinstance(rule, Replays) and len({float(batch.t[0]) for batch in batches}) == 2 < rule.steps - 1
    for batch in batches:
        again = rule.explorer.law(state, policy, batch).log_prob(batch.y)
        assert torch.allclose(again, batch.aux["log_prob"]) == (name != "d3po")  # its is the reference's
        assert rule.loss(state, batch).value.isfinite().all()


def test_a_window_is_random_in_the_first_half_alone() -> None:
    policy, reference = networks("flow", "flow")
    starts = set()
    for seed in range(20):
        state = run(policy, reference, seed=seed)
        episodes = explore(state, policy, prompts(2), Explorer(10, 1.0, window=2, group=2))
        times = state.times(10)
        place = int((times == episodes.times[0]).nonzero())
        assert torch.equal(episodes.times, times[place : place + 3]) and episodes.log_probs.shape == (4, 2)
        starts.add(place)
    assert starts == {0, 1, 2, 3}


@pytest.mark.parametrize("start", [0, 4, 7])
def test_a_window_begins_where_it_is_told_to(start: int) -> None:
    policy, reference = networks("flow", "flow")
    state = run(policy, reference)
    episodes = explore(state, policy, prompts(2), Explorer(10, 1.0, window=2, window_start=start, group=2))
    assert torch.equal(episodes.times, state.times(10)[start : start + 3])


def test_the_last_step_leaves_no_noise() -> None:
    """Two walks that differ in their noise alone end where the network sees their picture in the last state."""
    policy, reference = networks("flow", "flow")
    state = run(policy, reference)
    episodes = explore(state, policy, prompts(2), Explorer(5, 1.0, group=2))
    last, t = episodes.states[:, -1], episodes.times[-1].expand(4)
    y = policy(last, t, episodes.condition)
    torch.testing.assert_close(episodes.x, last - t[:, None] * y)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"steps": 1, "guidance": 1.0}, "method.steps: expected at least 2"),
        ({"steps": 4, "guidance": 1.0, "window": 4}, "method.window"),
        ({"steps": 4, "guidance": 1.0, "window": 2, "window_start": 2}, "method.window_start: .* 0 to 1, .* got 2"),
        ({"steps": 4, "guidance": 1.0, "window_start": 0}, "method.window_start: expected method.window above 0"),
        ({"steps": 4, "guidance": -1.0}, "method.guidance"),
        ({"steps": 4, "guidance": 1.0, "noise_level": 0.0}, "method.noise_level"),
        ({"steps": 4, "guidance": 1.0, "store": "int8"}, "method.store: expected one of float32"),
        ({"steps": 4, "guidance": 1.0, "dynamics": "sde"}, "method.dynamics: expected one of auto, ddim"),
    ],
)
def test_bad_rollouts_are_named(keywords: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Explorer(**keywords)


def test_steps_of_flows_are_refused_elsewhere() -> None:
    policy, reference = networks("vp", "epsilon")
    with pytest.raises(ValueError, match="flow_sde is for rectified flows"):
        explore(run(policy, reference), policy, prompts(1), Explorer(4, 1.0, dynamics="flow_sde"))


@pytest.mark.parametrize("name", ["d3po", "prdp", "grpo", "pref_grpo", "nft"])
def test_a_group_of_one_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="at least 2 pictures of a prompt to compare, got 1"):
        toy_method({"name": name, "group": 1})


# -- ratios ------------------------------------------------------------------------------------------------------------


def test_where_the_clipped_and_the_clamped_ratio_have_a_gradient() -> None:
    """PPO's is zero where the ratio has left the band on the side that the advantage asks for; DPOK's outside of it."""
    c, ratios = 0.1, [0.8, 0.95, 1.0, 1.05, 1.2]
    for advantage in (1.0, -1.0):
        log_ratio = torch.tensor(ratios).log().requires_grad_()
        a = torch.full((5,), advantage)
        (ppo,) = torch.autograd.grad(clipped_ratio(log_ratio, a, c).sum(), log_ratio)
        (dpok,) = torch.autograd.grad(clamped_ratio(log_ratio, a, c).sum(), log_ratio)
        gone = [r > 1 + c if advantage > 0 else r < 1 - c for r in ratios]
        assert (ppo == 0).tolist() == gone
        assert (dpok == 0).tolist() == [r > 1 + c or r < 1 - c for r in ratios]
        torch.testing.assert_close(ppo[~torch.tensor(gone)], -advantage * torch.tensor(ratios)[~torch.tensor(gone)])


@pytest.mark.parametrize("name", ["ddpo", "d3po"])
def test_more_updates_than_there_is_to_share_out_are_refused(name: str) -> None:
    rule = toy_method({"name": name, "group": 2, "updates": 9})
    with pytest.raises(ValueError, match=r"method.updates: 9 updates share out the [48] pictures or prompts"):
        rule.prepare(run(*networks("vp", "epsilon")), batch_for(rule, 4))


def test_updates_share_the_pictures_of_a_rollout_out() -> None:
    policy, reference = networks("vp", "epsilon")
    rule = toy_method({"name": "ddpo", "group": 2, "updates": 3, "at_once": 4})
    kept: list[Any] = []

    def held(updates: int, draw: Any) -> Any:
        if not kept:
            kept.append(draw())
        return kept[0]

    seen: list[Tensor] = []
    for step in range(3):
        state = replace(run(policy, reference), held=held, step=step)
        steps = rule.prepare(state, batch_for(rule, 6))
        seen += [batch.y for batch in steps if torch.equal(batch.aux["s"], steps[0].aux["s"])]
    every = kept[0][0].states[:, 1]
    assert torch.equal(torch.cat(seen), every) and len(every) == 12


# -- D3PO --------------------------------------------------------------------------------------------------------------


def test_two_walks_may_change_places_and_a_tie_gives_nothing() -> None:
    q = torch.tensor([[0.02, -0.03], [0.01, 0.05]], requires_grad=True)
    scores = torch.tensor([[1.0, 0.0], [2.0, 2.0]])
    total, count = step_preferences(q, scores, 0.1, 0.1)
    swapped, _ = step_preferences(q.flip(1), scores.flip(1), 0.1, 0.1)
    assert count.tolist() == [1, 0] and torch.equal(total, swapped) and total[1] == 0
    torch.testing.assert_close(total[0], torch.tensor(math.log1p(math.exp(-0.1 * 0.05))))
    (slope,) = torch.autograd.grad(total.sum(), q)
    assert (slope[1] == 0).all() and slope[0, 0] < 0 < slope[0, 1]


def test_beyond_the_clamp_nothing_pulls_back() -> None:
    q = torch.tensor([[0.2, -0.2]], requires_grad=True)
    total, _ = step_preferences(q, torch.tensor([[1.0, 0.0]]), 0.1, 0.1)
    (slope,) = torch.autograd.grad(total.sum(), q)
    assert (slope == 0).all()


@pytest.mark.parametrize("group", [2, 4])
def test_shared_and_paired_microbatches_have_one_gradient(group: int) -> None:
    found, evaluated = [], []
    scores = [0.1, 0.4, 0.4, 0.9, 0.0, 0.0, 0.0, 0.0, 1.0, 0.5, float("nan"), 0.7, 0.2, 0.3, 0.4, 0.6]
    for mode in ("shared", "pairs"):
        policy, reference = moved_policy()
        rule = toy_method({"name": "d3po", "mode": mode, "group": group, "beta": 5.0, "at_once": 4096})
        state = replace(scored(run(policy, reference), scores), step=1)
        found.append(gradient(rule, state, policy, 16 // group))
        evaluated.append(sum(len(b.t) for b in rule.prepare(scored(state, scores), batch_for(rule, 16 // group))))
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-7)
    assert found[0].abs().sum() > 0
    pairs = len(pairs_of(torch.tensor(scores).view(-1, group))[0])
    assert evaluated == [16 * 3, 2 * pairs * 3]


def test_ranks_that_must_agree_share() -> None:
    policy, reference = moved_policy()
    rule, lengths = toy_method({"name": "d3po", "mode": "pairs", "group": 4}), []
    for together in (False, True):
        state = replace(run(policy, reference), ranks=1 + together)
        lengths.append([("pair" in batch.aux, len(batch.t)) for batch in rule.prepare(state, batch_for(rule, 2))])
    assert all(pair for pair, _ in lengths[0]) and lengths[1] == [(False, 8)] * 3


def test_all_ties_make_a_step_without_a_gradient() -> None:
    for mode in ("shared", "pairs"):
        policy, reference = moved_policy()
        rule = toy_method({"name": "d3po", "mode": mode})
        assert (gradient(rule, scored(run(policy, reference), [0.5] * 16), policy) == 0).all()


def test_the_references_numbers_are_the_rollouts_while_the_two_are_the_same_alone() -> None:
    policy, reference = moved_policy()
    rule = toy_method({"name": "d3po"})
    first, later = (
        rule.prepare(replace(run(policy, reference), same=same), batch_for(rule, 4)) for same in (True, False)
    )
    assert not torch.equal(first[0].aux["log_prob"], later[0].aux["log_prob"])
    state = run(policy, reference)
    assert isinstance(rule, Replays)
    theirs = rule.explorer.law(state, reference, later[0]).log_prob(later[0].y)
    torch.testing.assert_close(later[0].aux["log_prob"], theirs)


# -- PRDP --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_all_pairs_without_a_clamp_are_a_centred_sum_of_squares(reduction: str) -> None:
    g = torch.Generator().manual_seed(1)
    log_ratio, rewards = torch.randn(3, 5, 4, generator=g, dtype=torch.float64), torch.rand(3, 5, generator=g).double()
    rewards[1, 2] = float("nan")
    whole = reward_differences(log_ratio, log_ratio, rewards, 0.3, 1e9, reduction)
    centred = centred_differences(log_ratio, rewards, 0.3, reduction)
    assert centred[1].tolist() == [10, 6, 10]
    for one, other in zip(whole, centred, strict=True):
        torch.testing.assert_close(one, other)


def test_the_centred_form_draws_pictures_of_equal_rewards_together_and_needs_two() -> None:
    log_ratio, nan = torch.tensor([[[0.3], [0.1], [0.0]], [[0.3], [0.1], [0.2]]]), float("nan")
    rewards = torch.tensor([[0.5, 0.5, nan], [0.5, nan, nan]])
    value, count = centred_differences(log_ratio, rewards, 2.0, "mean")
    torch.testing.assert_close(value, torch.tensor([0.2**2, 0.0]))
    assert count.tolist() == [1, 0]
    assert reward_differences(log_ratio, log_ratio, rewards, 2.0, 9.0, "mean")[1].tolist() == [0, 0]


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_differences_by_hand(reduction: str) -> None:
    """Two pictures of two steps: R = (.3, -.1) as means; the second step of the first is clamped to .2."""
    now = torch.tensor([[[0.2, 0.4], [0.0, -0.2]]])
    old = torch.tensor([[[0.2, 0.1], [0.0, -0.2]]])
    value, count = reward_differences(now, old, torch.tensor([[1.0, 0.5]]), 5.0, 0.1, reduction)
    scale = 1 if reduction == "mean" else 2
    expected = max((scale * 0.4 - 0.1) ** 2, (scale * 0.3 - 0.1) ** 2)
    assert count.item() == 1 and value.item() == pytest.approx(expected, rel=1e-5)


def test_a_picture_without_a_score_is_in_no_pair_and_equal_ones_are_none() -> None:
    nan = float("nan")
    value, count = reward_differences(torch.randn(2, 3, 2), torch.zeros(2, 3, 2),
                                      torch.tensor([[1.0, nan, 0.0], [0.5, 0.5, 0.5]]), 1.0, 9.0, "mean")  # fmt: skip
    assert count.tolist() == [1, 0] and value.isfinite().all() and value[1] == 0


@pytest.mark.parametrize("form", ["pairs", "centred"])
@pytest.mark.parametrize("step", [0, 1])
@pytest.mark.parametrize(("process", "kind"), [("vp", "epsilon"), ("flow", "flow")])
def test_two_passes_have_the_gradient_of_one(process: str, kind: str, step: int, form: str) -> None:
    """`step` 1 is a second update on the rollout of an earlier policy: its first pass is a replay."""
    policy, reference = moved_policy(process, kind, by=0.0 if step == 0 else 0.3)
    settings = {"name": "prdp", "form": form, "updates": 2, "beta": 5.0, "clip": 0.01, "group": 3, "at_once": 4}
    rule = toy_method(settings)
    assert isinstance(rule, Replays)
    old, _ = networks(process, kind)
    drawn = explore(run(old, reference), old, batch_for(rule, 4), rule.explorer)
    held = lambda updates, draw: (drawn, drawn.log_probs)  # noqa: E731
    state = replace(run(policy, reference), held=held, step=step)
    two = gradient(rule, state, policy)
    policy.zero_grad()
    lp = torch.cat([torch.stack([rule.explorer.law(state, policy, b).log_prob(b.y)
                                 for b in every_step(drawn, rows, rule.explorer)], 1)
                    for rows in rule.explorer.parts(0, 12)])  # fmt: skip
    shape = (4, 3, -1)
    ours, before = (lp - drawn.log_probs).view(shape), torch.zeros_like(lp).view(shape)
    rewards = drawn.scores.total.view(4, 3)
    value, _ = (reward_differences(ours, before, rewards, 5.0, 0.01, "mean") if form == "pairs" else
                centred_differences(ours, rewards, 5.0, "mean"))  # fmt: skip
    value.mean().backward()
    assert policy.mean.grad is not None and policy.mean.grad.abs().sum() > 0
    torch.testing.assert_close(two, policy.mean.grad, rtol=1e-6, atol=1e-6 * float(policy.mean.grad.abs().max()))


def test_steps_that_weigh_nothing_are_left_out_unless_ranks_must_agree() -> None:
    scores = [1.0, 0.0, 0.5, 0.5]  # the second prompt has no pair
    for together, count in ((False, 3), (True, 6)):
        policy, reference = moved_policy()
        rule = toy_method({"name": "prdp", "group": 2, "at_once": 2})
        state = replace(scored(run(policy, reference), scores), ranks=1 + together)
        assert len(rule.prepare(state, batch_for(rule, 2))) == count


@pytest.mark.parametrize("name", ["ddpo", "nft"])
def test_pictures_are_scored_while_the_next_ones_are_drawn(name: str) -> None:
    policy, reference = networks("vp", "epsilon")
    state, seen_so_far, calls = run(policy, reference), [], [0]

    def counted(network: Denoiser) -> Any:
        def predict(*args: Any) -> Tensor:
            calls[0] += 1
            return network(*args)

        return predict

    def score(latents: Tensor, prompts: Sequence[str]) -> Any:
        seen_so_far.append((calls[0], list(prompts)))
        return known(scores_of({"toy": torch.arange(float(len(prompts)))}, {"toy": 1.0}))

    rule = toy_method({"name": name, "group": 2, "at_once": 4, "guidance": 1.0})
    batch = batch_for(rule, 6)
    rule.prepare(replace(state, policy=counted(policy), reference=counted(reference), score=score), batch)
    assert [count for count, _ in seen_so_far] == [rule.steps, 2 * rule.steps, 3 * rule.steps]
    assert [p for _, prompts in seen_so_far for p in prompts] == [p for p in batch.prompts for _ in range(2)]


# -- groups that are spread over ranks --------------------------------------------------------------------------------


def ranks_of(state: Run, given: Sequence[Tensor]) -> list[Run]:
    """Two ranks that have these [P, 2] scores; to gather is to see both."""
    return [replace(state, ranks=2, rank=rank, gather=lambda own: torch.cat([v.to(own) for v in given]))
            for rank in range(2)]  # fmt: skip


@pytest.mark.parametrize("kind", ADVANTAGES)
def test_advantages_of_a_group_that_is_spread_are_those_of_the_whole(kind: str) -> None:
    scores = torch.tensor([[1.0, 4.0, 2.0, 8.0], [5.0, 5.0, 5.0, 5.0], [0.0, 1.0, 0.0, torch.nan]])
    alone = run(*networks("vp", "epsilon"))

    def found(state: Run, group: Group, own: Tensor) -> Tensor:
        told = scores_of({"toy": own.flatten()}, {"toy": 1.0})
        return advantages_of(state, told, group, kind, "sum", torch.inf)

    whole = found(alone, Group(4), scores).view(3, 4)
    parts = list(scores.split(2, 1))
    for rank, state in enumerate(ranks_of(alone, parts)):
        mine = found(state, Group(4, spread=True), parts[rank]).view(3, 2)
        assert torch.equal(mine, whole[:, 2 * rank : 2 * rank + 2])
    assert whole.count_nonzero() > 0


def test_rewards_that_want_the_same_agree_and_a_silent_one_does_neither() -> None:
    one = torch.tensor([1.0, 2.0, 3.0, 5.0, 4.0, 4.0])
    terms = {"a": one, "b": 3 * one - 1, "c": -one, "d": torch.ones(6)}
    shown = seen(run(*networks("vp", "epsilon")), scores_of(terms, dict.fromkeys(terms, 1.0)), Group(2))
    found = {name: value.mean().item() for name, value in shown.items() if name.startswith("agree")}
    assert found == pytest.approx({"agree_a_b": 2 / 3, "agree_a_c": -2 / 3, "agree_a_d": 0.0, "agree_b_c": -2 / 3,
                                   "agree_b_d": 0.0, "agree_c_d": 0.0})  # fmt: skip


def test_a_uniform_group_is_seen_across_ranks() -> None:
    parts = [torch.tensor([[1.0], [3.0]]), torch.tensor([[2.0], [3.0]])]  # one picture of each of two prompts a rank
    for rank, state in enumerate(ranks_of(run(*networks("vp", "epsilon")), parts)):
        shown = seen(state, scores_of({"toy": parts[rank].flatten()}, {"toy": 1.0}), Group(2, spread=True))
        assert shown["same"].tolist() == [0.0, 1.0]


@pytest.mark.parametrize("name", ["ddpo", "dpok", "grpo", "nft"])
def test_ranks_that_share_a_group_draw_other_pictures_of_the_same_prompts(name: str) -> None:
    policy, reference = moved_policy()
    keywords = {"advantage": "group"} if name == "ddpo" else {}
    rule = toy_method({"name": name, "group": 4, "spread": True, **keywords})
    drawn = []
    for rank in range(2):
        state = replace(run(policy, reference, seed=rank), ranks=2, rank=rank, gather=lambda own: own.repeat(2, 1))
        batches = rule.prepare(state, batch_for(rule, 3))
        drawn.append(torch.cat([batch.x_t for batch in batches]))
        rows = len(drawn[0]) // (rule.steps if name == "nft" else rule.steps - 1)
        assert rows == 3 * 2
    assert not torch.isclose(drawn[0], drawn[1]).all(1).any()


def test_ranks_that_share_a_group_share_its_start_and_its_window() -> None:
    policy, reference = moved_policy()
    how = Explorer(6, 1.0, group=2, same_start=True, window=2, spread=True, store="float32")
    starts = []
    for rank in range(2):
        common = torch.Generator().manual_seed(5)
        state = replace(run(policy, reference, seed=rank), ranks=2, rank=rank, common=common)
        starts.append(explore(state, policy, prompts(3), replace(how, group=1)))
    assert torch.equal(starts[0].times, starts[1].times)
    assert torch.equal(starts[0].states[:, 0], starts[1].states[:, 0])
    assert not torch.isclose(starts[0].x, starts[1].x).all(1).any()


# -- NFT ---------------------------------------------------------------------------------------------------------------


def test_at_the_policy_that_drew_an_even_picture_pulls_nowhere() -> None:
    ours = torch.randn(4, 3, requires_grad=True)
    value = forward_process(ours, ours.detach(), torch.randn(4, 3), torch.full((4,), 0.5), 1.0)
    (slope,) = torch.autograd.grad(value.sum(), ours)
    torch.testing.assert_close(slope, torch.zeros_like(slope), atol=1e-6, rtol=0)


def test_nft_by_hand() -> None:
    """b = 1: x+ is the policy, x- the old one's mirror image; each loss is over its own mean size."""
    ours, old, x0 = torch.tensor([[1.0, 3.0]]), torch.tensor([[2.0, 2.0]]), torch.zeros(1, 2)
    good, bad = (1 + 9) / 2 / 2, (9 + 1) / 2 / 2
    found = forward_process(ours, old, x0, torch.tensor([0.25]), 1.0)
    assert found.item() == pytest.approx(0.25 * good + 0.75 * bad)


# -- advantages --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("combine", COMBINATIONS)
@pytest.mark.parametrize("kind", ["group", "global", "centre"])
def test_a_group_without_differences_gets_exactly_nothing(kind: str, combine: str) -> None:
    scores = torch.tensor([[0.1] * 3, [0.7, 0.1, 0.4], [float("nan"), 0.3, 0.3]], dtype=torch.float64)
    found = COMBINATIONS[combine]({"a": scores, "b": 2 * scores}, {"a": 1.0, "b": 0.5}, kind, lambda x: x)
    assert (found[0] == 0).all() and (found[2] == 0).all() and found[1].abs().sum() > 0 and found.isfinite().all()


@pytest.mark.parametrize("kind", ADVANTAGES)
def test_advantages_by_hand(kind: str) -> None:
    scores = torch.tensor([[1.0, 3.0], [5.0, 7.0]], dtype=torch.float64)
    everything = scores.std(correction=0)
    expected = {"group": [[-1.0, 1], [-1, 1]], "centre": [[-1.0, 1], [-1, 1]],
                "global": (torch.tensor([[-1.0, 1], [-1, 1]]) / everything).tolist(),
                "batch": ((scores - 4) / everything).tolist()}[kind]  # fmt: skip
    torch.testing.assert_close(ADVANTAGES[kind](scores, lambda x: x), torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("kind", ["global", "batch"])
def test_ranks_see_the_statistics_of_all(kind: str) -> None:
    scores = torch.randn(6, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    whole = ADVANTAGES[kind](scores, lambda x: x)
    parts = [ADVANTAGES[kind](part, lambda x: scores.flatten()) for part in scores.chunk(2)]
    torch.testing.assert_close(torch.cat(parts), whole)


def test_the_unbeaten_are_those_of_brute_force_and_equals_do_not_beat_each_other() -> None:
    g = torch.Generator().manual_seed(0)
    scores = torch.randint(0, 4, (40, 3), generator=g).double()
    slow = [any(all(b >= a) and any(b > a) for b in scores) for a in scores]
    assert dominated(scores, scores).tolist() == slow and 0 < sum(slow) < 40
    twins = torch.tensor([[1.0, 2.0], [1.0, 2.0], [float("nan"), 9.0]])
    assert dominated(twins, twins).tolist() == [False, False, True]


def test_pareto_leaves_the_beaten_out() -> None:
    terms = {"a": torch.tensor([[1.0, 0.0, 0.5]]), "b": torch.tensor([[0.0, 1.0, -1.0]])}
    found = COMBINATIONS["pareto"](
        {k: v.double() for k, v in terms.items()}, {"a": 1.0, "b": 0.5}, "group", lambda x: x
    )
    assert found[0, 2] == 0 and (found[0, :2] != 0).all()


def test_a_picture_without_a_score_is_dropped_and_counted() -> None:
    policy, reference = networks("vp", "epsilon")
    rule = toy_method({"name": "grpo", "group": 4})
    state = scored(run(policy, reference), [1.0, float("nan"), 0.0, 0.2])
    [first, *_] = rule.prepare(state, batch_for(rule, 1))
    assert first.aux["missing"].tolist() == [0, 1, 0, 0] and first.aux["advantage"][1] == 0
    loss = rule.loss(state, first)
    assert loss.value.isfinite().all() and loss.value[1] == 0 and loss.metrics["reward"].isfinite().all()


def test_kl_is_that_of_two_gaussians() -> None:
    policy, reference = moved_policy()
    rule = toy_method({"name": "grpo", "kl_weight": 1.0, "advantage": "group"})
    state = scored(run(policy, reference), [0.0] * 16)  # no advantage: the KL alone is left
    assert isinstance(rule, Replays)
    for batch in rule.prepare(state, batch_for(rule, 4)):
        ours, theirs = (rule.explorer.law(state, network, batch) for network in (policy, reference))
        loss = rule.loss(state, batch).value
        spread = [torch.distributions.Normal(law.mean, law.std[:, None]) for law in (ours, theirs)]
        torch.testing.assert_close(loss, torch.distributions.kl_divergence(*spread).mean(1))


def test_a_law_is_what_the_policy_says_after_guidance() -> None:
    policy, reference = moved_policy("flow", "flow")
    state = run(policy, reference)
    how = Explorer(4, 3.0, group=2)
    episodes = explore(state, policy, prompts(2), how)
    [batch, *_] = every_step(episodes, slice(0, 4), how)
    y = policy(batch.x_t, batch.t, episodes.negative)
    y = y + 3.0 * (policy(batch.x_t, batch.t, episodes.condition) - y)
    law = how.law_of(state, y, batch)
    assert isinstance(law, Gaussian)
    torch.testing.assert_close(how.law(state, policy, batch).mean, law.mean)
