"""Golden values in double precision of the losses beside those of pairs, derived from the formulas, and properties."""

from __future__ import annotations

import math

import pytest
import torch

from diffalign.losses import log_ratio, scaled_gradient, sigmoid, winner_preserving_scale
from diffalign.losses.divergences import CLAMP, DIVERGENCES
from diffalign.losses.listwise import calibrated, rank_preference, rank_weights, share_of_wins, share_ordered
from diffalign.losses.parts import better_then_worse, labels_of_parts, part_errors, weights_of_parts
from diffalign.losses.unary import UTILITIES, falling, gated_residual, liked_or_not, margin_aware


def d(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


# -- f-divergences and the winner-preserving scale: rho_w = .5, rho_l = -.5 -------------------------------------------


@pytest.mark.parametrize(
    ("name", "alpha", "expected"),
    [
        ("reverse_kl", 0.0, 0.3132616875),
        ("forward_kl", 0.0, 0.3020887322),
        ("js", 0.0, 0.4740769842),
        ("alpha", 0.0, 0.3020887322),  # is forward_kl
        ("alpha", 1.0, 0.3132616875),  # is reverse_kl
        ("alpha", 0.5, math.log1p(math.exp(-4 * math.sinh(0.25)))),  # psi = -2 exp(-rho / 2)
    ],
)
def test_divergences_golden(name: str, alpha: float, expected: float) -> None:
    psi = DIVERGENCES[name]
    assert sigmoid(psi(d(0.5), alpha), psi(d(-0.5), alpha)).item() == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_divergences_rise_with_the_log_ratio_and_stay_finite(name: str) -> None:
    rho = torch.linspace(-9, 9, 101, dtype=torch.float64)
    assert (DIVERGENCES[name](rho, 0.5).diff() > 0).all()
    far = torch.tensor([-1e4, 1e4])
    assert DIVERGENCES[name](far, 0.5).isfinite().all()
    if name != "reverse_kl":
        assert torch.equal(DIVERGENCES[name](far, 0.5), DIVERGENCES[name](far.sign() * CLAMP, 0.5))


def test_alpha_goes_to_the_reverse_kl() -> None:
    near, at = (DIVERGENCES["alpha"](d(0.5, -0.5), alpha) for alpha in (1 - 1e-6, 1.0))
    assert near.diff().item() == pytest.approx(at.diff().item(), abs=1e-6)


def test_the_losers_gradient_shrinks_where_it_hurts_the_winner() -> None:
    winner, loser = torch.tensor([[1.0, 0.0]] * 4), torch.tensor([[4.0, 3.0], [0.5, 0.0], [-4.0, 1.0], [0.0, 1.0]])
    assert winner_preserving_scale(winner, loser, 0.0).tolist() == [0.25, 1.0, 1.0, 1.0]
    assert winner_preserving_scale(winner, loser, 0.6).tolist() == pytest.approx([0.1, 0.8, 1.0, 1.0])


def test_a_scaled_step_does_not_raise_the_winners_error() -> None:
    """Winner and loser outputs are one and the same parameter, the case in which a loser's push hurts most."""
    g = torch.Generator().manual_seed(0)
    for _ in range(20):
        theta = torch.randn(8, generator=g, dtype=torch.float64).requires_grad_()
        y_w, y_l = torch.randn(2, 8, generator=g, dtype=torch.float64)
        m_w, m_l = (theta - y_w).square().mean()[None], (theta - y_l).square().mean()[None]
        scale = winner_preserving_scale((theta - y_w)[None], (theta - y_l)[None], 0.0).double()
        kept = scaled_gradient(m_l, scale)
        assert torch.equal(kept.detach(), m_l.detach())
        (step,) = torch.autograd.grad((m_w - kept).sum(), theta, retain_graph=True)
        (up,) = torch.autograd.grad(m_w.sum(), theta)
        assert (step @ up).item() >= -1e-7


# -- lists -----------------------------------------------------------------------------------------------------------

PHI, S = d(1, 2 / 3, 1 / 3, 0)[None], d(-1e-4, 2e-4, 0, -3e-4)[None]
RHO = log_ratio(S, torch.zeros_like(S), 5000)  # kappa 2500


def test_rankdpo_golden() -> None:
    weights = rank_weights(PHI, PHI)[0]
    named = [weights[i, j].item() for i, j in ((0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3))]
    assert named == pytest.approx([0.219691, 0.533854, 0.821360, 0.061858, 0.169703, 0.025995], abs=1e-6)
    assert rank_preference(RHO, PHI, weights[None]).item() == pytest.approx(1.5372170618, abs=1e-9)


def test_ranks_of_the_model_weigh_the_same_gains_by_its_own_order() -> None:
    by_model = rank_weights(PHI, RHO)[0]
    # rho orders the pictures 3, 0, 2, 1: the first has rank 2 and the last rank 1
    assert by_model[0, 3].item() == pytest.approx((2 - 1) * (1 / math.log(2) - 1 / math.log(3)))
    assert torch.equal(rank_weights(PHI, d(4, 3, 2, 1)[None]), rank_weights(PHI, PHI))


def test_equal_pictures_are_no_pair() -> None:
    phi = d(1, 0.5, 0.5)[None]
    rho = d(0, 3, -3)[None].requires_grad_()
    (slope,) = torch.autograd.grad(rank_preference(rho, phi, torch.ones(1, 3, 3)).sum(), rho)
    alone = sigmoid(d(0), d(3)) + sigmoid(d(0), d(-3))
    assert rank_preference(rho, phi, torch.ones(1, 3, 3)).item() == pytest.approx(alone.item())
    assert slope[0, 0] < 0 < slope[0, 1] and slope[0, 2] > 0


def test_a_list_of_two_is_a_pair_up_to_its_weight() -> None:
    phi, rho = d(1, 0)[None], d(0.5, -0.5)[None]
    weight = 1 / math.log(2) - 1 / math.log(3)
    assert rank_preference(rho, phi, rank_weights(phi, phi)).item() == pytest.approx(weight * 0.3132616875)


def test_shares() -> None:
    scores = torch.tensor([[9.0, 4.0, 4.0, 1.0]])
    assert share_of_wins(scores).tolist() == [[1.0, pytest.approx(1 / 3), pytest.approx(1 / 3), 0.0]]
    assert share_ordered(torch.tensor([[3.0, 3.0, 2.0, 5.0]]), scores).item() == pytest.approx((0.5 + 1) / 5)
    s = 1 / (1 + math.exp(-5)), 1 / (1 + math.exp(-8))
    assert calibrated(scores)[0, 0].item() == pytest.approx((2 * s[0] + s[1]) / 3)
    two = calibrated(d(1, 0)[None])[0]
    assert (two[0] - two[1]).item() == pytest.approx(math.tanh(0.5))
    assert calibrated(scores).sum().item() == pytest.approx(2.0)  # every comparison gives one in all


# -- thumbs and MaPO: m_w .1000, m_l .1203, r_w .1002, r_l .1201 ------------------------------------------------------


def test_kto_golden() -> None:
    gain, label = d(0.1002 - 0.1000, 0.1201 - 0.1203), d(1, 0)
    u = liked_or_not(gain, d(0, 0), label, 1000)
    assert UTILITIES["kto"](u).tolist() == pytest.approx([0.4501660027] * 2, abs=1e-9)
    assert UTILITIES["loss_averse"](u).tolist() == pytest.approx([0.5981388694] * 2, abs=1e-9)  # ln(1 + e^-.2)
    assert UTILITIES["risk_seeking"](u).tolist() == pytest.approx([-0.7981388694] * 2, abs=1e-9)


def test_utilities_fall_and_bend_as_their_names_say() -> None:
    u = torch.linspace(-4, 4, 81, dtype=torch.float64)
    for name, utility in UTILITIES.items():
        assert (utility(u).diff() < 0).all(), name
    assert (UTILITIES["loss_averse"](u).diff().diff() > 0).all()  # a loss that is convex is a utility that is concave
    assert (UTILITIES["risk_seeking"](u).diff().diff() < 0).all()


def test_mapo_golden() -> None:
    ell = margin_aware(d(0.1000), d(0.1203), 0.5, 1000)
    assert ell.item() == pytest.approx(4.9818409574, abs=1e-9)
    value = 0.1000 - 0.1 * torch.nn.functional.logsigmoid(ell).item()
    assert value == pytest.approx(0.1 + 0.1 * math.log1p(math.exp(-4.9818409574)), abs=1e-11)
    assert value == pytest.approx(0.10068380, abs=1e-8)


def test_mapos_phi_is_whole_at_zero_and_falls_with_slope_minus_s_over_2() -> None:
    at = d(0, 1e-12, 1e-9, 1e-5, 0.1, 400).requires_grad_()
    phi = falling(at, 0.5)
    phi.sum().backward()
    assert phi[0].item() == 1 and phi.isfinite().all() and (phi.detach().diff() < 0).sum() >= 3
    assert at.grad is not None and at.grad.isfinite().all()
    assert at.grad[:3].tolist() == pytest.approx([-0.25] * 3, abs=1e-6)
    single = falling(torch.tensor([0.0, 1e-7, 3e-6, 1e-3]), 0.5)
    assert single.tolist() == pytest.approx([1.0, 1.0, 1.0, 1 - 0.25e-3], abs=1e-6)


def test_dspo_residual_is_sft_at_an_open_gate_of_zero() -> None:
    residual, repulsion = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    plain = gated_residual(residual, repulsion, torch.zeros(3))
    torch.testing.assert_close(plain, residual.square().flatten(1).mean(1))
    full = gated_residual(residual, residual, torch.ones(3))
    assert full.tolist() == [0, 0, 0]


# -- parts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("norm", "expected"), [("sum", 0.4740769842), ("mean_all", 0.6443966601), ("mean_nontie", 0.6325990353)]
)
def test_densedpo_golden(norm: str, expected: float) -> None:
    """The printed beta of 500, without 1/2, is 1000 here."""
    labels = d(1, -1, 0, 1, -1)[None]
    difference = log_ratio(d(-4e-4, 2e-4, 9e-4, -1e-4, 3e-4)[None], torch.zeros(1, 5), 1000)
    h = (weights_of_parts(labels, norm) * difference).sum(1)
    assert sigmoid(h, torch.zeros_like(h)).item() == pytest.approx(expected, abs=1e-9)


