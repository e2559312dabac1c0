"""Teaches text encoders what a caption puts where, before a network learns to draw it.

Which object is on the left follows from the order of the words *and* from the relation between them. Learned from
pictures alone this conjunction has almost no gradient: it explains less than 2 % of the variance of a latent, at the
noisiest times only, and both tiny-sd and a linear head on its text encoder stayed at chance for thousands of steps.
Asked for in words it takes a minute, as a CLIP text encoder has learned such things before a Stable Diffusion uses it.
It has to be asked again while the network learns: without that the encoder had forgotten it before the U-Net came to
use it.
Training captions alone are used; what is learned carries over to the validation ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffalign.pipelines.base import LatentPipeline
from diffalign.shapes.grammar import COLORS, RELATIONS, SHAPES, Scene, inverse, scenes
from diffalign.shapes.train_common import cosine_lr

_CLASSES = (1 + len(COLORS), 1 + len(SHAPES))  # per side: none, or a color and a shape


def sides(batch: list[Scene]) -> Tensor:
    """int64 [N, 4, 2]: color and shape of the object on each side of `RELATIONS`, 0 for none, else 1 + its index."""
    found = torch.zeros(len(batch), len(RELATIONS), 2, dtype=torch.long)
    for row, scene in zip(found, batch, strict=True):
        if scene.relation:
            # a relation also names the side on which its first object is
            for said in (scene, inverse(scene)):
                first = said.things[0]
                row[RELATIONS.index(str(said.relation))] = torch.tensor(
                    [1 + COLORS.index(first.color), 1 + SHAPES.index(first.shape)]
                )
    return found


def side_reader(width: int) -> nn.Linear:
    """A linear head that reads `sides` from hidden states; thrown away when training is over."""
    return nn.Linear(width, len(RELATIONS) * sum(_CLASSES))


def sides_loss(reader: nn.Module, hidden: Tensor, after_end: Tensor, wanted: Tensor) -> Tensor:
    """Cross-entropy of colors plus that of shapes, a scalar.

    Args:
        hidden: [N, 77, width], what the network is given of the CLIP tokens.
        after_end: bool [N, 77], the positions to read from: those that have seen the whole caption.
        wanted: int64 [N, 4, 2], from `sides`.
    """
    target = wanted[:, None].expand(-1, hidden.shape[1], -1, -1)[after_end]
    answers = _answers(reader, hidden[after_end])
    parts = [F.cross_entropy(answer.flatten(0, 1), target[..., i].flatten()) for i, answer in enumerate(answers)]
    return parts[0] + parts[1]


def after_end(stock: Any, captions: Sequence[str]) -> Tensor:
    """bool [N, 77], or as many tokens as the stock pipeline pads to: the end token and all that follows it."""
    tokenizer, length = stock.tokenizer, getattr(stock, "tokenizer_max_length", None)
    ids = tokenizer(list(captions), padding="max_length", truncation=True, max_length=length, return_tensors="pt")
    return (torch.as_tensor(ids.input_ids) == tokenizer.eos_token_id).cumsum(1) > 0


def teach_sides(
    pipe: LatentPipeline,
    text_encoders: Sequence[nn.Module],
    reader: nn.Linear,
    steps: int,
    batch: int = 64,
    lr: float = 1e-3,
    seed: int = 0,
) -> None:
    """Trains the text encoders and the reader in place."""
    generator, device = torch.Generator().manual_seed(seed), reader.weight.device
    optimizer = torch.optim.AdamW(nn.ModuleList([*text_encoders, reader]).parameters(), lr=lr)
    two = scenes("train", "two")
    others = scenes("train", "single") + scenes("train", "count")
    taught = two + others * (len(two) // (4 * len(others)))
    for step in range(steps):
        some = [taught[i] for i in torch.randint(len(taught), (batch,), generator=generator).tolist()]
        captions = [str(scene) for scene in some]
        asked, wanted = after_end(pipe.stock, captions).to(device), sides(some).to(device)
        hidden = pipe.encode_prompts(captions)["prompt_embeds"][:, : asked.shape[1]]
        optimizer.param_groups[0]["lr"] = cosine_lr(lr, step, steps, warmup=50)
        loss = sides_loss(reader, hidden, asked, wanted)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()


@torch.no_grad()
def sides_known(pipe: LatentPipeline, reader: nn.Module) -> float:
    """Share of the two-object validation captions of which every side is read right, from the last CLIP token."""
    held = scenes("validation", "two")
    last = pipe.stock.tokenizer.model_max_length - 1
    hidden = pipe.encode_prompts([str(scene) for scene in held])["prompt_embeds"][:, last]
    read = torch.stack([answer.argmax(-1) for answer in _answers(reader, hidden)], -1)
    return read.eq(sides(held).to(read.device)).flatten(1).all(1).float().mean().item()


def _answers(reader: nn.Module, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Logits of colors [N, 4, 7] and of shapes [N, 4, 5] of hidden states [N, width]."""
    colors, shapes = reader(hidden).unflatten(-1, (len(RELATIONS), sum(_CLASSES))).split(_CLASSES, dim=-1)
    return colors, shapes
