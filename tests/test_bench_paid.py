"""The benchmark of rollout updates compares equal work. No timings."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import paid
from benchmarks.paid import Meter, alignprop, compared, d3po, prdp, subject


@pytest.mark.slow
def test_shared_pairs_and_two_passes_have_the_plain_gradient_and_their_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    threads = torch.get_num_threads()
    try:
        meter = Meter(subject())
        one, pairs, shared = d3po(meter, 4, 0).values()
        assert one.evaluations / pairs.evaluations >= 1.3 and one.evaluations / shared.evaluations >= 5
        short, long = (list(alignprop(meter, steps, 0).values())[1] for steps in (5, 20))
        assert 0 < long.kept_bytes <= 1.05 * short.kept_bytes
        plain, ours = prdp(meter, 3, 0).values()
        assert ours.kept_bytes < plain.kept_bytes / 2
        monkeypatch.setattr(paid, "subject", lambda: meter.subject)
        monkeypatch.setattr(paid, "d3po", lambda *_: {"a": one, "b": pairs})
        monkeypatch.setattr(paid, "alignprop", lambda *_: {"a": short})
        monkeypatch.setattr(paid, "prdp", lambda *_: {"a": plain})
        monkeypatch.setattr("sys.argv", ["paid", "--out", str(tmp_path / "paid.json")])
        paid.main()
        assert len(json.loads((tmp_path / "paid.json").read_text())["rows"]) == 5
        assert "fewer" in capsys.readouterr().out
    finally:
        torch.set_num_threads(threads)


def test_a_difference_is_refused() -> None:
    work = subject()
    meter, parameter = Meter(work), work.parameters[0]
    updates = [lambda k=k: meter.backward(lambda: (k * parameter).sum()) for k in (1.0, 1.01)]  # type: ignore[misc]
    with pytest.raises(AssertionError, match="b: gradients differ by"):
        compared(meter, ("a", "b"), updates, 0)
