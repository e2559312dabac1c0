"""Noise optimization: what each method must do, on a generator that can be written down."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from toy import ROWS
from toy_noise import SHAPE, Bent, Box, Wavy, alone, objective

from diffalign.noise import NOISE_METHODS
from diffalign.noise.dno import DNO, improbability, orders_of
from diffalign.noise.fk import POTENTIALS, FKSteering, systematic, worst_for_missing
from diffalign.noise.objective import Objective, Search
from diffalign.noise.paths import noised_again
from diffalign.noise.reno import clipped, off_shell, usable
from diffalign.noise.seen import best_of
from diffalign.noise.zero_order import neighbour
from diffalign.rewards.base import Weighted
from diffalign.table import build

SMALL: dict[str, dict[str, Any]] = {
    "reno": {"steps": 6, "lr": 0.5},
    "best_of_n": {"steps": 6},
    "zero_order": {"steps": 12, "neighbours": 3},
    "paths": {"rounds": 2, "copies": 3, "back": 1},
    "fk": {"particles": 3, "every": 1, "first": 0.0, "last": 1.0, "strength": 3.0},
    "dno": {"steps": 4, "lr": 0.1, "permutations": 3},
}


def method(name: str, **keywords: Any) -> Search:
    made: Search = build(NOISE_METHODS, {"name": name, **SMALL[name], **keywords}, what="optimize_noise")
    return made


def looks(search: Search, what: Objective) -> list[Any]:
    search.check(what)
    return list(search.search(what, what.fresh()))


# -- all methods -------------------------------------------------------------------------------------------------------


def test_every_method_is_tried_here() -> None:
    assert set(SMALL) == set(NOISE_METHODS)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("name", NOISE_METHODS)
def test_a_batch_is_its_prompts_alone(name: str, guidance: float) -> None:
    together = looks(method(name), objective(guidance=guidance))
    for number in range(3):
        single = looks(method(name), alone(number, guidance=guidance))
        assert len(single) == len(together)
        for one, all_of_them in zip(single, together, strict=True):
            torch.testing.assert_close(one.noise[0], all_of_them.noise[number], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(one.scores.total[0], all_of_them.scores.total[number], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", NOISE_METHODS)
def test_what_fits_into_memory_changes_nothing(name: str) -> None:
    found = [looks(method(name), objective(at_once=at_once, memory=memory))
             for at_once, memory in ((16, "fast"), (2, "balanced"), (1, "low"))]  # fmt: skip
    for others in found[1:]:
        for one, other in zip(found[0], others, strict=True):
            torch.testing.assert_close(one.noise, other.noise, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(one.pixels, other.pixels, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in NOISE_METHODS if name != "fk"])
def test_the_search_finds_more_than_it_starts_with(name: str) -> None:
    seen = [look for look in looks(method(name), objective()) if look.ends]
    assert (best_of(seen).scores.total >= seen[0].scores.total).all()
    assert best_of(seen).scores.total.sum() > seen[0].scores.total.sum() + 0.05


@pytest.mark.parametrize("name", ["reno", "best_of_n", "zero_order", "dno"])
def test_the_first_look_is_the_plain_picture_and_there_are_as_many_as_asked_for(name: str) -> None:
    what = objective()
    seen = looks(method(name), what)
    plain = torch.stack([torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed)) for seed in (3, 4, 5)])
    first = seen[0].noise if name != "dno" else seen[0].noise[:, 0]
    assert torch.equal(first, plain) and len(seen) == SMALL[name]["steps"]


@pytest.mark.parametrize("name", ["best_of_n", "zero_order", "paths", "fk"])
def test_black_boxes_are_searched_without_a_gradient(name: str) -> None:
    what = objective(rewards=Weighted({"box": (Box(), 1.0)}))
    assert torch.isfinite(torch.stack([look.scores.total for look in looks(method(name), what)])).all()


@pytest.mark.parametrize("name", ["reno", "dno"])
def test_a_gradient_of_a_black_box_is_refused_with_what_has_one(name: str) -> None:
    what = objective(rewards=Weighted({"box": (Box(), 1.0), "wavy": (Wavy(), 1.0)}))
    with pytest.raises(ValueError, match="box has none.*pickscore.*best_of_n"):
        method(name).check(what)
    method(name).check(objective(rewards=Weighted({"box": (Box(), 0.0), "wavy": (Wavy(), 1.0)})))
    with pytest.raises(ValueError, match="all weights are 0"):
        method(name).check(objective(rewards=Weighted({"wavy": (Wavy(), 0.0)})))


@pytest.mark.parametrize(
    ("name", "keywords", "message"),
    [
        ("reno", {"lr": 0}, "optimize_noise.lr: expected a number above 0, got 0"),
        ("reno", {"optimizer": "lbfgs"}, "optimize_noise.optimizer: expected one of sgd, adam, got 'lbfgs'"),
        ("reno", {"momentum": 1.0}, "optimize_noise.momentum"),
        ("reno", {"regularization": -1}, "optimize_noise.regularization"),
        ("reno", {"init": "zeros"}, "optimize_noise.init: expected one of random, best_of_n"),
        ("reno", {"last_step": 2}, "did you mean 'last_steps'"),
        ("zero_order", {"closeness": 1.0}, "optimize_noise.closeness"),
        ("fk", {"potential": "min"}, "optimize_noise.potential: expected one of diff, max, add"),
        ("fk", {"first": 0.9, "last": 0.1}, "optimize_noise.first, last"),
        ("paths", {"start": 1.0}, "optimize_noise.start"),
        ("dno", {"gradient": "none"}, "optimize_noise.gradient"),
        ("best_of_n", {"steps": 0}, "optimize_noise.steps"),
    ],
)
def test_bad_keywords_are_named(name: str, keywords: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        method(name, **keywords)


def test_walks_that_are_too_short_are_refused() -> None:
    with pytest.raises(ValueError, match="'fk' steers a walk on its way.*sampling_steps"):
        method("fk").check(objective(steps=1))
    with pytest.raises(ValueError, match="'paths' spreads 3 times.*has 2"):
        method("paths", rounds=3).check(objective(steps=2))
    with pytest.raises(ValueError, match="last_steps: expected 1 to 4"):
        method("reno", last_steps=5).check(objective())


# -- ReNO --------------------------------------------------------------------------------------------------------------


def test_the_norm_is_likeliest_at_the_root_of_d_minus_1() -> None:
    """d = 16384: 127.996, and the gradient's norm at 129, 133 and 140 with weight 0.01 (the released constants)."""
    z = torch.randn(1, 4, 64, 64, generator=torch.Generator().manual_seed(0))
    for norm, expected in ((127.996, 0.0), (129, 0.020), (133, 0.098), (140, 0.230)):
        gradient = off_shell(z * norm / z.norm(), 0.01)
        assert gradient.norm().item() == pytest.approx(expected, abs=2e-3)


