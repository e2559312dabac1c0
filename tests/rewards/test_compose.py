"""Ways of putting scores together: hand-made numbers, invariances, and what each is for."""

from __future__ import annotations

import math

import pytest
import torch

from diffalign.advantages import COMBINATIONS
from diffalign.rewards.compose import (
    RunningStatistics,
    agreement,
    around_group_mean,
    group_statistics,
    log_sigmoid_centered,
    non_dominated,
    reference_quantile,
    shortfall,
    standardized,
    uncertainty_weighted,
    weighted_advantages,
    within_groups,
)

GROUPS = torch.tensor([7, 7, 3, 3, 3, 9])
SCORES = torch.tensor([1.0, 3.0, 10.0, 10.0, 10.0, 5.0])


def test_groups_are_standardized_and_uniform_ones_say_nothing():
    assert within_groups(SCORES, GROUPS).tolist() == [-1, 1, 0, 0, 0, 0]
    mean, std = group_statistics(SCORES, GROUPS)
    assert mean.tolist() == [2, 2, 10, 10, 10, 5] and std.tolist() == [1, 1, 0, 0, 0, 0]


def test_no_affine_change_of_a_reward_changes_its_standardized_scores():
    g = torch.Generator().manual_seed(0)
    scores, groups = torch.randn(40, generator=g), torch.randint(6, (40,), generator=g)
    torch.testing.assert_close(
        within_groups(3 * scores + 100, groups), within_groups(scores, groups), atol=1e-4, rtol=0
    )
    shifted = scores + 50 * groups  # a harder prompt
    torch.testing.assert_close(within_groups(shifted, groups), within_groups(scores, groups), atol=1e-3, rtol=0)


def test_order_does_not_matter():
    order = torch.tensor([4, 0, 5, 2, 1, 3])
    for compose in (within_groups, around_group_mean):
        torch.testing.assert_close(compose(SCORES[order], GROUPS[order]), compose(SCORES, GROUPS)[order])


def test_around_the_group_mean_divides_by_the_spread_of_the_batch():
    std = SCORES.std(correction=0)
    torch.testing.assert_close(around_group_mean(SCORES, GROUPS), torch.tensor([-1, 1, 0, 0, 0, 0]) / std)


def test_a_reward_on_a_large_scale_does_not_decide_alone():
    small, large = torch.tensor([0.2, 0.1, 0.0]), torch.tensor([10.0, 20.0, 30.0])
    same, one = {"small": small, "large": large}, torch.zeros(3, dtype=torch.long)
    total = weighted_advantages(same, {"small": 1.0, "large": 1.0}, one)
    torch.testing.assert_close(total, torch.zeros(3), atol=1e-4, rtol=0)
    rescaled = weighted_advantages(same, {"small": 0.1, "large": 0.3}, one, rescaled=True)
    torch.testing.assert_close(rescaled, standardized(large))
    with pytest.raises(ValueError, match="weights for small and scores of small, large"):
        weighted_advantages(same, {"small": 1.0}, one)
    with pytest.raises(ValueError, match="a weight other than 0"):
        weighted_advantages(same, {"small": 0.0, "large": 0.0}, one)


def test_groups_of_several_sizes_and_a_picture_without_a_score_weigh_as_much_as_others():
    groups = torch.tensor([0, 0, 1, 1, 1, 1, 0])
    scores = {"r": torch.tensor([1.0, 3.0, 0.0, 0.0, 0.0, 4.0, math.nan])}
    rescaled = weighted_advantages(scores, {"r": 1.0}, groups, rescaled=True)
    root = math.sqrt(3)  # of the second group: mean 1, deviation sqrt(3)
    known = torch.tensor([-1, 1, -1 / root, -1 / root, -1 / root, root])
    torch.testing.assert_close(rescaled, torch.cat([known / known.std(correction=0), torch.zeros(1)]))
    assert rescaled[:6].std(correction=0) == pytest.approx(1)


def test_functions_of_groups_are_those_that_training_uses():
    g = torch.Generator().manual_seed(2)
    scores = {name: torch.randn(4, 3, generator=g) for name in "ab"}
    weights, groups = {"a": 1.0, "b": -0.5}, torch.arange(4).repeat_interleave(3)
    flat = {name: score.flatten() for name, score in scores.items()}
    for rescaled, combine in ((False, "per_reward"), (True, "gdpo")):
        expected = COMBINATIONS[combine](scores, weights, "group", lambda x: x)
        torch.testing.assert_close(weighted_advantages(flat, weights, groups, rescaled=rescaled), expected.flatten())


