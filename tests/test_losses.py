"""Golden values in double precision, derived from the formulas, and the properties of the links."""

import math

import pytest
import torch

from diffalign.losses import (
    FLIPS,
    LINKS,
    NEEDS_SMOOTHING,
    exo,
    flip_sign,
    hinge,
    ipo,
    log_ratio,
    nca,
    ranking_hinge,
    robust,
    sigmoid,
    squared_error,
)


def d(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


# m_w .1000, m_l .1203, r_w .1002, r_l .1201, beta 5000: d_w = -2e-4, d_l = +2e-4, so rho_w = .5, rho_l = -.5, h = 1
RHO_W, RHO_L = log_ratio(d(0.1000), d(0.1002), 5000), log_ratio(d(0.1203), d(0.1201), 5000)


def test_log_ratio_golden() -> None:
    assert RHO_W.item() == pytest.approx(0.5, abs=1e-9)
    assert RHO_L.item() == pytest.approx(-0.5, abs=1e-9)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (sigmoid(RHO_W, RHO_L), 0.3132616875),
        (sigmoid(RHO_W, RHO_L, 0.1), 0.4132616875),
        (robust(RHO_W, RHO_L, 0.1), 0.1882616875),
        (hinge(RHO_W, RHO_L), 0.0),
        (ipo(RHO_W, RHO_L), 0.25),
        (exo(RHO_W, RHO_L, 0.01), 0.6636652908),
        (nca(RHO_W, RHO_L), 1.1981539684),
    ],
)
def test_links_golden(value: torch.Tensor, expected: float) -> None:
    assert value.item() == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(
    ("m_w", "flip", "s", "loss"),
    [
        (0.1, "sign", 1, 0.3868710061),
        (0.1003, "sign", -1, 0.9740769842),
        (0.1003, "indicator", 0, 0.8259394198),  # h = -.25: softplus(.25)
        (0.1003, "none", 1, 0.6931471806),  # h = 0
    ],
)
def test_seppo_golden(m_w: float, flip: str, s: int, loss: float) -> None:
    """r_w .1002, m_r .08, r_r .0799, beta 5000: the opponent's rho is -.25 and the winner's is .5 or -.25."""
    rho_w, rho_r = log_ratio(d(m_w), d(0.1002), 5000), log_ratio(d(0.08), d(0.0799), 5000)
    sign = flip_sign(d(m_w) - d(0.1002), flip)
    assert sign.item() == s
    assert sigmoid(rho_w, sign * rho_r).item() == pytest.approx(loss, abs=1e-9)


@pytest.mark.parametrize("flip", FLIPS)
def test_at_the_reference_an_opponent_is_pushed_away(flip: str) -> None:
    assert flip_sign(d(0.0, -0.0), flip).tolist() == [1, 1]
    assert not flip_sign(d(1.0).requires_grad_(), flip).requires_grad


def test_ranking_hinge_golden() -> None:
    d_w, d_l = d(0.1000) - d(0.1002), d(0.1203) - d(0.1201)
    assert ranking_hinge(d_w, d_l, 0.001).item() == pytest.approx(6.0e-4, abs=1e-12)
    assert ranking_hinge(d_w, d_l, 0.0003).item() == 0


def test_sigmoid_at_the_reference_is_ln_2() -> None:
    assert sigmoid(d(0), d(0)).item() == math.log(2)


def test_sigmoid_gradient_is_the_papers() -> None:
    """dL/dm_w = (beta / 2) sigmoid(-h)."""
    m_w = d(0.1000).requires_grad_()
    sigmoid(log_ratio(m_w, d(0.1002), 5000), RHO_L).sum().backward()
    assert m_w.grad is not None
    assert m_w.grad.item() == pytest.approx(2500 / (1 + math.e), rel=1e-9)


@pytest.mark.parametrize("name", LINKS)
def test_links_pull_the_winner_up_at_the_reference(name: str) -> None:
    """At theta = reference every link lowers its loss by raising rho_w - rho_l."""
    rho_w, rho_l = d(0).requires_grad_(), d(0).requires_grad_()
    LINKS[name](rho_w, rho_l, 0.01 if name in NEEDS_SMOOTHING else 0.0).sum().backward()
    assert rho_w.grad is not None and rho_l.grad is not None
    assert rho_w.grad.item() < 0 < rho_l.grad.item()


@pytest.mark.parametrize("name", LINKS)
def test_links_are_per_sample(name: str) -> None:
    rho_w, rho_l = torch.randn(2, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    whole = LINKS[name](rho_w, rho_l, 0.05)
    assert whole.shape == (5,)
    for i in range(5):
        assert torch.equal(LINKS[name](rho_w[i : i + 1], rho_l[i : i + 1], 0.05)[0], whole[i])


def test_exo_is_least_at_its_target() -> None:
    h = torch.linspace(-10, 10, 2001, dtype=torch.float64)
    best = h[exo(h, torch.zeros_like(h), 0.01).argmin()].item()
    assert best == pytest.approx(math.log(0.99 / 0.01), abs=0.01)


def test_no_overflow_far_from_the_reference() -> None:
    far = torch.tensor([200.0, -200.0])
    for name, link in LINKS.items():
        assert link(far, -far, 0.01).isfinite().all(), name


def test_squared_error_is_fp32_mean_over_every_axis() -> None:
    a, b = torch.full((2, 3, 4, 5), 0.25, dtype=torch.bfloat16), torch.zeros(2, 3, 4, 5, dtype=torch.bfloat16)
    assert squared_error(a, b).dtype == torch.float32
    assert squared_error(a, b).tolist() == [0.0625, 0.0625]
    assert squared_error(torch.ones(2, 3, 4, 5, 6), torch.zeros(2, 3, 4, 5, 6)).shape == (2,)
