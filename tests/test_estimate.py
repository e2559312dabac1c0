"""Counts on the meta device, against the known sizes of the true architectures and against real tensors."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F

from diffalign.config import find_config, load_config, packaged_configs
from diffalign.counting import counted
from diffalign.estimate import CARDS, estimate
from diffalign.pipelines import load_pipeline
from diffalign.pipelines.architectures import KNOWN, network_config


def config(model: str, resolution: int, **keys):
    return load_config({"pretrained_model_name_or_path": model, "resolution": resolution, "mixed_precision": "bf16",
                        "train_batch_size": 1, "data": {"name": "pickapic", "path": "x"}, **keys})  # fmt: skip


# parameters are those of the published checkpoints; FLOPs and gigabytes of one pair with rank 16, latents cached, were
# derived apart from this code by counting on hand-written configs (4BHSTD and 10BHSTD for attention)
KNOWN_COSTS = {
    #              parameters, LoRA, forward TFLOP, TFLOP a pair, activations GB, total GB, total GB with checkpointing
    "sd15": (859_520_964, 3.2, 0.80, 5.2, 1.7, 3.5, 2.07),
    "sdxl": (2_567_463_684, 23.2, 6.76, 42.7, 12.1, 17.6, 6.5),
    "sd3-medium": (2_028_328_000, 9.4, 8.90, 62.2, 7.9, 12.1, 4.9),
    "sd3.5-medium": (2_243_171_520, 11.9, 11.25, 80.3, 15.8, 20.5, 5.4),
    "sd3.5-large": (8_056_627_520, 23.6, 31.12, 209.0, 29.7, 46.2, 18.2),
}


@pytest.mark.parametrize("name", KNOWN_COSTS)
def test_the_true_architectures_cost_what_is_known(name: str):
    parameters, lora, forward, pair, activations, total, checkpointed = KNOWN_COSTS[name]
    found = estimate(config(name, 512 if name == "sd15" else 1024))
    assert found.parameters == parameters
    assert found.trained_parameters / 1e6 == pytest.approx(lora, abs=0.05)
    assert found.forward_flops / 1e12 == pytest.approx(forward, rel=0.01)
    assert found.pair_flops / 1e12 == pytest.approx(pair, rel=0.01)
    assert found.memory["activations"] / 1e9 == pytest.approx(activations, rel=0.02)
    assert found.total_bytes / 1e9 == pytest.approx(total, rel=0.02)
    with_checkpointing = estimate(config(name, 512 if name == "sd15" else 1024, gradient_checkpointing=True))
    # the known figure leaves out the block that is being recomputed, and SD3.5-medium's are the largest of all
    assert 1 <= with_checkpointing.total_bytes / 1e9 / checkpointed < (1.15 if name == "sd3.5-medium" else 1.1)
    assert with_checkpointing.pair_flops > found.pair_flops
    assert with_checkpointing.forward_flops == found.forward_flops


def test_a_fused_attention_keeps_no_scores_and_costs_what_it_recomputes():
    b, h, s, d = 2, 3, 64, 16
    qkv = [torch.empty(b, h, s, d, device="meta", requires_grad=True) for _ in range(3)]
    with counted(torch.nn.Identity()) as count:
        out = F.scaled_dot_product_attention(*qkv)
        kept = count.kept_bytes
        out.sum().backward()
    assert count.flops == 14 * b * h * s * s * d
    assert kept == 4 * (4 * b * h * s * d + b * h * s)  # q, k, v, out and one number per row
    assert F.scaled_dot_product_attention(*[torch.ones(1, 1, 2, 2)] * 3).tolist() == torch.ones(1, 1, 2, 2).tolist()


def test_kept_bytes_are_what_autograd_keeps_of_real_tensors():
    layers = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.GELU(), torch.nn.Linear(16, 4))
    x = torch.randn(5, 8)
    with counted(layers) as count:
        layers(x).sum().backward()
    assert count.kept_bytes == 4 * (5 * 8 + 5 * 16 + 5 * 16)  # input, before and after the GELU; no weight
    assert count.flops == 2 * 5 * (8 * 16 + 16 * 4) * 2 + 2 * 5 * 16 * 4  # forward, weights' and one input's gradient


def test_a_shipped_model_is_estimated_from_its_folder_and_agrees_with_the_real_one():
    network = load_pipeline("tiny-sd").network
    found = estimate(config("tiny-sd", 64, mixed_precision="no", method={"name": "sft"}, reference={"name": "none"}))
    assert found.parameters == sum(p.numel() for p in network.parameters())
    dpo = estimate(config("tiny-sd", 64, mixed_precision="no"))
    assert dpo.memory["activations"] == 2 * found.memory["activations"]  # winner and loser
    assert dpo.pair_flops == pytest.approx(2 * (found.pair_flops + found.forward_flops))


def test_full_fine_tuning_with_a_frozen_copy_holds_both():
    lora = estimate(config("sd15", 512))
    full = estimate(config("sd15", 512, train="full", reference={"name": "frozen_copy"}))
    assert full.memory["trained weights, gradients, Adam"] == 16 * lora.parameters
    assert full.memory["reference"] == 4 * lora.parameters
    assert full.memory["16-bit copy of the weights"] == 2 * lora.parameters


def test_time_is_flops_over_the_printed_rate():
    run = config("sdxl", 1024, train_batch_size=2, gradient_accumulation_steps=3)
    found = estimate(run)
    assert found.seconds_per_step(run, CARDS["H200"]) == pytest.approx(6 * found.pair_flops / 989e12)


def test_what_is_not_known_is_named_with_what_is():
    with pytest.raises(
        ValueError, match=r"expected a diffusers folder, one of the architectures sd15.*stable-diffusion-xl-base"
    ):
        network_config("someone/else")
    assert {network_config(name)["_class_name"] for name in KNOWN} == {"UNet2DConditionModel", "SD3Transformer2DModel"}


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in packaged_configs() if name.endswith("gb")])
def test_configs_fit_the_card_they_are_named_after_and_say_what_they_take(name: str):
    run = load_config(name)
    found = estimate(run)
    total = found.total_bytes / 1e9
    gigabytes = int(re.fullmatch(r".*_(\d+)gb", name)[1])
    assert total <= 0.8 * gigabytes  # the allocator, the CUDA context and the pictures of a validation come on top
    text = find_config(name).read_text()
    assert float(re.search(r"Memory: ([\d.]+) GB", text)[1]) == pytest.approx(total, abs=0.06)
    step = found.pair_flops * run.train_batch_size * run.gradient_accumulation_steps / 1e12
    assert float(re.search(r"Time: (\d+) TFLOP a step", text)[1]) == pytest.approx(step, abs=0.6)
    if run.method_name in ("dpo", "sft"):
        assert run.train_batch_size * run.gradient_accumulation_steps == 64
