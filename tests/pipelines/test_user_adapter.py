"""The second cross-attention: step-0 identity, what it computes, who listens, and files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from miniatures import FAMILIES, stable_diffusion, stable_diffusion_xl
from torch import Tensor

from diffalign.evaluation import evaluate
from diffalign.generation import generate
from diffalign.pipelines import load_pipeline
from diffalign.pipelines.attention import set_attention
from diffalign.pipelines.base import LatentPipeline
from diffalign.pipelines.lora import adapters_disabled, without_adapters
from diffalign.pipelines.user_adapter import (
    attach_user_adapter,
    load_user_adapter,
    projections,
    remove_user_adapter,
    save_user_adapter,
)
from diffalign.pipelines.user_attention import decoupled_attentions, user_term
from diffalign.rewards import load_rewards

Make = Callable[[], Path]
every_family = pytest.mark.parametrize("folder", [pytest.param(make, id=name) for name, make in FAMILIES.items()])
WIDTH = 12


def asked(pipe: LatentPipeline) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    x = torch.randn(2, *pipe.latent_shape(), generator=torch.Generator().manual_seed(0))
    return x, pipe.times(5)[1:3], pipe.encode_prompts(["a red circle", "two blue squares"])


def tokens(count: int = 2) -> Tensor:
    return torch.randn(count, 4, WIDTH, generator=torch.Generator().manual_seed(1))


def trained(pipe: LatentPipeline) -> LatentPipeline:
    """As if some steps had been made."""
    generator = torch.Generator().manual_seed(2)
    for module in projections(pipe).values():
        torch.nn.init.normal_(module.value.weight, std=0.3, generator=generator)
    return pipe


@every_family
def test_a_fresh_adapter_changes_nothing_to_the_bit_and_alone_is_trained(folder: Make) -> None:
    pipe = load_pipeline(folder())
    x, t, condition = asked(pipe)
    base = pipe.predict(x, t, condition)
    parameters = attach_user_adapter(pipe, WIDTH)
    y = pipe.predict(x, t, {**condition, "user": tokens()})
    assert torch.equal(y, base)
    assert {id(p) for p in parameters} == {id(p) for p in pipe.network.parameters() if p.requires_grad}
    y.square().sum().backward()
    moved = [module.value.weight.grad.abs().sum() > 0 for module in projections(pipe).values()]
    assert len(moved) > 1 and all(moved)  # Wv can leave zero, since Wk is not


@every_family
def test_a_trained_one_speaks_to_its_user_alone(folder: Make) -> None:
    pipe = load_pipeline(folder())
    x, t, condition = asked(pipe)
    base = pipe.predict(x, t, condition)
    attach_user_adapter(pipe, WIDTH)
    trained(pipe)
    users = tokens()
    both = pipe.predict(x, t, {**condition, "user": users})
    assert (both - base).abs().amax((1, 2, 3)).min() > 1e-3
    first = pipe.predict(x, t, {**condition, "user": torch.stack([users[0], torch.zeros(4, WIDTH)])})
    torch.testing.assert_close(first[0], both[0])
    for silent in (condition, {**condition, "user": torch.zeros_like(users)}):
        assert torch.equal(pipe.predict(x, t, silent), base)  # nobody is the base, whatever was trained
    torch.testing.assert_close(first[1], base[1])


@every_family
def test_the_reference_is_the_base_without_its_user_and_the_switch_comes_back(folder: Make) -> None:
    pipe = load_pipeline(folder())
    x, t, condition = asked(pipe)
    base = pipe.predict(x, t, condition)
    attach_user_adapter(pipe, WIDTH)
    told = {**condition, "user": tokens()}
    on = trained(pipe).predict(x, t, told)
    assert torch.equal(without_adapters(pipe)(x, t, told), base)
    with pytest.raises(RuntimeError, match="inside"), adapters_disabled(pipe):
        raise RuntimeError("inside")
    assert torch.equal(pipe.predict(x, t, told), on)
    remove_user_adapter(pipe)
    assert not projections(pipe) and torch.equal(pipe.predict(x, t, condition), base)


@every_family
def test_checkpointing_and_the_choice_of_a_kernel_change_nothing(folder: Make) -> None:
    pipe = load_pipeline(folder())
    x, t, condition = asked(pipe)
    parameters = attach_user_adapter(pipe, WIDTH)
    told = {**condition, "user": tokens()}

    def gradient() -> list[Tensor]:
        loss = pipe.predict(x, t, told).square().mean()
        pipe.predict(x, t, condition)  # a reference's pass comes between forward and backward
        return list(torch.autograd.grad(loss, parameters))

    trained(pipe)
    plain = gradient()
    set_attention(pipe.network, "math")
    for a, b in zip(plain, gradient(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)
    set_attention(pipe.network, "auto")
    pipe.network.enable_gradient_checkpointing()
    pipe.network.train()
    for a, b in zip(plain, gradient(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)


def test_the_term_is_the_papers() -> None:
    """W_out softmax(Q (u Wk)^T / sqrt(d)) u Wv, written out head by head."""
    pipe = load_pipeline(stable_diffusion())
    attach_user_adapter(pipe, WIDTH)
    trained(pipe)
    _, attn = next(iter(decoupled_attentions(pipe.network)))
    x, u = torch.randn(2, 9, attn.to_q.in_features), tokens()
    normed = (u - u.mean(-1, keepdim=True)) / (u.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    q, k, v = (y.chunk(attn.heads, -1) for y in (attn.to_q(x), attn.user.key(normed), attn.user.value(normed)))
    heads = [F.softmax(a @ b.mT / a.shape[-1] ** 0.5, -1) @ c for a, b, c in zip(q, k, v, strict=True)]
    expected = torch.cat(heads, -1) @ attn.to_out[0].weight.T
    torch.testing.assert_close(user_term(attn, x, u), expected, rtol=1e-4, atol=1e-5)


@every_family
def test_files_come_back_and_pictures_follow_the_user(folder: Make, tmp_path: Path) -> None:
    pipe = load_pipeline(folder())
    attach_user_adapter(pipe, WIDTH)
    file = save_user_adapter(trained(pipe), tmp_path, {"base_model": "x", "steps": 3})
    assert [f.name for f in tmp_path.iterdir()] == ["user_adapter.safetensors"]
    again = load_pipeline(folder())
    base = generate(again, ["a red circle"] * 2, seeds=[1, 2], steps=2)
    facts = load_user_adapter(again, tmp_path)
    assert facts["width"] == WIDTH and facts["family"] == pipe.family and facts["steps"] == 3
    assert not any(p.requires_grad for p in again.network.parameters())
    one, other = tokens()
    pictures = [generate(again, ["a red circle"] * 2, seeds=[1, 2], steps=2, user=user)
                for user in (one, other, torch.zeros_like(one), torch.stack([one, other]))]  # fmt: skip
    assert torch.equal(generate(again, ["a red circle"] * 2, seeds=[1, 2], steps=2), base)
    torch.testing.assert_close(pictures[2], base)
    assert not torch.allclose(pictures[0], pictures[1]) and not torch.allclose(pictures[0], base)
    torch.testing.assert_close(pictures[3], torch.stack([pictures[0][0], pictures[1][1]]), rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match="attached already"):
        load_user_adapter(again, file)


def test_another_networks_adapter_is_refused_and_nothing_is_left(tmp_path: Path) -> None:
    pipe = load_pipeline(stable_diffusion())
    attach_user_adapter(pipe, WIDTH)
    file = save_user_adapter(pipe, tmp_path)
    other = load_pipeline(stable_diffusion_xl())
    with pytest.raises(ValueError, match="expected a user adapter for the unet of .* weights differ, such as"):
        load_user_adapter(other, file)
    assert not projections(other)
    with pytest.raises(ValueError, match="expected a user adapter"):
        load_user_adapter(other, tmp_path / "nothing.safetensors")


def test_an_evaluation_sets_a_user_against_the_base(tmp_path: Path) -> None:
    pipe = load_pipeline(stable_diffusion())
    attach_user_adapter(pipe, WIDTH)
    save_user_adapter(trained(pipe), tmp_path)
    remove_user_adapter(pipe)
    rewards = load_rewards({"jpeg": 1.0})
    report = evaluate(pipe, ["a red circle"], rewards, user_adapter=tmp_path, user=tokens()[0], steps=2)
    row = report["rewards"]["jpeg"]
    assert row["base"] != row["aligned"] and not projections(pipe)
    with pytest.raises(ValueError, match="user_adapter and user go together"):
        evaluate(pipe, ["a red circle"], rewards, user_adapter=tmp_path, steps=2)
