"""Trains the autoencoder of the shapes models: 64-pixel pictures to 16 x 16 x 4 or 8 x 8 x 16 latents.

    python -m diffalign.shapes.train_vae --out runs/tiny-vae
    python -m diffalign.shapes.train_vae --init assets/tiny-sd/vae --decoder-only --out runs/tiny-vae    # sharper edges
    python -m diffalign.shapes.train_vae --latent-channels 16 --grow assets/tiny-sd/vae --out runs/tiny-vae-16

The second leaves the latents as they are, so a network that was trained on them goes on to fit. The third is laid out
as Stable Diffusion 3's: 16 channels on an eighth of the side, no convolution on the code, and a shift as well as a
scale; it starts from the blocks of the first, to which it adds one halving.

Absolute plus squared error and a light Kullback-Leibler term; no perceptual and no adversarial loss, which flat shapes
do not need. The scaling factor of the saved model is 1 / std of its latents, as in Stable Diffusion; the shift is their
mean.
"""

from __future__ import annotations

import argparse
import copy
import random
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL

from diffalign.shapes.grammar import sample_scenes
from diffalign.shapes.render import render
from diffalign.shapes.train_common import cosine_lr, save_atomically, update_ema

SD3_CHANNELS = 16
KL_WEIGHT = 5e-7  # per picture: a posterior of about 2000 nats costs a tenth of what a blurred edge costs


def build_vae(latent_channels: int = 4) -> AutoencoderKL:
    """0.4 million parameters and two halvings, or 0.6 million and three; one attention block in the middle.

    As many numbers in a latent either way: the second hands a transformer 64 tokens without patches.
    """
    sd3 = latent_channels == SD3_CHANNELS
    widths = (16, 32, 48, 48) if sd3 else (16, 32, 48)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        block_out_channels=widths,
        layers_per_block=1,
        latent_channels=latent_channels,
        norm_num_groups=8,
        sample_size=64,
        use_quant_conv=not sd3,
        use_post_quant_conv=not sd3,
        shift_factor=0.0 if sd3 else None,  # a number here says that there is one; training sets it
    )


@torch.no_grad()
def grow(vae: AutoencoderKL, smaller: AutoencoderKL) -> int:
    """Copies every weight of a VAE with one halving fewer into `vae` that fits there; how many tensors."""
    own, copied = vae.state_dict(), 0
    for name, value in smaller.state_dict().items():
        head, up, rest = name.partition("decoder.up_blocks.")
        if up:  # they are counted from the latent on, where the new one is
            number, _, rest = rest.partition(".")
            name = f"{head}{up}{int(number) + 1}.{rest}"
        if name in own and own[name].shape == value.shape:
            own[name].copy_(value)
            copied += 1
    return copied


def pictures(count: int, seed: int) -> torch.Tensor:
    """uint8 [count, 3, 64, 64]: freshly drawn training scenes."""
    rng = random.Random(seed)
    drawn = [np.asarray(render(scene, rng)) for scene in sample_scenes("train", count, seed)]
    return torch.from_numpy(np.stack(drawn)).permute(0, 3, 1, 2).contiguous()


def loss(vae: AutoencoderKL, x: torch.Tensor) -> torch.Tensor:
    """Reconstruction and KL of `x` in [-1, 1], [B, 3, H, W]."""
    with torch.set_grad_enabled(next(vae.encoder.parameters()).requires_grad):
        posterior = vae.encode(x).latent_dist
    y = vae.decode(posterior.sample()).sample
    # the squared term punishes the few wrong edge pixels that decide an outline, the absolute one keeps flats flat
    return F.l1_loss(y, x) + 2 * F.mse_loss(y, x) + KL_WEIGHT * posterior.kl().mean()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--init", type=Path, help="folder of a VAE to go on with")
    source.add_argument("--grow", type=Path, help="folder of a VAE with one halving fewer, to start from")
    parser.add_argument("--decoder-only", action="store_true", help="leave encoder and latents as they are")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--latent-channels", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    fresh = not args.init
    vae = build_vae(args.latent_channels) if fresh else AutoencoderKL.from_pretrained(args.init, dtype=torch.float32)
    if args.grow:
        print(f"{grow(vae, AutoencoderKL.from_pretrained(args.grow, dtype=torch.float32))} tensors of {args.grow}")
    vae = vae.to(args.device, memory_format=torch.channels_last)
    if args.decoder_only:
        vae.encoder.requires_grad_(False)
        if vae.quant_conv is not None:
            vae.quant_conv.requires_grad_(False)
    ema = copy.deepcopy(vae).requires_grad_(False)
    print(f"{sum(p.numel() for p in vae.parameters()) / 1e6:.3f}M parameters", flush=True)
    optimizer = torch.optim.AdamW(
        [p for p in vae.parameters() if p.requires_grad], lr=args.lr, betas=(0.9, 0.99), weight_decay=1e-4
    )
    start = time.time()
    for step in range(args.steps):
        x = pictures(args.batch, args.seed + 1 + step).to(args.device).float().div(127.5).sub(1)
        optimizer.param_groups[0]["lr"] = cosine_lr(args.lr, step, args.steps, warmup=100)
        value = loss(vae, x.contiguous(memory_format=torch.channels_last))
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        update_ema(ema.state_dict(), vae, min(0.998, (1 + step) / (10 + step)))
        if step % 100 == 99:
            print(f"step {step + 1} loss {value.item():.4f} {time.time() - start:.0f} s", flush=True)
        if step % 500 == 499 or step + 1 == args.steps:
            if not args.decoder_only:
                _set_scaling(ema, args.device)
            save_atomically(ema, args.out)


@torch.no_grad()
def _set_scaling(vae: AutoencoderKL, device: str) -> None:
    x = pictures(512, seed=999).to(device).float().div(127.5).sub(1)
    latents = torch.cat([vae.encode(part).latent_dist.mean for part in x.split(64)])
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 5))
    if vae.config.shift_factor is not None:
        vae.register_to_config(shift_factor=round(latents.mean().item(), 5))
    print("channel mean", latents.mean((0, 2, 3)).tolist(), "std", latents.std((0, 2, 3)).tolist(), flush=True)


if __name__ == "__main__":
    main()
