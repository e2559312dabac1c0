"""What every row of REWARDS keeps to, on the small instances of `zoo`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import zoo
from gaps import with_gradient
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from diffalign.rewards import REWARDS
from diffalign.rewards.base import Reward, Weighted

ROWS = [name for name in REWARDS if name in zoo.ZOO]
TOLERANCE = 1e-5  # of the largest score: sums in another order


@pytest.fixture(scope="module")
def reward_of() -> Any:
    built: dict[str, Reward] = {}
    return lambda name: built.setdefault(name, zoo.ZOO[name].build()) if name not in built else built[name]


def cases(name: str) -> tuple[list[Any], list[str]]:
    """Twelve photographs and prompts in turn; where groups must stay whole, a prompt has its pictures in a row."""
    pictures, prompts = zoo.pictures(), zoo.ZOO[name].prompts
    if zoo.ZOO[name].grouped:
        return pictures, [prompts[i // (len(pictures) // len(prompts))] for i in range(len(pictures))]
    return pictures, [prompts[i % len(prompts)] for i in range(len(pictures))]


def near(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=0, atol=TOLERANCE * wanted.abs().max().item())


def test_every_row_has_a_small_instance():
    missing = sorted(REWARDS.keys() - zoo.ZOO.keys())
    assert not missing, f"rows of REWARDS without an instance: {missing}; add each to ZOO in tests/zoo.py"
    assert not zoo.ZOO.keys() - REWARDS.keys()


@pytest.mark.parametrize("name", ROWS)
def test_scores_do_not_depend_on_batch_size_or_order(name: str, reward_of: Any):
    reward, (pictures, prompts) = reward_of(name), cases(name)
    whole = reward(pictures, prompts)
    assert whole.shape == (12,) and whole.dtype == torch.float32 and whole.isfinite().all()
    assert whole.std() > 1e-3 * whole.abs().max()  # a constant would pass the rest
    low, high = reward.card.range
    assert (whole >= low).all() and (whole <= high).all()
    near(reward(pictures[::-1], prompts[::-1]).flip(0), whole)
    size = 12 // len(zoo.ZOO[name].prompts) if zoo.ZOO[name].grouped else 5
    parts = [reward(pictures[i : i + size], prompts[i : i + size]) for i in range(0, 12, size)]
    near(torch.cat(parts), whole)
    if not zoo.ZOO[name].grouped:
        near(torch.cat([reward([p], [text]) for p, text in zip(pictures[:4], prompts, strict=False)]), whole[:4])


@pytest.mark.parametrize("name", ROWS)
def test_scores_in_company_are_those_alone(name: str, reward_of: Any):
    """Beside a reward of each recipe, whose pictures it shares where it can."""
    pictures, prompts = cases(name)
    company = {other: (reward_of(other), 1.0) for other in ("pickscore", "hpsv2.1", "imagereward", "aesthetic-v2.5")}
    both = Weighted({**company, name: (reward_of(name), 1.0)})
    both(pictures, prompts)
    assert torch.equal(both.terms[name], reward_of(name)(pictures, prompts))


class InDouble(TorchFunctionMode):
    """Whatever asks for fp32 gets float64, in transformers too, so that differences are exact enough."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {key: _wider(value) for key, value in (kwargs or {}).items()}
        return (Tensor.double if func is Tensor.float else func)(*map(_wider, args), **given)


def _wider(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value


def widen(reward: Reward) -> None:
    for attributes, name, value in zoo.holdings(reward):
        attributes[name] = value.double()


@pytest.mark.parametrize("name", with_gradient())
def test_the_gradient_is_that_of_finite_differences(name: str):
    """In a random direction and in the gradient's own, through resize, network and head."""
    reward, prompts = zoo.ZOO[name].build(), list(zoo.ZOO[name].prompts[:2])
    widen(reward)
    with InDouble():
        check_gradient(reward, prompts)


def check_gradient(reward: Reward, prompts: list[str]) -> None:
    generator = torch.Generator().manual_seed(0)
    pixels = 0.3 + 0.4 * torch.rand(2, 3, 40, 36, generator=generator, dtype=torch.float64)
    score = reward(pixels.requires_grad_(), prompts)
    assert score.dtype == torch.float64
    (gradient,) = torch.autograd.grad(score.sum(), pixels)
    assert (gradient.flatten(1).abs().sum(1) > 0).all()
    random = torch.randn(pixels.shape, generator=generator, dtype=torch.float64)
    for direction in (random / random.norm(), gradient / gradient.norm()):
        with torch.no_grad():
            up, down = (reward(pixels + step * direction, prompts).sum() for step in (1e-5, -1e-5))
        slope = (gradient * direction).sum().item()
        assert (up - down).item() / 2e-5 == pytest.approx(slope, rel=1e-5, abs=1e-8 * gradient.norm().item())


@pytest.mark.parametrize("name", with_gradient())
def test_weights_are_frozen_and_in_eval_mode(name: str, reward_of: Any):
    reward = reward_of(name)
    held = [value for _, _, value in zoo.holdings(reward)]
    modules = [value for value in held if isinstance(value, nn.Module)]
    assert modules and not any(value.requires_grad for value in held if isinstance(value, Tensor))
    for module in modules:
        assert not any(weight.requires_grad for weight in module.parameters())
        assert not any(part.training for part in module.modules())
