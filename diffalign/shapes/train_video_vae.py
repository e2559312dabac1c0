r"""Trains the autoencoder of tiny-video: clips of 9 frames of 64 pixels to 3 x 8 x 8 x 16 latents.

    python -m diffalign.shapes.train_video_vae --out runs/tiny-video-vae-1 --frames 1 --batch 16 --steps 700 --bf16
    python -m diffalign.shapes.train_video_vae --init runs/tiny-video-vae-1 --out runs/tiny-video-vae-2 --frames 1 \
        --batch 16 --decoder --lr 1.5e-3 --steps 1200 --bf16
    python -m diffalign.shapes.train_video_vae --init runs/tiny-video-vae-2 --out runs/tiny-video-vae --decoder \
        --lr 1e-3 --bf16

First pictures, which are clips of one frame to a causal VAE and cost a ninth, then clips. Begun as it is
(`tiny_video.start_on_pictures`), the encoder of pictures keeps one picture in four, and the decoder alone has to learn
what was between: the latents stay as they are, and a transformer can learn on them meanwhile. The loss is that of
`train_vae`; what is saved has the mean and deviation of each channel of its latents, as Wan's has. A file beside it
(OUT.state.pt) continues a killed run where it stopped.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from torch import Tensor

from diffalign.seeds import mix
from diffalign.shapes.clips import one_frame, render_clip
from diffalign.shapes.motion import sample_moving
from diffalign.shapes.tiny_video import FRAMES, build_vae
from diffalign.shapes.train_common import Learner, half_precision, learn, save_atomically

KL_WEIGHT = 5e-7  # per clip and frame, see `train_vae`


def clips(count: int, frames: int, seed: int) -> Tensor:
    """fp32 [count, 3, frames, 64, 64] in [-1, 1]: freshly drawn training clips, or a frame of each."""
    rng = random.Random(seed)
    drawn = [render_clip(moving, rng, FRAMES) for moving in sample_moving("train", count, seed)]
    if frames == 1:
        drawn = [one_frame(clip, rng) for clip in drawn]
    return torch.from_numpy(np.stack(drawn)).permute(0, 4, 1, 2, 3).float().div(127.5).sub(1).contiguous()


def loss(vae: AutoencoderKLWan, x: Tensor) -> Tensor:
    """Reconstruction and KL of clips in [-1, 1]."""
    with torch.set_grad_enabled(any(weight.requires_grad for weight in vae.encoder.parameters())):
        posterior = vae.encode(x).latent_dist
    y = vae.decode(posterior.sample()).sample
    kl = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).sum() / (len(x) * x.shape[2])
    return F.l1_loss(y, x) + 2 * F.mse_loss(y, x) + KL_WEIGHT * kl


def channels_last(vae: AutoencoderKLWan) -> AutoencoderKLWan:
    """In place, kernels of two and of three dimensions: a quarter to a half faster on CPUs, the same values."""
    layouts = {4: torch.channels_last, 5: torch.channels_last_3d}
    for weight in vae.parameters():
        if layout := layouts.get(weight.dim()):
            weight.data = weight.data.contiguous(memory_format=layout)
    return vae


class Trainer:
    """A VAE that learns; one `step` at a time, which follows from (seed, step)."""

    def __init__(self, vae: AutoencoderKLWan, args: argparse.Namespace) -> None:
        self.args, self.vae = args, channels_last(vae.to(args.device))
        self.learner = Learner(self.vae, args, weight_decay=1e-4, warmup=100)

    def step(self) -> float:
        """One optimizer step; the loss."""
        done = self.learner.done
        torch.manual_seed(mix(self.args.seed, done))  # of the posterior's draw
        x = clips(self.args.batch, self.args.frames, mix(self.args.seed, done, 1) % 2**31)
        with half_precision(self.args):
            value = loss(self.vae, x.to(self.args.device, memory_format=torch.channels_last_3d))
        self.learner.update(value)
        return value.item()

    def save(self) -> None:
        with self.learner.averaged():
            if not self.args.decoder:
                set_scales(self.vae, self.args)
            save_atomically(self.vae, self.args.out)
        self.learner.save_state()


@torch.no_grad()
def set_scales(vae: AutoencoderKLWan, args: argparse.Namespace) -> None:
    """Mean and deviation of each channel, over training clips."""
    x = clips(128, args.frames, seed=999).to(args.device)
    codes = torch.cat([vae.encode(part).latent_dist.mean for part in x.split(16)])
    over = (0, 2, 3, 4)
    vae.register_to_config(latents_mean=[round(value, 4) for value in codes.mean(over).tolist()],
                           latents_std=[round(value, 4) for value in codes.std(over).tolist()])  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--init", type=Path, help="folder of a VAE to go on with")
    parser.add_argument("--frames", type=int, choices=(1, FRAMES), default=FRAMES)
    parser.add_argument("--decoder", action="store_true", help="the encoder and its scales stay as they are")
    parser.add_argument("--steps", type=int, default=700)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--ema", type=float, default=0.998)
    parser.add_argument("--save-every", type=int, default=100)
    parser.add_argument("--bf16", action="store_true", help="autocast, worth it on CPUs with AMX and on GPUs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    vae = AutoencoderKLWan.from_pretrained(args.init, torch_dtype=torch.float32) if args.init else build_vae()
    if args.decoder:
        vae.encoder.requires_grad_(False), vae.quant_conv.requires_grad_(False)
    trainer = Trainer(vae, args)
    trainer.learner.resume()
    print(f"{sum(p.numel() for p in vae.parameters()) / 1e6:.3f}M parameters", flush=True)
    learn(trainer.learner, trainer.step, trainer.save)


if __name__ == "__main__":
    main()
