"""What autograd keeps of Wan's decoder at 480 x 832 pixels, by latent frames: what a reward's gradient takes there.

    python -m benchmarks.clip_decoding

Counted on the meta device in bf16, weights left out; nothing is downloaded, and no GPU is needed.
"""

from __future__ import annotations

import torch
from diffusers import AutoencoderKLWan

from benchmarks.measure import table
from diffalign.counting import counted
from diffalign.pipelines.common import stock_warnings_off

LATENTS = (1, 2, 3, 6, 21)
HEIGHT, WIDTH = 480, 832


def kept_bytes(vae: AutoencoderKLWan, latents: int, height: int = HEIGHT, width: int = WIDTH) -> int:
    """Of one clip of so many latent frames."""
    shape = (1, vae.config.z_dim, latents, height // 8, width // 8)
    code = torch.empty(shape, dtype=vae.dtype, device="meta", requires_grad=True)
    with counted(vae) as count:
        vae.decode(code)
    return count.kept_bytes


def build() -> AutoencoderKLWan:
    """Wan 2.1's, without weights."""
    with torch.device("meta"), stock_warnings_off():
        return AutoencoderKLWan().to(torch.bfloat16).requires_grad_(False)


def main() -> None:
    vae = build()
    rows = [(str(count), str(4 * (count - 1) + 1), f"{kept_bytes(vae, count) / 1e9:.1f}") for count in LATENTS]
    print(table(("latent frames", "frames", "kept, GB"), rows))


if __name__ == "__main__":
    main()
