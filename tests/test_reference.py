"""References that move: as documented, exact at the start, put back after an exception, and the same after a resume."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import Tensor

from diffalign.reference import MOVING, REFERENCES, Pool, evaluating
from diffalign.table import build

SECTIONS: dict[str, dict[str, Any]] = {
    "ema": {"decay": 0.9},
    "sync": {"every": 2},
    "stages": {"steps": [1, 4]},
    "pool": {"every": 2, "size": 3},
}


class Pipe:
    """As much of a pipeline as a reference looks at: a network of which a part is trained."""

    def __init__(self, dropout: float = 0.0) -> None:
        torch.manual_seed(0)
        parts = OrderedDict(frozen=torch.nn.Linear(3, 3), drop=torch.nn.Dropout(dropout), trained=torch.nn.Linear(3, 3))
        self.network: Any = torch.nn.Sequential(parts)
        self.network.frozen.requires_grad_(False)

    def predict(self, x_t: Tensor, t: Tensor, condition: dict[str, Tensor]) -> Tensor:
        if condition:
            raise RuntimeError("no such condition")
        return self.network(x_t)

    def train_to(self, value: float) -> None:
        with torch.no_grad():
            self.network.trained.bias.fill_(value)


X, T = torch.ones(2, 3), torch.zeros(2)


def reference(name: str, pipe: Pipe, **keywords: Any) -> Any:
    return build(REFERENCES, {"name": name, **SECTIONS[name], **keywords}, what="reference")(pipe)


def bias(moving: Any) -> float:
    """Of the reference, which the toy's training sets to the number of steps."""
    kept = moving.kept[moving.chosen] if isinstance(moving, Pool) else moving.kept
    return kept["trained.bias"][0].item()


def walked(name: str, steps: int, **keywords: Any) -> list[float]:
    pipe = Pipe()
    pipe.train_to(0)
    moving, seen = reference(name, pipe, **keywords), []
    for step in range(1, steps + 1):
        pipe.train_to(step)
        moving.after_step(step)
        seen.append(bias(moving))
    return seen


def test_every_moving_reference_has_a_section_here() -> None:
    assert set(SECTIONS) == MOVING


@pytest.mark.parametrize("name", SECTIONS)
def test_at_the_start_it_is_the_policy_to_the_bit(name: str) -> None:
    pipe = Pipe()
    assert torch.equal(reference(name, pipe)(X, T, {}), pipe.predict(X, T, {}))


def test_sync_is_the_policy_at_the_last_multiple() -> None:
    assert walked("sync", 6) == [0, 2, 2, 4, 4, 6]


def test_stages_are_taken_at_their_steps_alone() -> None:
    assert walked("stages", 6) == [1, 1, 1, 4, 4, 4]


def test_ema_is_the_average() -> None:
    assert walked("ema", 2) == pytest.approx([0.1, 0.9 * 0.1 + 0.1 * 2])
    assert walked("ema", 4, every=2, decay=0.5) == pytest.approx([0, 1, 1, 2.5])


def test_a_pool_offers_past_checkpoints_and_never_the_newest() -> None:
    steps = 200
    seen = walked("pool", steps, size=1000)
    for step, value in enumerate(seen, 1):
        assert value % 2 == 0 and value <= max(0, step - step % 2 - 2)
    assert seen[:3] == [0, 0, 0]
    assert len(set(seen)) > 20  # 100 draws, the n-th among n
    assert seen != walked("pool", steps, size=1000, seed=1)


def test_a_pool_forgets_the_oldest_but_the_start_and_the_one_in_use() -> None:
    pipe = Pipe()
    moving = reference("pool", pipe)
    for step in range(1, 41):
        moving.after_step(step)
        assert len(moving.kept) <= 3 and 0 in moving.kept and moving.chosen in moving.kept
        if step % 2 == 0:
            assert step in moving.kept