def test_the_norm_penaltys_gradient_is_its_own() -> None:
    z = torch.randn(3, 2, 5, generator=torch.Generator().manual_seed(1)).requires_grad_()
    norm = z.flatten(1).norm(dim=1)
    (expected,) = torch.autograd.grad(0.3 * (norm.square() / 2 - (10 - 1) * norm.log()).sum(), z)
    torch.testing.assert_close(off_shell(z.detach(), 0.3), expected)


def test_each_row_is_clipped_as_torch_clips_one() -> None:
    gradient = torch.randn(4, 6, generator=torch.Generator().manual_seed(2)) * torch.tensor([[0.01], [1], [10], [0]])
    for row, cut in zip(gradient, clipped(gradient, 0.5), strict=True):
        parameter = torch.zeros(6, requires_grad=True)
        parameter.grad = row.clone()
        torch.nn.utils.clip_grad_norm_([parameter], 0.5)
        torch.testing.assert_close(cut, parameter.grad)


def test_a_row_without_a_score_gives_no_gradient() -> None:
    slope = torch.ones(2, 3)
    slope[1, 2] = math.nan
    assert usable(slope).tolist() == [[1, 1, 1], [0, 0, 0]]


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_the_iterations_are_those_of_a_plain_loop(optimizer: str) -> None:
    """One prompt, one parameter, the whole loss in one graph: as one would write it down from the paper."""
    what = alone(0, steps=1)
    seen = looks(method("reno", optimizer=optimizer, regularization=0.05), what)
    z = torch.randn(1, *SHAPE, generator=torch.Generator().manual_seed(3)).requires_grad_()
    kinds = {"sgd": lambda: torch.optim.SGD([z], 0.5, momentum=0.9, nesterov=True),
             "adam": lambda: torch.optim.Adam([z], 0.5, eps=1e-2)}  # fmt: skip
    rule, d = kinds[optimizer](), z.numel()
    for number, look in enumerate(seen):
        torch.testing.assert_close(look.noise, z.detach(), rtol=1e-4, atol=1e-5)
        reward = what.rewards(what.decode(what.walk(z, [0], last=1)).clamp(0, 1), ["a"]).sum()
        torch.testing.assert_close(look.scores.total, reward.detach()[None])
        if number + 1 < len(seen):
            rule.zero_grad()
            (-reward + 0.05 * (z.square().sum() / 2 - (d - 1) * z.norm().log())).backward()
            torch.nn.utils.clip_grad_norm_([z], 0.1)
            rule.step()


