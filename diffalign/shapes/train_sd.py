"""Trains assets/tiny-sd from scratch on the shapes world: U-Net and text encoder together, on a trained VAE.

    python -m diffalign.shapes.train_vae --out runs/tiny-vae
    python -m diffalign.shapes.train_sd --vae runs/tiny-vae --out runs/tiny-sd --steps 8000
    python -m diffalign.shapes.train_sd --init assets/tiny-sd --out runs/tiny-sd --steps 4000     # goes on from weights

What is saved is a stock StableDiffusionPipeline folder with the averaged weights; state.pt beside it continues a killed
run where it stopped (same command again). Every --eval-every steps the validation pass rate is printed, drawn with the
stock pipeline's defaults except 20 steps.
"""

from __future__ import annotations

import argparse
import copy
import os
import random
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from torch import Tensor

from diffalign.shapes.grammar import Scene, sample_scenes
from diffalign.shapes.render import render
from diffalign.shapes.tiny_sd import TinySD, assemble, build_text_encoder, build_tokenizer, build_unet
from diffalign.shapes.train_common import cosine_lr, save_atomically, update_ema
from diffalign.shapes.train_text import after_end, side_reader, sides, sides_known, sides_loss, teach_sides, tokens
from diffalign.shapes.verify import verify

PROMPT_DROPOUT = 0.1
NOISY_SHARE, NOISY_FROM = 0.5, 0.75  # of a batch, drawn from the noisiest quarter of the times only
MAX_WEIGHT = 100.0
SIDES_WEIGHT = 0.1


def draw_times(count: int, steps: int, generator: torch.Generator) -> Tensor:
    """Training times [count], of which `NOISY_SHARE` lie in the noisiest part.

    Where an object goes is decided there, in a few of the times and with next to no epsilon error: with uniform times
    and no weight the relation of two objects stayed at chance for 8,000 steps.
    """
    t = torch.randint(steps, (count,), generator=generator)
    noisy = torch.randint(int(NOISY_FROM * steps), steps, (count,), generator=generator)
    return torch.where(torch.rand(count, generator=generator) < NOISY_SHARE, noisy, t)


@torch.no_grad()
def latent_pool(vae: AutoencoderKL, scenes: list[Scene], seed: int, device: str) -> Tensor:
    """One freshly drawn picture per scene as scaled latents [N, 4, 16, 16]."""
    rng = random.Random(seed)
    parts = []
    for start in range(0, len(scenes), 128):
        drawn = np.stack([np.asarray(render(scene, rng)) for scene in scenes[start : start + 128]])
        x = torch.from_numpy(drawn).permute(0, 3, 1, 2).float().div(127.5).sub(1).to(device)
        x = x.contiguous(memory_format=torch.channels_last)
        parts.append(vae.encode(x).latent_dist.mean * vae.config.scaling_factor)
    return torch.cat(parts).contiguous()


@torch.no_grad()
def pass_rates(pipe: StableDiffusionPipeline, scenes: list[Scene], seed: int = 0, batch: int = 64) -> dict[str, float]:
    """Share of pictures that the verifier accepts, per category and in all, with the stock defaults except 20 steps."""
    pipe.set_progress_bar_config(disable=True)
    device = pipe.unet.device
    hits: dict[str, list[bool]] = defaultdict(list)
    for start in range(0, len(scenes), batch):
        part = scenes[start : start + batch]
        generators = [torch.Generator(device).manual_seed(seed + start + i) for i in range(len(part))]
        images = pipe([str(s) for s in part], num_inference_steps=20, generator=generators, output_type="np").images
        for scene, image in zip(part, images, strict=True):
            ok = verify((image * 255).round().astype(np.uint8), scene).ok
            hits[scene.category].append(ok)
            hits["all"].append(ok)
    return {name: sum(found) / len(found) for name, found in sorted(hits.items())}


