"""What is kept of a reference: keyed by content, written in order, computed again when it went bad."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from diffalign.recall import Recall, fingerprint


def network(seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    return torch.nn.Linear(3, 3).requires_grad_(False)


class Computing:
    """x -> 2 x, and how often."""

    def __init__(self, x: torch.Tensor) -> None:
        self.x, self.calls = x, 0

    def __call__(self) -> torch.Tensor:
        self.calls += 1
        return 2 * self.x


def ask(recall: Recall, x: torch.Tensor, what: str = "double") -> int:
    """How many calls it took."""
    compute = Computing(x)
    assert torch.equal(recall(what, {"x": x}, compute), 2 * x)
    return compute.calls


X = torch.arange(12.0).view(4, 3)


def test_rows_are_computed_once_whatever_batch_they_come_in(tmp_path: Path) -> None:
    recall = Recall(tmp_path, network())
    assert ask(recall, X) == 1
    assert ask(recall, X.flip(0)) == 0 and ask(recall, X[[2, 2, 0]]) == 0
    assert ask(recall, torch.cat([X[:1], X[:1] + 100])) == 1  # one row is new
    assert ask(recall, X, what="another") == 1


def test_every_row_that_a_value_follows_from_is_in_its_key(tmp_path: Path) -> None:
    recall, compute = Recall(tmp_path, network()), Computing(X)
    for prompt in (torch.zeros(4, 2), torch.ones(4, 2)):
        recall("double", {"x": X, "prompt": prompt}, compute)
    assert compute.calls == 2


def test_another_process_finds_what_was_flushed_and_nothing_else(tmp_path: Path) -> None:
    recall = Recall(tmp_path, network())
    ask(recall, X[:2])
    recall.flush()
    ask(recall, X[2:])
    again = Recall(tmp_path, network())
    assert ask(again, X[:2]) == 0 and ask(again, X[2:]) == 1
    assert not list(tmp_path.rglob("*.partial"))


def test_what_was_kept_wins_over_what_is_computed_now(tmp_path: Path) -> None:
    """A kernel may round differently in another batch; a row then stays what it was."""
    recall = Recall(tmp_path, network())
    first = recall("it", {"x": X[:1]}, lambda: torch.full((1, 3), 0.5))
    both = recall("it", {"x": X[:2]}, lambda: torch.full((2, 3), 0.5 + 1e-7))
    assert torch.equal(both[:1], first) and both[1, 0] == 0.5 + torch.tensor(1e-7)


@pytest.mark.parametrize("settings", ["", "bf16"])
def test_another_reference_or_precision_has_its_own_folder(tmp_path: Path, settings: str) -> None:
    Recall(tmp_path, network()).flush()
    ask(Recall(tmp_path, network()), X)
    other = Recall(tmp_path, network(seed=1 if not settings else 0), settings)
    assert ask(other, X) == 1


def test_what_is_in_training_does_not_make_another_reference() -> None:
    base = network()
    base.adapter = torch.nn.Parameter(torch.zeros(3))
    before = fingerprint(base, "")
    with torch.no_grad():
        base.adapter += 1
    assert fingerprint(base, "") == before == fingerprint(base, "")
    base.weight[0, 0] += 1
    assert fingerprint(base, "") != before


def test_a_damaged_file_is_computed_again(tmp_path: Path) -> None:
    recall = Recall(tmp_path, network())
    ask(recall, X)
    recall.flush()
    (file,) = tmp_path.rglob("*.safetensors")
    data = bytearray(file.read_bytes())
    data[-5] ^= 255
    file.write_bytes(bytes(data))
    again = Recall(tmp_path, network())
    assert ask(again, X) == 1
    again.flush()
    assert ask(Recall(tmp_path, network()), X) == 0