def test_the_best_is_by_the_rewards_alone() -> None:
    """A wall so steep that it decides where the noise goes does not decide which picture is the best."""
    seen = looks(method("reno", regularization=100.0, steps=8), objective())
    totals = torch.stack([look.scores.total for look in seen])
    assert torch.equal(best_of(seen).scores.total, totals.amax(0))


def test_no_gradient_is_taken_where_no_step_follows() -> None:
    reward = Wavy()
    what = objective(rewards=Weighted({"wavy": (reward, 1.0)}), steps=2)
    looks(method("reno", steps=3), what)
    assert reward.asked == [3, 3, 3] and what.policy.rows == 3 * 3 * 2


def test_it_may_start_from_the_best_of_several() -> None:
    seen = looks(method("reno", init="best_of_n", candidates=4, steps=2), objective())
    assert len(seen) == 4 + 2
    assert torch.equal(seen[4].noise, best_of(seen[:4]).noise)


@pytest.mark.parametrize(("process", "kind"), ROWS)
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_the_slope_is_that_of_the_joint_graph(process: str, kind: str, guidance: float) -> None:
    what = objective(process=process, kind=kind, guidance=guidance)
    z = what.fresh()
    leaf = z.clone().requires_grad_()
    total = what.rewards(what.decode(what.walk(leaf, [0, 1, 2], last=4)).clamp(0, 1), what.prompts)
    (expected,) = torch.autograd.grad(total.sum(), leaf)
    seen, slope = what.slope(z)
    torch.testing.assert_close(slope, expected)
    torch.testing.assert_close(seen.scores.total, total.detach())
    torch.testing.assert_close(seen.pixels, what.look(z).pixels)


def test_the_slope_is_that_of_finite_differences() -> None:
    what, h = alone(1), 1e-3
    z = what.fresh()
    direction = torch.randn(z.shape, generator=torch.Generator().manual_seed(9))
    _, slope = what.slope(z)
    up, down = (what.look(z + sign * h * direction).scores.total for sign in (1, -1))
    assert ((up - down) / (2 * h)).item() == pytest.approx((slope * direction).sum().item(), rel=5e-3)


@pytest.mark.parametrize(("process", "kind"), ROWS)
def test_before_the_last_steps_only_the_sampler_is_followed(process: str, kind: str) -> None:
    """With a network whose answers do not depend on x the two gradients are one; with another, the value still is."""
    what = objective(process=process, kind=kind)
    z = what.fresh()
    whole, part = what.slope(z), what.slope(z, last=2)
    torch.testing.assert_close(whole[0].pixels, part[0].pixels)
    assert not torch.allclose(whole[1], part[1], rtol=1e-3)
    assert isinstance(what.policy.policy, Bent)
    what.policy.policy.weight.zero_()
    torch.testing.assert_close(what.slope(z)[1], what.slope(z, last=2)[1])


def test_several_rewards_one_after_the_other_have_the_gradient_of_their_sum() -> None:
    rewards = Weighted({"a": (Wavy(), 2.0), "b": (Wavy(1.5), -0.5), "shown": (Box(), 0.0)})
    found = [objective(memory=memory, rewards=rewards) for memory in ("fast", "low")]
    (one, first), (other, second) = (what.slope(what.fresh()) for what in found)
    torch.testing.assert_close(first, second)
    assert set(one.scores.terms) == {"a", "b", "shown"}
    for name in one.scores.terms:
        torch.testing.assert_close(one.scores.terms[name], other.scores.terms[name])


# -- zero-order search -------------------------------------------------------------------------------------------------


def test_neighbours_lie_on_the_sphere_at_their_angle() -> None:
    g = torch.Generator().manual_seed(0)
    z, drawn = torch.randn(5, 4, 8, generator=g), torch.randn(5, 4, 8, generator=g)
    near = neighbour(z, drawn, 0.95)
    flat, other = z.flatten(1), near.flatten(1)
    torch.testing.assert_close(other.norm(dim=1), flat.norm(dim=1))
    torch.testing.assert_close(torch.cosine_similarity(flat, other), torch.full((5,), 0.95))


