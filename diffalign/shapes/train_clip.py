"""Trains assets/tiny-clip: a stock CLIPModel on the shapes world, a learned reward that can be fooled.

    python -m diffalign.shapes.train_clip --out runs/tiny-clip

Contrastive on fresh pictures; a quarter of each batch are captions that differ in one fact from another one in the
batch, without which a CLIP model reads captions as a bag of words. The verifier cannot be fooled; this one can, on
purpose: it ranks the true caption above a one-fact-changed one in 75 to 97 % of cases.
"""

from __future__ import annotations

import argparse
import random
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    CLIPTextConfig,
    CLIPTokenizer,
    CLIPVisionConfig,
)

from diffalign.shapes.grammar import Scene, one_fact_changed, sample_scenes
from diffalign.shapes.render import render
from diffalign.shapes.tiny_sd import build_tokenizer
from diffalign.shapes.train_common import cosine_lr, save_atomically

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
WIDTH = 64


def build_clip(tokenizer: CLIPTokenizer) -> CLIPModel:
    """0.35 million parameters: 8-pixel patches of a 64-pixel picture, two text and three vision layers."""
    text = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=77, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=WIDTH, intermediate_size=3 * WIDTH, num_hidden_layers=4, num_attention_heads=4, image_size=64,
        patch_size=8,
    )  # fmt: skip
    return CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=WIDTH))


def build_processor(tokenizer: CLIPTokenizer) -> CLIPProcessor:
    """The stock processor for 64-pixel pictures."""
    size = {"shortest_edge": 64}, {"height": 64, "width": 64}
    return CLIPProcessor(CLIPImageProcessor(size=size[0], crop_size=size[1], image_mean=MEAN, image_std=STD), tokenizer)


def draw_batch(count: int, seed: int) -> tuple[list[Scene], np.ndarray]:
    """Scenes and their pictures uint8 [count, 64, 64, 3]; the last half are one-fact neighbors of the first."""
    rng = random.Random(seed)
    first = sample_scenes("train", count // 2, seed)
    scenes = first + [one_fact_changed(scene, rng) for scene in first]
    return scenes, np.stack([np.asarray(render(scene, rng)) for scene in scenes])


def to_pixel_values(pictures: np.ndarray) -> Tensor:
    """uint8 [N, 64, 64, 3] -> normalized fp32 [N, 3, 64, 64]."""
    x = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255
    return (x - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


class SavedClip:
    """Model and processor in one folder."""

    def __init__(self, model: CLIPModel, processor: CLIPProcessor) -> None:
        self.model, self.processor = model, processor

    def save_pretrained(self, save_directory: str) -> None:
        self.model.save_pretrained(save_directory)
        self.processor.save_pretrained(save_directory)


@torch.no_grad()
def ranking_accuracy(model: CLIPModel, tokenizer: CLIPTokenizer, split: str, count: int, seed: int = 0) -> float:
    """Share of fresh pictures whose caption scores above one that differs in one fact."""
    rng = random.Random(seed)
    scenes = sample_scenes(split, count, seed)
    pixels = to_pixel_values(np.stack([np.asarray(render(scene, rng)) for scene in scenes]))
    captions = [[str(scene), str(one_fact_changed(scene, rng))] for scene in scenes]
    ids = tokenizer([c for pair in captions for c in pair], padding=True, return_tensors="pt")
    text = F.normalize(model.get_text_features(**ids).pooler_output, dim=-1).view(count, 2, -1)
    image = F.normalize(model.get_image_features(pixels).pooler_output, dim=-1)
    true, false = torch.einsum("nd,nkd->kn", image, text)
    return (true > false).float().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    tokenizer = build_tokenizer()
    model = build_clip(tokenizer)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.3f}M parameters", flush=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.05)
    start = time.time()
    for step in range(args.steps):
        scenes, pictures = draw_batch(args.batch, args.seed * 1_000_003 + step)
        ids = tokenizer([str(s) for s in scenes], padding=True, return_tensors="pt")
        out = model(**ids, pixel_values=to_pixel_values(pictures))
        same = torch.tensor([[a == b for b in scenes] for a in scenes])  # an equal caption is no negative
        logits = out.logits_per_image.masked_fill(same & ~torch.eye(len(scenes), dtype=torch.bool), -1e4)
        labels = torch.arange(len(scenes))
        value = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
        optimizer.param_groups[0]["lr"] = cosine_lr(args.lr, step, args.steps, warmup=200)
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(max=4.6052)
        if step % 250 == 249 or step + 1 == args.steps:
            accuracy = ranking_accuracy(model.eval(), tokenizer, "validation", 500)
            model.train()
            print(f"step {step + 1} loss {value.item():.3f} one-fact accuracy {accuracy:.3f} "
                  f"{time.time() - start:.0f} s", flush=True)  # fmt: skip
            save_atomically(SavedClip(model, build_processor(tokenizer)), args.out)


if __name__ == "__main__":
    main()
