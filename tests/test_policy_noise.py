"""What `benchmarks.policy_noise` says of gradients whose signal is known."""

from __future__ import annotations

import pytest
import torch

from benchmarks.policy_noise import report, signal


def test_signal_is_the_share_of_the_mean_in_the_square() -> None:
    g = torch.Generator().manual_seed(0)
    mean = torch.randn(5000, generator=g)
    found = signal(mean + 2 * torch.randn(40, 5000, generator=g))
    assert found["signal"] == pytest.approx(1 / 5, abs=0.01) and 0 < found["error"] < 0.01
    assert found["length"] == pytest.approx((5 * 5000) ** 0.5, rel=0.05)
    assert abs(signal(torch.randn(40, 5000, generator=g))["signal"]) < 0.01


def test_a_long_noisy_step_drowns_the_others_unless_it_is_left_out() -> None:
    g = torch.Generator().manual_seed(0)
    by_step = torch.randn(2000, generator=g) + torch.randn(9, 20, 2000, generator=g)
    by_step[-1] = 50 * torch.randn(20, 2000, generator=g)
    rows = {row["steps"]: row["signal"] for row in report(by_step)}
    assert abs(rows["all"]) < 0.05 < 0.8 < rows["the first six"] and rows["all, made equally long"] > 0.8
    assert rows["0"] == pytest.approx(0.5, abs=0.1)