def test_running_statistics_use_the_batch_until_a_prompt_is_known():
    running = RunningStatistics(size=3, least=2)
    first = torch.tensor([1.0, 5.0])
    torch.testing.assert_close(running(first, ["a", "b"]), standardized(first))
    # a has 1 and 3 by now: mean 2, deviation 1; c is measured by the batch, 3 and 7
    torch.testing.assert_close(running(torch.tensor([3.0, 7.0]), ["a", "c"]), torch.tensor([1.0, 1.0]))
    running(torch.tensor([100.0, 200.0]), ["a", "a"])
    assert list(running.kept["a"]) == [3, 100, 200]
    with pytest.raises(ValueError, match="1 <= least <= size, got 4 and 3"):
        RunningStatistics(size=3, least=4)


def test_log_sigmoid_is_the_log_probability_of_being_good_in_every_respect():
    scores, references = torch.tensor([[0.0, 9.0], [0.0, -9.0]]), torch.zeros(2, 1)
    found = log_sigmoid_centered(scores.requires_grad_(), references)
    assert found[0].item() == pytest.approx(2 * math.log(0.5))
    assert found[1].item() == pytest.approx(
        math.log(1 / (1 + math.exp(-9))) + math.log(1 / (1 + math.exp(9))), abs=1e-5
    )
    found.sum().backward()
    assert scores.grad[0, 1] < 1e-3 < 0.9 < scores.grad[1, 1]  # what is good already is left alone


def test_the_reference_is_a_quantile_per_prompt():
    base = torch.stack([torch.arange(101.0), torch.arange(101.0) / 100])
    torch.testing.assert_close(reference_quantile(base), torch.tensor([85.0, 0.85]))
    with pytest.raises(ValueError, match="quantile: expected"):
        reference_quantile(base, 85)


def test_pareto_keeps_what_nothing_beats():
    scores = torch.tensor([[1.0, 2.0, 3.0, 2.0, 3.0], [3.0, 2.0, 1.0, 1.0, 1.0]])
    assert non_dominated(scores).tolist() == [True, True, True, False, True]  # equal ones do not dominate each other
    assert non_dominated(torch.tensor([[1.0, 5.0, 2.0]])).tolist() == [False, True, False]


def test_pareto_selects_in_large_pools_only():
    """The shares that the docstring states, of independent rewards."""
    g = torch.Generator().manual_seed(0)
    shares = {size: torch.stack([non_dominated(torch.rand(4, size, generator=g)).float().mean() for _ in range(40)])
              for size in (24, 256)}  # fmt: skip
    assert shares[24].mean() == pytest.approx(0.52, abs=0.04) and shares[256].mean() == pytest.approx(0.17, abs=0.02)


def test_an_uncertain_loss_counts_less():
    loss, sure, unsure = torch.tensor([2.0]), torch.tensor([0.0]), torch.tensor([1.0])
    assert uncertainty_weighted(loss, sure) == loss
    assert uncertainty_weighted(loss, unsure).item() == pytest.approx(2 / math.e + 1)


def test_agreement_names_conflict_and_uniform_groups():
    groups = torch.tensor([0, 0, 0, 1, 1, 1])
    up = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    found = agreement({"up": up, "down": -up, "flat": torch.ones(6)}, groups)
    assert found["up~down"] == pytest.approx(-1) and found["up~flat"] == 0
    assert found["flat/uniform"] == 1 and found["up/uniform"] == 0
    assert found["up/group_std"] == pytest.approx(math.sqrt(2 / 3))


def test_groups_of_another_length_are_named():
    with pytest.raises(ValueError, match=r"got \[6\] and \[2\]"):
        within_groups(SCORES, GROUPS[:2])
    with pytest.raises(ValueError, match="B at least 1, got"):
        within_groups(SCORES[:0], GROUPS[:0])


def test_the_shortfall_is_renos_loss_and_its_gradient_that_of_the_weighted_sum():
    values = {"hpsv2.1": 0.3, "imagereward": 0.5, "clip": 30.0, "pickscore": 22.0}
    scores = {name: torch.tensor([value], requires_grad=True) for name, value in values.items()}
    loss = shortfall(scores)
    assert loss.item() == pytest.approx(5 * (1 - 0.3) + (2 - 0.5) + 0.01 * (100 - 30) + 0.05 * (30 - 22))
    loss.sum().backward()
    assert {name: -score.grad.item() for name, score in scores.items()} == pytest.approx(
        {"hpsv2.1": 5.0, "imagereward": 1.0, "clip": 0.01, "pickscore": 0.05}
    )
    missing = {"aesthetic": torch.tensor([float("nan")]), "imagereward": torch.tensor([1.0])}
    assert shortfall(missing).item() == 1.0, "a weight of 0 leaves it out"
    assert shortfall({"a": torch.tensor([3.0])}, {"a": (2.0, 5.0)}).item() == 4.0


@pytest.mark.parametrize(("scores", "message"), [({}, "got no score"), ({"jpeg": torch.ones(1)}, "got scores of jpeg")])
def test_the_shortfall_names_what_has_no_preset(scores, message):
    with pytest.raises(ValueError, match=message):
        shortfall(scores)
