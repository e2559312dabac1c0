r"""Trains tiny-video, the small text-to-video model: transformer and text encoder together, on a trained VAE.

    python -m diffalign.shapes.train_video_vae ...                                # first, see there
    python -m diffalign.shapes.train_video --vae runs/tiny-video-vae --out runs/tiny-video-1 --frames 1 --steps 8000 \
        --batch 48 --lr 2.5e-3 --bf16 --compile
    python -m diffalign.shapes.train_video --init runs/tiny-video-1 --out runs/tiny-video --steps 4000 --bf16 --compile
    python -m diffalign.shapes.train_video --init assets/tiny-video --out runs/tiny-video --steps 3000

First single frames, from which it learns what things look like at a third of the cost, then clips. What is saved is a
stock WanPipeline folder with the averaged weights; a file beside it (OUT.state.pt) continues a killed run where it
stopped. Every --eval-every steps the validation pass rate is printed, of clips that are drawn in 20 steps with a
guidance of 2.5: the stock pipeline's 5 exaggerates outlines until a triangle has hollow sides and is none any more.
"""

from __future__ import annotations

import argparse
import contextlib
import random
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from torch import Tensor, nn

from diffalign.pipelines.wan import Wan
from diffalign.process import target
from diffalign.sampling import ddim_stepper, draw, guided, sample
from diffalign.seeds import mix
from diffalign.shapes import tiny_video
from diffalign.shapes.clips import Clip, one_frame, render_clip
from diffalign.shapes.grammar import COLORS, RELATIONS, SHAPES
from diffalign.shapes.motion import DIRECTIONS, SPEEDS, MovingScene, sample_moving
from diffalign.shapes.tiny_video import FRAMES, SIDE, TEXT_WIDTH
from diffalign.shapes.train import PROMPT_DROPOUT, draw_times
from diffalign.shapes.train_common import Halved, Learner, cosine_lr, half_precision, learn, save_atomically
from diffalign.shapes.verify_clip import verify_clip

FACTS_WEIGHT = 0.1
SHORT, SHORT_SHARE = 16, 0.97  # tokens of most steps; the others have up to the stock pipeline's number of them
GUIDANCE, STEPS = 2.5, 20  # of validation clips
# what a caption says, each as one of so many: the mover, the other one or none, its relation, ways, speed
CHOICES = (len(COLORS), len(SHAPES), 1 + len(COLORS), 1 + len(SHAPES), 1 + len(RELATIONS), 1 + len(DIRECTIONS),
           1 + len(DIRECTIONS), 1 + len(SPEEDS))  # fmt: skip


def facts(several: Sequence[MovingScene]) -> Tensor:
    """int64 [N, 8]: what captions say, see `CHOICES`; 0 is none where there may be none."""
    rows = []
    for moving in several:
        *others, mover = moving.scene.things
        other, (first, second) = others[0] if others else None, moving.motion.ways
        rows.append([
            COLORS.index(mover.color), SHAPES.index(mover.shape),
            1 + COLORS.index(other.color) if other else 0, 1 + SHAPES.index(other.shape) if other else 0,
            _place(moving.scene.relation, RELATIONS), _place(first, tuple(DIRECTIONS)),
            _place(second, tuple(DIRECTIONS)), _place(moving.motion.speed, SPEEDS),
        ])  # fmt: skip
    return torch.tensor(rows)


def _place(word: str | None, known: Sequence[str]) -> int:
    return 0 if word is None else 1 + known.index(word)


@torch.no_grad()
def latent_pool(pipe: Wan, several: Sequence[MovingScene], seed: int, frames: int = FRAMES) -> Tensor:
    """One freshly drawn clip per caption as latents [N, 16, 3, 8, 8], or one frame of it, [N, 16, 1, 8, 8]."""
    rng, parts = random.Random(seed), []
    for start in range(0, len(several), 32):
        clips = [render_clip(moving, rng, FRAMES) for moving in several[start : start + 32]]
        drawn = np.stack([one_frame(clip, rng) for clip in clips] if frames == 1 else clips)
        pixels = torch.from_numpy(drawn).permute(0, 1, 4, 2, 3).float().div(255)
        parts.append(pipe.encode(pixels)[0])
    return torch.cat(parts).contiguous()