def test_errors_of_parts_average_to_the_whole() -> None:
    g = torch.Generator().manual_seed(0)
    clip, still = torch.randn(2, 3, 4, 5, 6, 7, generator=g), torch.randn(2, 3, 4, 5, 6, generator=g)
    by_frame, by_place = part_errors(*clip, parts=1), part_errors(*still, parts=2)
    assert by_frame.shape == (3, 5) and by_place.shape == (3, 30)
    torch.testing.assert_close(by_frame.mean(1), (clip[0] - clip[1]).square().flatten(1).mean(1))
    torch.testing.assert_close(by_frame[1, 2], (clip[0] - clip[1])[1, :, 2].square().mean())
    torch.testing.assert_close(by_place[2, 6 + 1], (still[0] - still[1])[2, :, 1, 1].square().mean())


def test_labels_go_to_the_nearest_frame_or_place() -> None:
    segments = torch.tensor([[1.0, 0.0, -1.0]])
    assert labels_of_parts(segments, torch.Size((1, 4, 6, 2, 2))).tolist() == [[1, 1, 0, 0, -1, -1]]
    assert labels_of_parts(segments, torch.Size((1, 4, 4, 2, 2))).tolist() == [[1, 0, 0, -1]]
    regions = torch.tensor([[[1.0, -1.0], [0.0, 1.0]]])
    whole = labels_of_parts(regions, torch.Size((1, 4, 2, 4))).view(2, 4)
    assert whole.tolist() == [[1, 1, -1, -1], [0, 0, 1, 1]]
    fine = torch.arange(64.0).view(1, 8, 8)
    assert labels_of_parts(fine, torch.Size((1, 4, 2, 2))).tolist() == [[18, 22, 50, 54]]  # those at the centers


@pytest.mark.parametrize(
    ("signs", "shape", "message"),
    [
        (torch.ones(1, 3), (1, 4, 8, 8), "expected regions .* for still pictures, got 3 segments"),
        (torch.ones(1, 9), (1, 4, 5, 8, 8), r"at most as many segments as a clip's latent has frames \(5\), got 9"),
        (torch.ones(1, 2, 2), (1, 4, 5, 8, 8), "expected segments .*, got regions"),
    ],
)
def test_labels_that_do_not_fit_are_refused(signs: torch.Tensor, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        labels_of_parts(signs, torch.Size(shape))


def test_the_better_member_is_picked_part_by_part() -> None:
    errors = torch.tensor([[1.0, 2.0, 9.0], [3.0, 4.0, 9.0]])
    assert better_then_worse(errors, torch.tensor([[1.0, -1.0, 0.0]])).tolist() == [2.5, 2.5]
    assert better_then_worse(errors, torch.tensor([[1.0, 1.0, 0.0]])).tolist() == [1.5, 3.5]