@pytest.mark.parametrize("name", SECTIONS)
def test_the_policy_has_its_weights_back_whatever_happens(name: str) -> None:
    pipe = Pipe()
    moving = reference(name, pipe)
    pipe.train_to(5)
    before = {n: (p.data_ptr(), p.detach().clone()) for n, p in pipe.network.named_parameters()}
    moving(X, T, {})
    with pytest.raises(RuntimeError, match="no such condition"):
        moving(X, T, {"what": X})
    for n, p in pipe.network.named_parameters():
        assert p.data_ptr() == before[n][0] and torch.equal(p, before[n][1])


@pytest.mark.parametrize("name", SECTIONS)
def test_a_gradient_through_an_earlier_pass_is_the_policys(name: str) -> None:
    gradients = []
    for between in (True, False):
        pipe = Pipe()
        moving = reference(name, pipe)
        with torch.no_grad():
            pipe.network.trained.weight.mul_(2)
        out = pipe.predict(X, T, {}).square().sum()
        if between:
            assert not moving(X, T, {}).requires_grad
        out.backward()
        gradients.append(pipe.network.trained.weight.grad)
    assert torch.equal(*gradients)


@pytest.mark.parametrize("name", SECTIONS)
@pytest.mark.parametrize("first", ["policy", "reference"])
def test_under_autocast_neither_takes_the_others_weights(name: str, first: str) -> None:
    """Autocast keeps the 16-bit copy of a parameter by the parameter, behind which a reference puts other values."""
    pipe = Pipe()
    moving = reference(name, pipe)
    with torch.no_grad():
        pipe.network.trained.weight.mul_(2)
    with torch.autocast("cpu", torch.bfloat16):
        alone = pipe.predict(X, T, {})
    with torch.autocast("cpu", torch.bfloat16):
        one = {"policy": lambda: pipe.predict(X, T, {}), "reference": lambda: moving(X, T, {})}
        order = [first, *({"policy", "reference"} - {first})]
        found = {who: one[who]() for who in order}
    assert torch.equal(found["policy"], alone) and not torch.allclose(found["reference"], alone)


def test_a_reference_has_no_dropout_and_leaves_the_policys_on() -> None:
    pipe = Pipe(dropout=0.5)
    moving = reference("sync", pipe)
    pipe.network.train()
    assert all(torch.equal(moving(X, T, {}), moving(X, T, {})) for _ in range(5))
    assert pipe.network.training and pipe.network.drop.training
    with pytest.raises(RuntimeError), evaluating(pipe.network):
        assert not pipe.network.training
        raise RuntimeError
    assert pipe.network.training


@pytest.mark.parametrize("name", SECTIONS)
def test_what_a_checkpoint_holds_goes_on_to_the_bit(name: str) -> None:
    pipe, other = Pipe(), Pipe()
    one, two = reference(name, pipe), reference(name, other)
    for step in range(1, 6):
        pipe.train_to(step / 3)
        one.after_step(step)
    two.restore({key: value.clone() for key, value in one.tensors().items()})
    for step in range(6, 30):
        pipe.train_to(step / 3)
        other.train_to(step / 3)
        one.after_step(step)
        two.after_step(step)
        assert torch.equal(one(X, T, {}), two(X, T, {}))
    assert one.tensors().keys() == two.tensors().keys()


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"name": "pool", "size": 0}, "reference.size: .* an empty pool has no reference"),
        ({"name": "pool", "every": 0}, "reference.every"),
        ({"name": "sync", "every": 0}, "reference.every"),
        ({"name": "ema", "decay": 1.5}, "reference.decay"),
        ({"name": "ema", "every": -1}, "reference.every"),
        ({"name": "stages", "steps": []}, "reference.steps"),
        ({"name": "stages", "steps": [0.5]}, "reference.steps"),
        ({"name": "stages"}, "needs steps"),
        ({"name": "sync", "evry": 1}, "did you mean 'every'"),
        ({"name": "adapter_off", "every": 1}, "unknown key"),
    ],
)
def test_bad_sections_are_named_before_there_is_a_pipeline(section: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(REFERENCES, section, what="reference")
