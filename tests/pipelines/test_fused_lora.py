"""The fused LoRA layer is peft's, whatever it is asked: scales, dtypes, autocast, dropout, several adapters."""

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora.layer import Linear
from torch import Tensor

from diffalign.pipelines.fused_lora import FusedLinear, fuse_lora_layers


def layer(alpha: float = 4, dropout: float = 0.0, dtype: torch.dtype = torch.float32, **options: bool) -> Linear:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 5)).to(dtype)
    for name in ("one", "two"):
        config = LoraConfig(r=2, lora_alpha=alpha, target_modules=["0"], lora_dropout=dropout, init_lora_weights=False,
                            **options)  # fmt: skip
        inject_adapter_in_model(config, model, adapter_name=name)
    found = model[0]
    assert type(found) is Linear
    found.set_adapter("one")
    return found


def both(made: Linear, x: Tensor) -> list[tuple[Tensor, ...]]:
    """Output and gradients, by peft and fused."""
    results = []
    for fused in (False, True):
        if fused:
            fuse_lora_layers(made)
        made.zero_grad()
        x.grad = None
        torch.manual_seed(1)
        out = made(x)
        out.float().square().mean().backward()
        grads = [p.grad.clone() for n, p in made.named_parameters() if "one" in n]
        results.append((out.detach(), x.grad.clone(), *grads))
    assert type(made) is FusedLinear
    return results


@pytest.mark.parametrize("shape", [(3, 6), (2, 3, 6), (2, 2, 3, 6)])
@pytest.mark.parametrize("alpha", [2, 4, 0.5])
def test_output_and_gradients_are_those_of_peft(shape: tuple[int, ...], alpha: float) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(2)).requires_grad_()
    theirs, ours = both(layer(alpha), x)
    allowed = 0.0 if alpha == 2 else 1e-6  # to the bit at scale 1
    torch.testing.assert_close(ours, theirs, rtol=0, atol=allowed)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fp32_adapters_on_16_bit_weights_under_autocast(dtype: torch.dtype) -> None:
    made = layer(dtype=dtype)
    for name, parameter in made.named_parameters():
        if "lora" in name:
            parameter.data = parameter.data.float()
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(2)).to(dtype).requires_grad_()
    with torch.autocast("cpu", dtype=dtype):
        theirs, ours = both(made, x)
    assert ours[0].dtype == theirs[0].dtype == dtype
    torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)
    unfused = made(x)  # without autocast the dtypes differ: peft's own way
    assert unfused.dtype == dtype
    torch.testing.assert_close(unfused, theirs[0], rtol=2e-2, atol=2e-2)


def test_what_is_not_plain_goes_peft_s_way() -> None:
    x = torch.randn(3, 6, generator=torch.Generator().manual_seed(2)).requires_grad_()
    for options in ({"use_dora": True}, {"lora_bias": True}):
        theirs, ours = both(layer(**options), x)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    theirs, ours = both(layer(dropout=0.5), x)  # training: the same generator, the same elements dropped
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    made = layer()
    with torch.no_grad():
        expected = {}
        for fused in (False, True):
            if fused:
                fuse_lora_layers(made)
            made.set_adapter(["one", "two"])
            two = made(x)
            made.set_adapter("one")
            made._disable_adapters = True
            off = made(x)
            made._disable_adapters = False
            made.merge()
            merged = made(x)
            made.unmerge()
            expected[fused] = two, off, merged
    torch.testing.assert_close(expected[True], expected[False], rtol=0, atol=1e-6)


def test_a_fresh_adapter_changes_nothing_to_the_bit() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(6, 5))
    x = torch.randn(3, 6, generator=torch.Generator().manual_seed(2))
    before = model(x)
    inject_adapter_in_model(LoraConfig(r=2, lora_alpha=7, target_modules=["0"]), model)
    fuse_lora_layers(model)
    assert torch.equal(model(x), before)
