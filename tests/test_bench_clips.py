"""What Wan's decoder keeps grows with the latent frames, and is what autograd keeps of real tensors."""

from __future__ import annotations

import pytest
import torch
from diffusers import AutoencoderKLWan

from benchmarks.clip_decoding import build, kept_bytes
from diffalign.counting import counted


def test_a_latent_frame_more_keeps_as_much_more() -> None:
    vae = build()
    one, two, three = (kept_bytes(vae, count, 64, 64) for count in (1, 2, 3))
    assert one < two < three and three - two == pytest.approx(two - one, rel=0.1)


def test_counts_on_the_meta_device_are_those_of_a_real_decoder() -> None:
    config = {"base_dim": 4, "z_dim": 4, "dim_mult": [1, 1, 2, 2], "num_res_blocks": 1,
              "latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}  # fmt: skip
    with torch.device("meta"):
        meta = AutoencoderKLWan(**config).requires_grad_(False)
    real = AutoencoderKLWan(**config).requires_grad_(False)
    code = torch.randn(1, 4, 2, 4, 4, requires_grad=True)
    with counted(real) as count:
        real.decode(code)
    assert count.kept_bytes == kept_bytes(meta, 2, 32, 32)
