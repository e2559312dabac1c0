"""Trains the small text-to-image models that ship: network and text encoders together, on a trained VAE.

    python -m diffalign.shapes.train_vae --out runs/tiny-vae
    python -m diffalign.shapes.train --model tiny-sd --vae runs/tiny-vae --out runs/tiny-sd --steps 8000
    python -m diffalign.shapes.train --init assets/tiny-sd --out runs/tiny-sd --steps 4000        # goes on from weights

With `--text` the text encoders are those of another folder and stay as they are.

What is saved is a stock diffusers folder with the averaged weights; a file beside it (OUT.state.pt) continues a killed
run where it stopped (same command again). Every --eval-every steps the validation pass rate is printed, drawn with the
stock pipeline's defaults except 20 steps.
"""

from __future__ import annotations

import argparse
import contextlib
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from diffalign.pipelines import PIPELINES, load_pipeline
from diffalign.pipelines.base import LatentPipeline
from diffalign.process import NoiseProcess, VariancePreserving, per_sample, target
from diffalign.shapes import tiny_sd, tiny_sd3, tiny_sdxl
from diffalign.shapes.grammar import Scene, sample_scenes
from diffalign.shapes.rates import pass_rates
from diffalign.shapes.render import render
from diffalign.shapes.train_common import Halved, Learner, learn, save_atomically
from diffalign.shapes.train_text import after_end, side_reader, sides, sides_known, sides_loss, teach_sides
from diffalign.table import resolve

MODELS: dict[str, Callable[[AutoencoderKL], Any]] = {
    "tiny-sd": tiny_sd.build,
    "tiny-sdxl": tiny_sdxl.build,
    "tiny-sd3": tiny_sd3.build,
}
PROMPT_DROPOUT = 0.1
NOISY_SHARE, NOISY_FROM = 0.5, 0.75  # of a batch, drawn from the noisiest quarter of the times only
UNIFORM_SHARE = 0.2  # of a flow's times
MAX_WEIGHT = 100.0
SIDES_WEIGHT = 0.1
T5_LENGTHS = 16, 256  # tokens; a model that was trained with one length only fails at every other
SHORT_SHARE, CLIP_TOKENS = 0.9, (24, 77)  # of the steps, with next to no padding: much faster, and CLIP is causal


def draw_times(process: NoiseProcess, count: int, generator: torch.Generator) -> Tensor:
    """Training times [count]: many of them in the noisiest part, the others all over.

    Where an object goes is decided in the noisiest part, in a few of the times and with next to no epsilon error: with
    uniform times and no weight the relation of two objects stayed at chance for 8,000 steps. A flow's own distribution
    leans there by itself, so much that only 1.4 % of its times are below 0.25: a fifth is uniform.
    """
    own, u = process.training_times(count, generator), torch.rand(count, generator=generator)
    if not isinstance(process, VariancePreserving):
        return torch.where(u < UNIFORM_SHARE, torch.rand(count, generator=generator), own)
    return torch.where(u < NOISY_SHARE, process.training_times(count, generator, low=NOISY_FROM), own)


def weight(process: NoiseProcess, t: Tensor) -> Tensor:
    """[count]: of a diffusion model 1 / alpha^2, which makes the error of epsilon that of v.

    As it is at low noise, where outlines are drawn (min-SNR takes weight from there, and they stayed round), and large
    at high noise, where epsilon is known well whatever is drawn.
    """
    alpha, _ = process.coefficients(t)
    return alpha.square().reciprocal().clamp(max=MAX_WEIGHT) if isinstance(process, VariancePreserving) else 0 * t + 1


@torch.no_grad()
def latent_pool(pipe: LatentPipeline, scenes: list[Scene], seed: int) -> Tensor:
    """One freshly drawn picture per scene as latents [N, C, 16, 16]."""
    rng = random.Random(seed)
    parts = []
    for start in range(0, len(scenes), 128):
        drawn = np.stack([np.asarray(render(scene, rng)) for scene in scenes[start : start + 128]])
        pixels = torch.from_numpy(drawn).permute(0, 3, 1, 2).float().div(255)
        parts.append(pipe.encode(pixels)[0])
    return torch.cat(parts).contiguous()