def test_a_pivot_that_nothing_beats_is_drawn_anew() -> None:
    """Scores that fall from look to look: every round starts from fresh noise, after the first."""

    class Falling(Wavy):
        def __call__(self, images: Any, prompts: Any) -> Tensor:
            self.asked.append(len(prompts))
            return torch.full((len(prompts),), -float(len(self.asked)))

    what = alone(0, rewards=Weighted({"wavy": (Falling(), 1.0)}), at_once=1)
    seen = looks(method("zero_order", steps=1 + 3 + 3, neighbours=3), what)
    cosines = [torch.cosine_similarity(one.noise.flatten(), two.noise.flatten(), dim=0).item()
               for one, two in ((seen[0], seen[1]), (seen[0], seen[4]), (seen[4], seen[5]))]  # fmt: skip
    assert cosines[0] == pytest.approx(0.95, abs=1e-5) and cosines[2] == pytest.approx(0.95, abs=1e-5)
    assert abs(cosines[1]) < 0.9


# -- FK steering -------------------------------------------------------------------------------------------------------


def test_systematic_draws_are_as_even_as_can_be() -> None:
    g = torch.Generator().manual_seed(0)
    weights = torch.softmax(3 * torch.randn(20, 5, generator=g), 1)
    for _ in range(20):
        kept = systematic(weights, torch.rand(20, 1, generator=g))
        times = torch.stack([(kept == which).sum(1) for which in range(5)], 1)
        assert ((times - 5 * weights).abs() < 1 + 1e-4).all()
    even = torch.full((3, 4), 0.25)
    assert torch.equal(systematic(even, torch.rand(3, 1, generator=g)), torch.arange(4).expand(3, 4))


def test_differences_telescope() -> None:
    said = torch.randn(4, 2, 3, generator=torch.Generator().manual_seed(0))
    total = sum(POTENTIALS["diff"](said[: number + 1]) for number in range(4))
    torch.testing.assert_close(total, said[-1])
    assert torch.equal(POTENTIALS["max"](said), said.amax(0)) and torch.equal(POTENTIALS["add"](said), said.sum(0))


def test_without_strength_particles_walk_as_if_alone() -> None:
    """lam = 0 hardly: the pictures are those of the random sampler from the same chains of noise."""
    what = objective()
    seen = [look for look in looks(method("fk", strength=1e-9), what) if look.ends]
    for look in seen:
        torch.testing.assert_close(what.look(look.noise, eta=1.0).pixels, look.pixels)
    assert len(seen) == 3 and not torch.equal(seen[0].noise, seen[1].noise)


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("potential", POTENTIALS)
def test_a_particles_noise_makes_its_picture_whatever_was_drawn_again(potential: str, adaptive: bool) -> None:
    what = objective(steps=6)
    seen = [
        look for look in looks(method("fk", potential=potential, adaptive=adaptive, particles=4), what) if look.ends
    ]
    for look in seen:
        torch.testing.assert_close(what.look(look.noise, eta=1.0).pixels, look.pixels, rtol=1e-4, atol=1e-5)


def test_weights_add_up_until_particles_are_drawn() -> None:
    """Of four particles 3 : 1 : 1 : 1 leaves an effective number of 3, which is enough; 81 : 1 : 1 : 1 does not."""
    steered, generators = FKSteering(particles=4, adaptive=True), (torch.Generator().manual_seed(0),)
    once = torch.tensor([[math.log(3.0), 0.0, 0.0, 0.0]])
    kept, weights = steered._drawn(once, generators)
    assert kept.tolist() == [[0, 1, 2, 3]] and torch.equal(weights, once)  # (3 + 1 + 1 + 1)^2 / 12 = 3
    kept, weights = steered._drawn(4 * once, generators)
    assert (kept == 0).sum() == 4 and (weights == 0).all()  # 84^2 / (81^2 + 3) = 1.08
    kept, weights = FKSteering(particles=4)._drawn(4 * once, generators)
    assert (kept == 0).sum() >= 3 and (weights == 0).all()


def test_steered_particles_score_higher() -> None:
    means = [torch.stack([look.scores.total for look in looks(method("fk", strength=strength, particles=6), objective())
                          if look.ends]).mean() for strength in (1e-9, 3.0)]  # fmt: skip
    assert means[1] > means[0] + 0.3