class Trainer:
    """Policy, averaged copy, optimizer and the pool of latents; one `step` at a time."""

    def __init__(self, pipe: StableDiffusionPipeline, args: argparse.Namespace) -> None:
        self.args = args
        self.pipe = pipe
        self.tokenizer = pipe.tokenizer
        self.unet = pipe.unet.to(args.device, memory_format=torch.channels_last).train()
        self.text = pipe.text_encoder.to(args.device).train()
        self.vae = pipe.vae.to(args.device).eval().requires_grad_(False)
        self.ema_unet, self.ema_text = (copy.deepcopy(m).requires_grad_(False) for m in (self.unet, self.text))
        torch.manual_seed(args.seed)
        self.reader = side_reader(self.text.config.hidden_size).to(args.device)
        self.parameters = [*self.unet.parameters(), *self.text.parameters(), *self.reader.parameters()]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=args.lr, betas=(0.9, 0.99), weight_decay=1e-2)
        alphas = pipe.scheduler.alphas_cumprod.to(args.device)
        self.alpha, self.sigma = alphas.sqrt(), (1 - alphas).sqrt()
        # 1 / alpha^2 makes it the error of v: as it is at low noise, where outlines are drawn (min-SNR takes weight
        # from there, and they stayed round), and large at high noise, where epsilon is known well whatever is drawn
        self.weight = (1 / alphas).clamp(max=MAX_WEIGHT)
        self.done = 0
        self.pool_seed = -1

    def refresh_pool(self, seed: int) -> None:
        """Draws the pool of `args.pool` pictures again, so that no picture is seen more than a few times."""
        scenes = sample_scenes("train", self.args.pool, seed)
        self.pool = latent_pool(self.vae, scenes, seed, self.args.device)
        self.ids = tokens(self.tokenizer, [*map(str, scenes), ""]).to(self.args.device)
        self.sides = sides(scenes).to(self.args.device)
        self.pool_seed = seed

    def step(self) -> float:
        """One optimizer step; everything random follows from (seed, step), so a resumed run repeats it."""
        g = torch.Generator().manual_seed(self.args.seed * 1_000_003 + self.done)
        n, device = self.args.batch, self.args.device
        if (seed := self.args.seed + self.done // self.args.pool_steps) != self.pool_seed:
            self.refresh_pool(seed)
        pick = torch.randint(len(self.pool), (n,), generator=g)
        eps = torch.randn(n, *self.pool.shape[1:], generator=g).to(device)
        t = draw_times(n, len(self.alpha), g).to(device)
        dropped = torch.rand(n, generator=g) < PROMPT_DROPOUT
        ids = self.ids[torch.where(dropped, len(self.ids) - 1, pick)]
        x0 = self.pool[pick]
        x_t = self.alpha[t].view(-1, 1, 1, 1) * x0 + self.sigma[t].view(-1, 1, 1, 1) * eps
        x_t = x_t.contiguous(memory_format=torch.channels_last)
        hidden = self.text(ids).last_hidden_state
        error = (self.unet(x_t, t, hidden).sample - eps).square().mean(dim=(1, 2, 3))
        asked = after_end(ids, self.text.config.eos_token_id) & ~dropped.to(device)[:, None]
        read = sides_loss(self.reader, hidden, asked, self.sides[pick])
        value = (error * self.weight[t]).mean() + SIDES_WEIGHT * read
        self.optimizer.param_groups[0]["lr"] = cosine_lr(self.args.lr, self.done, self.args.steps, warmup=200)
        self.optimizer.zero_grad(set_to_none=True)
        value.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.done += 1
        decay = min(self.args.ema, (1 + self.done) / (10 + self.done))
        update_ema(self.ema_unet, self.unet, decay)
        update_ema(self.ema_text, self.text, decay)
        return value.item()

    def teach(self, steps: int) -> None:
        """Before the first step: what the text encoder then has to keep."""
        teach_sides(self.text, self.reader, self.tokenizer, steps, seed=self.args.seed)
        self.ema_text.load_state_dict(self.text.state_dict())

    def averaged(self) -> StableDiffusionPipeline:
        """The stock pipeline with the averaged weights (copies: saving converts dtypes in place)."""
        vae, text, unet = (copy.deepcopy(m).eval() for m in (self.vae, self.ema_text, self.ema_unet))
        return assemble(vae, text, self.tokenizer, unet)

    def save(self) -> None:
        save_atomically(TinySD(self.averaged()), self.args.out)
        modules = (self.unet, self.text, self.reader, self.ema_unet, self.ema_text, self.optimizer)
        state = {"done": self.done, "modules": [m.state_dict() for m in modules]}
        file = state_file(self.args.out)
        torch.save(state, file.with_suffix(".partial"))
        os.replace(file.with_suffix(".partial"), file)

    def resume(self) -> bool:
        """True when there was a state to go on from."""
        file = state_file(self.args.out)
        if not file.exists():
            return False
        state = torch.load(file, map_location=self.args.device, weights_only=True)
        modules = (self.unet, self.text, self.reader, self.ema_unet, self.ema_text, self.optimizer)
        for module, saved in zip(modules, state["modules"], strict=True):
            module.load_state_dict(saved)
        self.done = state["done"]
        print(f"resumed at step {self.done}", flush=True)
        return True


def state_file(out: Path) -> Path:
    """What a killed run goes on from, beside the folder that it saves."""
    return out.with_name(out.name + ".state.pt")


def initial_pipeline(args: argparse.Namespace) -> StableDiffusionPipeline:
    """From a folder to go on with, or from scratch around a trained VAE."""
    if args.init:
        return StableDiffusionPipeline.from_pretrained(args.init, dtype=torch.float32)
    torch.manual_seed(args.seed)
    tokenizer = build_tokenizer()
    vae = AutoencoderKL.from_pretrained(args.vae, dtype=torch.float32)
    return assemble(vae, build_text_encoder(tokenizer), tokenizer, build_unet())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--vae", type=Path, help="folder of the trained VAE: starts from scratch")
    source.add_argument("--init", type=Path, help="pipeline folder to go on with")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--teach-text", type=int, metavar="STEPS", default=1000, help="of the text encoder, first")
    parser.add_argument("--steps", type=int, default=8000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--ema", type=float, default=0.999)
    parser.add_argument("--pool", type=int, default=24_000, help="pictures drawn at a time")
    parser.add_argument("--pool-steps", type=int, default=1500, help="steps between two drawings of the pool")
    parser.add_argument("--eval-every", type=int, default=1000)
    parser.add_argument("--save-every", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()

    trainer = Trainer(initial_pipeline(args), args)
    if not trainer.resume():
        trainer.teach(args.teach_text)
        print(f"text encoder taught for {args.teach_text} steps: all sides of a validation caption known in "
              f"{sides_known(trainer.text, trainer.reader, trainer.tokenizer):.1%}", flush=True)  # fmt: skip
    print(f"unet {sum(p.numel() for p in trainer.unet.parameters()) / 1e6:.2f}M, "
          f"text {sum(p.numel() for p in trainer.text.parameters()) / 1e6:.2f}M", flush=True)  # fmt: skip
    start, first, losses = time.time(), trainer.done, []
    while trainer.done < args.steps:
        losses.append(trainer.step())
        done = trainer.done
        if done % 100 == 0:
            pace = (time.time() - start) / (done - first)
            print(f"step {done} loss {np.mean(losses[-100:]):.4f} {pace:.3f} s/step", flush=True)
        if done % args.save_every == 0 or done == args.steps:
            trainer.save()
        if done % args.eval_every == 0 or done == args.steps:
            rates = pass_rates(trainer.averaged().to(args.device), sample_scenes("validation", 192, seed=1))
            known = sides_known(trainer.ema_text, trainer.reader, trainer.tokenizer)
            print(f"step {done} validation { ({k: round(v, 3) for k, v in rates.items()}) }, "
                  f"sides known {known:.3f}", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