@torch.no_grad()
def drawn(
    pipe: Wan, captions: Sequence[str], seed: int, frames: int = FRAMES, steps: int = STEPS, batch: int = 32
) -> Iterator[Clip]:
    """A clip for each caption, uint8 [frames, 64, 64, 3]."""
    times, device = pipe.times(steps), next(pipe.network.parameters()).device
    for start in range(0, len(captions), batch):
        some = list(captions[start : start + batch])
        generators = [torch.Generator().manual_seed(mix(seed, start + row)) for row in range(len(some))]
        noise = draw(pipe.latent_shape(SIDE, SIDE, frames), generators).to(device)
        policy = guided(pipe.predict, pipe.encode_prompts([""] * len(some)), GUIDANCE)
        step = ddim_stepper(policy, pipe.process, pipe.parametrization, pipe.encode_prompts(some))
        pixels = pipe.decode(sample(step, noise, times.to(device)).x).clamp(0, 1)
        yield from (pixels * 255).round().byte().permute(0, 1, 3, 4, 2).cpu().numpy()


class Trainer:
    """A pipeline whose transformer and text encoder learn; one `step` at a time, which follows from (seed, step)."""

    def __init__(self, pipe: Wan, args: argparse.Namespace) -> None:
        self.args, self.pipe = args, pipe
        torch.manual_seed(args.seed)
        self.reader = nn.Linear(TEXT_WIDTH, sum(CHOICES)).to(args.device)
        parts = {"transformer": pipe.network, "text_encoder": pipe.stock.text_encoder}
        self.modules = nn.ModuleDict(parts).train().requires_grad_(True)
        self.learner = Learner(self.modules, args, beside=self.reader, weight_decay=1e-2, warmup=200)
        self.pool_seed = -1
        if args.bf16:
            pipe.network.set_attention_backend("_native_math")  # fused attention has no fast gradient in bf16 on CPUs
        if args.compile:
            for block in pipe.network.blocks:
                block.compile()

    def refresh_pool(self, seed: int) -> None:
        """Draws the pool of `args.pool` clips again."""
        self.scenes = sample_moving("train", self.args.pool, seed)
        self.latents = latent_pool(self.pipe, self.scenes, seed, self.args.frames).to(self.args.device)
        self.facts = facts(self.scenes).to(self.args.device)
        self.pool_seed = seed

    def step(self) -> float:
        """One optimizer step; the error of the velocity."""
        g = torch.Generator().manual_seed(mix(self.args.seed, self.learner.done))
        n, device, process = self.args.batch, self.args.device, self.pipe.process
        if (seed := self.args.seed + self.learner.done // self.args.pool_steps) != self.pool_seed:
            self.refresh_pool(seed)
        pick = torch.randint(len(self.latents), (n,), generator=g)
        x0 = self.latents[pick.to(device)]
        eps, t = torch.randn(x0.shape, generator=g).to(device), draw_times(process, n, g).to(device)
        dropped = torch.rand(n, generator=g) < PROMPT_DROPOUT
        self.pipe.max_sequence_length = _tokens(g)
        prompts = ["" if drop else str(self.scenes[i]) for i, drop in zip(pick.tolist(), dropped.tolist(), strict=True)]
        condition = self.pipe.encode_prompts(prompts)
        with half_precision(self.args):
            said = self.pipe.predict(process.add_noise(x0, eps, t), t, condition).float()
        y = target(self.pipe.parametrization, x0, eps, *process.coefficients(t))
        error = (said - y).square().mean()
        read = facts_loss(self.reader, condition["prompt_embeds"][~dropped], self.facts[pick[~dropped]])
        self.learner.update(error + FACTS_WEIGHT * read)
        return error.item()

    def teach(self, steps: int) -> None:
        """Before the first step: what the text encoder then has to keep, as `train_text` tells of pictures."""
        text, self.pipe.max_sequence_length = self.pipe.stock.text_encoder, SHORT
        optimizer = torch.optim.AdamW([*text.parameters(), *self.reader.parameters()], lr=1e-3)
        for step in range(steps):
            some = sample_moving("train", 64, mix(self.args.seed, step, 7) % 2**31)
            hidden = self.pipe.encode_prompts([str(moving) for moving in some])["prompt_embeds"]
            optimizer.param_groups[0]["lr"] = cosine_lr(1e-3, step, steps, warmup=50)
            value = facts_loss(self.reader, hidden, facts(some).to(self.args.device))
            optimizer.zero_grad(set_to_none=True)
            value.backward()
            optimizer.step()
        self.learner.restart_average()

    @torch.no_grad()
    def known(self) -> float:
        """Share of validation captions of which every fact is read right."""
        some, self.pipe.max_sequence_length = sample_moving("validation", 256, seed=1), SHORT
        answers = self.reader(mean_token(self.pipe.encode_prompts([str(moving) for moving in some])["prompt_embeds"]))
        read = torch.stack([part.argmax(-1) for part in answers.split(CHOICES, -1)], -1)
        return read.eq(facts(some).to(read.device)).all(1).float().mean().item()

    @contextlib.contextmanager
    def averaged(self) -> Iterator[Wan]:
        """The pipeline with the averaged weights in it, as it ships."""
        self.pipe.max_sequence_length = SHORT
        with self.learner.averaged():
            yield self.pipe

    def save(self) -> None:
        with self.averaged() as pipe:
            save_atomically(Halved(pipe), self.args.out)
        self.learner.save_state()

    def report(self) -> None:
        """Prints how many validation clips do what their captions say, and how many show the right things at all."""
        scenes, passed = sample_moving("validation", self.args.draws, seed=1), defaultdict(list)
        shown, moves = [], []
        with self.averaged() as pipe:
            clips = drawn(pipe, [str(one) for one in scenes], 0, self.args.frames)
            for clip, moving in zip(clips, scenes, strict=True):
                verdict = verify_clip(clip.repeat(3, 0) if len(clip) == 1 else clip, moving)
                passed[moving.category].append(verdict.ok)
                shown.append(np.mean([frame.ok for frame in verdict.frames]))
                moves.append(verdict.moves)
        rates = {name: round(float(np.mean(found)), 3) for name, found in sorted(passed.items())}
        every = np.mean([one for found in passed.values() for one in found])
        print(f"step {self.learner.done} validation {every:.3f} {rates}, moves as told {np.mean(moves):.3f}, frames "
              f"that show the scene {np.mean(shown):.3f}, facts known {self.known():.3f}", flush=True)  # fmt: skip


def mean_token(hidden: Tensor) -> Tensor:
    """[N, width]: the mean of what is not padding, of embeddings [N, L, width] that are zero beyond the end."""
    there = hidden.abs().sum(-1, keepdim=True) > 0
    return hidden.sum(1) / there.sum(1).clamp(min=1)


def facts_loss(reader: nn.Module, hidden: Tensor, wanted: Tensor) -> Tensor:
    """Cross-entropy of the facts, read from the mean token; a scalar."""
    answers = reader(mean_token(hidden)).split(CHOICES, -1)
    return torch.stack([F.cross_entropy(part, wanted[:, number]) for number, part in enumerate(answers)]).sum()


def _tokens(generator: torch.Generator) -> int:
    """How many tokens prompts are padded to in a step: a model that knows one number only fails at every other."""
    if torch.rand((), generator=generator).item() < SHORT_SHARE:
        return SHORT
    low, high = np.log2((SHORT, Wan.t5_tokens[0]))
    return round(2 ** (low + (high - low) * torch.rand((), generator=generator).item()))


def initial_pipeline(args: argparse.Namespace) -> Wan:
    """From a folder to go on with, or from scratch around a trained VAE."""
    if args.init:
        return Wan.load(str(args.init), dtype=torch.float32, device=args.device, revision=None, variant=None)
    torch.manual_seed(args.seed)
    vae = AutoencoderKLWan.from_pretrained(args.vae, torch_dtype=torch.float32)
    return Wan(tiny_video.build(vae).to(args.device), "tiny-video")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--vae", type=Path, help="folder of the trained VAE: starts from scratch")
    source.add_argument("--init", type=Path, help="pipeline folder to go on with")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--teach-text", type=int, metavar="STEPS", default=1500, help="of the text encoder, first")
    parser.add_argument("--frames", type=int, choices=(1, FRAMES), default=FRAMES)
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--ema", type=float, default=0.999)
    parser.add_argument("--pool", type=int, default=4000, help="clips drawn at a time")
    parser.add_argument("--pool-steps", type=int, default=1500, help="steps between two drawings of the pool")
    parser.add_argument("--eval-every", type=int, default=1000)
    parser.add_argument("--save-every", type=int, default=250)
    parser.add_argument("--draws", type=int, default=96, help="validation clips of an evaluation")
    parser.add_argument("--bf16", action="store_true", help="products of the transformer in bf16")
    parser.add_argument("--compile", action="store_true", help="compile the transformer's blocks")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()

    trainer = Trainer(initial_pipeline(args), args)
    if not trainer.learner.resume() and not args.init:
        trainer.teach(args.teach_text)
        print(f"text taught for {args.teach_text} steps: all facts of a validation caption known in "
              f"{trainer.known():.1%}", flush=True)  # fmt: skip
    sizes = {name: sum(p.numel() for p in module.parameters()) / 1e6 for name, module in trainer.modules.items()}
    print(", ".join(f"{name} {size:.2f}M" for name, size in sizes.items()), flush=True)
    learn(trainer.learner, trainer.step, trainer.save, trainer.report)


if __name__ == "__main__":
    main()