def test_strong_steering_leaves_one_family() -> None:
    what = objective(steps=6)
    seen = [look for look in looks(method("fk", strength=1e6, last=0.5), what) if look.ends]
    starts = torch.stack([look.noise[:, 0] for look in seen])
    assert (starts == starts[:1]).all()


def test_a_particle_without_a_score_counts_as_the_worst() -> None:
    nan = math.nan
    assert worst_for_missing(torch.tensor([[1.0, nan, -2.0], [nan, nan, nan]])).tolist() == [[1, -2, -2], [0, 0, 0]]


# -- paths -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("process", ["vp", "flow"])
def test_noise_that_is_added_again_leads_to_the_law_of_the_earlier_time(process: str) -> None:
    what = objective(process=process, kind="epsilon" if process == "vp" else "flow", steps=8)
    g = torch.Generator().manual_seed(0)
    x0, eps, draws = (torch.randn(4000, 1, 2, 2, generator=g) for _ in range(3))
    now, back = 6, 3
    t = what.times[now].expand(4000)
    again = noised_again(what, what.process.add_noise(2 + 0.5 * x0, eps, t), draws, now, back)
    alpha, sigma = what.process.coefficients(what.times[back])
    assert again.mean().item() == pytest.approx(2 * alpha.item(), abs=0.03)
    assert again.std().item() == pytest.approx(math.hypot(0.5 * alpha.item(), sigma.item()), rel=0.02)


def test_paths_are_kept_by_how_their_walks_end() -> None:
    what = alone(2, steps=6)
    seen = looks(method("paths", kept=2, copies=3, rounds=3), what)
    assert len(seen) == 3 * 6 and all(look.ends for look in seen)
    first, last = (torch.cat([look.scores.total for look in part]) for part in (seen[:6], seen[-6:]))
    assert last.mean() > first.mean()


# -- DNO ---------------------------------------------------------------------------------------------------------------


def test_noise_that_looks_random_costs_next_to_nothing_and_other_noise_more() -> None:
    g = torch.Generator().manual_seed(0)
    z = torch.randn(3, 400, generator=g)
    orders = torch.stack([orders_of(400, 8, g)] * 3)
    least = 2 * math.log(2)
    assert ((improbability(z, orders) >= least - 1e-5) & (improbability(z, orders) < least + 0.5)).all()
    m, k = 100, 4
    shifted = improbability(torch.full((1, 400), 0.5), orders[:1])
    # rows are all (1/2, 1/2, 1/2, 1/2): M1^2 = 1, and 1/4 everywhere less the unit matrix has the eigenvalues 0 and -1
    beyond = math.sqrt(1 + 1) - 1 - math.sqrt(k / m)
    assert shifted.item() == pytest.approx(m * 1 / (2 * k) + max(m * beyond**2 / 2, math.log(2)), rel=1e-4)
    assert (improbability(3 * z, orders) > 10).all()


def test_likely_noise_is_hardly_pulled_and_other_noise_back() -> None:
    what = objective()
    z = torch.randn(3, 50, *SHAPE, generator=torch.Generator().manual_seed(0))
    likely, unlikely = (DNO(permutations=3)._unlikely_slope(some, what.generators) for some in (z, z + 1))
    assert likely.norm() < 0.1 * unlikely.norm() and unlikely.mean() > 0


@pytest.mark.parametrize("process", ["vp", "flow"])
def test_an_estimated_slope_leads_where_the_exact_one_does(process: str) -> None:
    what = objective(process=process, kind="epsilon" if process == "vp" else "flow")
    z = torch.cat([what.fresh()[:, None], what.fresh(4)], 1)
    _, exact = what.slope(z, eta=1.0)
    seen, guessed = what.estimated_slope(z, 1.0, draws=400, size=0.01)
    cosine = torch.cosine_similarity(exact.flatten(1), guessed.flatten(1))
    assert (cosine > 0.9).all(), cosine
    torch.testing.assert_close(seen.pixels, what.look(z, eta=1.0).pixels)


def test_black_boxes_are_optimized_by_an_estimate() -> None:
    what = objective(rewards=Weighted({"box": (Box(), 1.0)}))
    seen = looks(method("dno", gradient="estimated", draws=8, size=0.1, regularization=0.0, steps=8), what)
    assert best_of(seen).scores.total.sum() > seen[0].scores.total.sum()