class Trainer:
    """A pipeline whose network and text encoders learn, and the pool that they learn from; one `step` at a time."""

    def __init__(self, pipe: LatentPipeline, args: argparse.Namespace) -> None:
        self.args, self.pipe = args, pipe
        texts = nn.ModuleDict(text_encoders(pipe.stock))
        self.modules = nn.ModuleDict({pipe.lora_prefix: pipe.network, **texts}).train().requires_grad_(True)
        texts.requires_grad_(not args.text)
        if pipe.lora_prefix == "unet":
            pipe.network.to(memory_format=torch.channels_last)
        torch.manual_seed(args.seed)
        self.reader = side_reader(pipe.encode_prompts([""])["prompt_embeds"].shape[-1]).to(args.device)
        self.learner = Learner(self.modules, args, beside=self.reader, weight_decay=1e-2, warmup=200)
        self.pool_seed = -1

    def refresh_pool(self, seed: int) -> None:
        """Draws the pool of `args.pool` pictures again, so that no picture is seen more than a few times."""
        self.scenes = sample_scenes("train", self.args.pool, seed)
        self.latents = latent_pool(self.pipe, self.scenes, seed)
        self.sides = sides(self.scenes).to(self.args.device)
        self.pool_seed = seed

    def step(self) -> float:
        """One optimizer step; everything random follows from (seed, step), so a resumed run repeats it."""
        g = torch.Generator().manual_seed(self.args.seed * 1_000_003 + self.learner.done)
        n, device, process = self.args.batch, self.args.device, self.pipe.process
        if (seed := self.args.seed + self.learner.done // self.args.pool_steps) != self.pool_seed:
            self.refresh_pool(seed)
        pick = torch.randint(len(self.latents), (n,), generator=g)
        x0 = self.latents[pick.to(device)]
        eps = torch.randn(x0.shape, generator=g).to(device)
        t = draw_times(process, n, g).to(device)
        dropped = torch.rand(n, generator=g) < PROMPT_DROPOUT
        _set_text_lengths(self.pipe, g)
        prompts = ["" if drop else str(self.scenes[i]) for i, drop in zip(pick.tolist(), dropped.tolist(), strict=True)]
        condition = self.pipe.encode_prompts(prompts)
        said = self.pipe.predict(process.add_noise(x0, eps, t), t, condition)
        y = target(self.pipe.parametrization, x0, eps, *process.coefficients(t))
        error = (per_sample(weight(process, t), y) * (said - y).square()).mean()
        asked = after_end(self.pipe.stock, prompts).to(device) & ~dropped.to(device)[:, None]
        read = sides_loss(self.reader, condition["prompt_embeds"][:, : asked.shape[1]], asked, self.sides[pick])
        self.learner.update(error + SIDES_WEIGHT * read)
        return error.item()

    def teach(self, steps: int) -> None:
        """Before the first step: what the text encoders then have to keep."""
        if hasattr(self.pipe, "max_sequence_length"):
            self.pipe.max_sequence_length = T5_LENGTHS[0]  # it is not asked
        texts = list(text_encoders(self.pipe.stock).values())
        teach_sides(self.pipe, texts, self.reader, steps, seed=self.args.seed)
        self.learner.restart_average()

    @contextlib.contextmanager
    def averaged(self) -> Iterator[LatentPipeline]:
        """The pipeline with the averaged weights in it, as it ships."""
        if hasattr(self.pipe, "max_sequence_length"):
            self.pipe.max_sequence_length, self.pipe.stock.tokenizer_max_length = T5_LENGTHS[1], CLIP_TOKENS[1]
        with self.learner.averaged():
            yield self.pipe

    def save(self) -> None:
        with self.averaged() as pipe:
            save_atomically(Halved(pipe), self.args.out)
        self.learner.save_state()

    def report(self) -> None:
        """Prints what the averaged weights draw of validation captions."""
        with self.averaged() as pipe:
            rates = pass_rates(pipe.stock, sample_scenes("validation", 192, seed=1))
            known = sides_known(pipe, self.reader)
        said = {name: round(rate, 3) for name, rate in rates.items()}
        print(f"step {self.learner.done} validation {said}, sides known {known:.3f}", flush=True)


def text_encoders(stock: Any) -> dict[str, nn.Module]:
    """All that a stock pipeline has, by name."""
    return {name: part for name, part in sorted(stock.components.items()) if name.startswith("text_encoder")}


def _set_text_lengths(pipe: LatentPipeline, generator: torch.Generator) -> None:
    """Draws how many tokens T5's and CLIP's are padded to, for a pipeline that has a T5."""
    if not hasattr(pipe, "max_sequence_length"):
        return
    low, high = np.log2(T5_LENGTHS)
    padded = torch.rand((), generator=generator).item() >= SHORT_SHARE
    longer = torch.rand((), generator=generator).item() if padded else 0.0
    pipe.max_sequence_length = round(2 ** (low + (high - low) * longer))
    pipe.stock.tokenizer_max_length = CLIP_TOKENS[padded]


def initial_pipeline(args: argparse.Namespace) -> LatentPipeline:
    """From a folder to go on with, or from scratch around a trained VAE; with the text encoders of `args.text`."""
    pipe = load_pipeline(args.init, device=args.device) if args.init else _built(args)
    if args.text:
        taught = text_encoders(load_pipeline(args.text).stock)
        for name, part in text_encoders(pipe.stock).items():
            part.load_state_dict(taught[name].state_dict())
    return pipe


def _built(args: argparse.Namespace) -> LatentPipeline:
    torch.manual_seed(args.seed)
    stock = MODELS[args.model](AutoencoderKL.from_pretrained(args.vae, dtype=torch.float32))
    family: type[Any] = resolve(PIPELINES, type(stock).__name__, "model family")
    pipe: LatentPipeline = family(stock.to(args.device), args.model)
    return pipe


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="tiny-sd", help="what to build from scratch")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--vae", type=Path, help="folder of the trained VAE: starts from scratch")
    source.add_argument("--init", type=Path, help="pipeline folder to go on with")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--text", type=Path, help="pipeline folder whose text encoders are used as they are")
    parser.add_argument("--teach-text", type=int, metavar="STEPS", default=1000, help="of the text encoders, first")
    parser.add_argument("--steps", type=int, default=8000)
    parser.add_argument("--stop-at", type=int, help="end before --steps, which the learning rate is planned for")
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
    if not trainer.learner.resume() and not args.text:
        trainer.teach(args.teach_text)
        known = sides_known(trainer.pipe, trainer.reader)
        print(f"text taught for {args.teach_text} steps: all sides of a validation caption known in {known:.1%}",
              flush=True)  # fmt: skip
    sizes = {name: sum(p.numel() for p in module.parameters()) / 1e6 for name, module in trainer.modules.items()}
    print(", ".join(f"{name} {size:.2f}M" for name, size in sizes.items()), flush=True)
    learn(trainer.learner, trainer.step, trainer.save, trainer.report, args.stop_at)


if __name__ == "__main__":
    main()
