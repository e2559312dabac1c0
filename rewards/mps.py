"""MPS: a CLIP ViT-H/14 whose picture looks at the words that matter. Zhang et al. 2024, arXiv 2405.14705.

    kept_i = (max_j T_i C_j) / (max_ij T_i C_j) > 0.3
    score = exp(logit_scale) cos(text, head(picture | T, kept)[CLS])

T and C are the tokens of the prompt and of a fixed list of things that people judge by, both padded to 77 and read
without a mask. About 5 to 15. Two formulas are published: this one, of the evaluation scripts, which gave the numbers
of the paper, and the model's own `forward` with a threshold of 0.01 (`threshold=0.01`). There the maximum runs over the
whole batch, so that a score depends on its neighbors; here it never leaves its sample.

The released code computes in fp16 throughout, positions too, whose angles it thereby rounds: `dtype: float16`.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, final

import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, CLIPModel

from diffalign.errors import first_line
from diffalign.rewards.base import Card, CutPrompts, Images, dispatch
from diffalign.rewards.checkpoints import check_keys, load_strictly, read_state
from diffalign.rewards.mps_network import CrossModel, head_sizes
from diffalign.rewards.preprocess import hf_recipe
from diffalign.rewards.rubrics import rubric
from diffalign.rewards.texts import NetworkReader, TextFeatures, longer_than
from diffalign.rewards.towers import dtype_named

THRESHOLD = 0.3
KEPT = 256  # prompts whose tokens are kept: 80 MB in fp32 as released, 78 rows of 1024 each
UNUSED = ("model.text_model.embeddings.position_ids", "model.vision_model.embeddings.position_ids")
CONVERT = (
    "the released MPS_overall_checkpoint.pth (Google Drive, linked in github.com/Kwai-Kolors/MPS) is a pickled object "
    "and not a state dict; where you trust it, in a checkout of that repository with the transformers of its "
    "requirements.txt, run torch.save(torch.load('MPS_overall_checkpoint.pth', map_location='cpu', "
    "weights_only=False).state_dict(), 'mps.pth') and give weights=mps.pth, on the command line --weights mps=mps.pth"
)


@final
class MPS:
    """The multi-dimensional preference score, of overall preference, the only one that was released.

    Args:
        weights: state dict (.pth or .safetensors) with the released keys; there is no default, see `CONVERT`.
        backbone: folder or hub id of the CLIP that MPS starts from; only its config and tokenizer are read.
        device: where the network lives; pixels are brought there.
        dtype: of the network: float32, bfloat16 or float16. Pictures and the cosine are fp32 whatever it is.
        threshold: share of the largest similarity to the condition above which a word counts; in [0, 1).
        condition: what the prompt's words are compared with; by default the released list.

    Raises:
        ValueError: a checkpoint that is not to be had, is a pickled object or of another layout; another threshold.
    """

    name: ClassVar[str] = "mps"
    card: Card = Card(
        unit="exp(logit_scale) cos",
        range=(-100.1, 100.1),
        source="github.com/Kwai-Kolors/MPS, MPS_overall_checkpoint.pth; arXiv 2405.14705",
        code="MIT",
        weights="not stated; the code is MIT",
        differentiable=True,
        side=224,
        across_prompts=False,
        checked="official code, small weights",
    )

    def __init__(
        self,
        *,
        weights: str | Path | None = None,
        backbone: str = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
        device: torch.device | str = "cpu",
        dtype: str = "float32",
        threshold: float = THRESHOLD,
        condition: str | None = None,
    ) -> None:
        if not 0 <= threshold < 1:
            raise ValueError(f"mps.threshold: expected a number in [0, 1), got {threshold}")
        kind = dtype_named(dtype)
        path = _located(weights)
        state = _tensors(path)
        config, tokenizer = _backbone(backbone)
        self.clip = _clip(state, config, path, kind).to(device)
        self.head = _head(state, path, kind).to(device)
        self.threshold, self.condition = threshold, rubric("mps") if condition is None else condition
        self.recipe = hf_recipe(config.vision_config.image_size)
        self.reader = PromptReader(self.clip, tokenizer)
        self.scale = float(self.clip.logit_scale.float().exp())
        self.card = replace(self.card, range=(-self.scale, self.scale), side=self.recipe.size)
        tell_cut = CutPrompts(self.name)
        self._texts = TextFeatures(KEPT, lambda prompts: tell_cut(self.reader.too_long(prompts)), unit=False)

    def __call__(self, images: Images, prompts: Sequence[str]) -> Tensor:
        """Scores [B]; see `Reward.__call__`."""
        return dispatch(self.name, images, prompts, exact=self._score_pictures, differentiable=self._score_pixels)

    def _score_pictures(self, pictures: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        return self._score(self.recipe.pictures(pictures), prompts)

    def _score_pixels(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        return self._score(self.recipe.pixels(pixels), prompts)

    def _score(self, x: Tensor, prompts: Sequence[str]) -> Tensor:
        rows = self._texts(self.reader, [self.condition, *prompts])
        condition, words, ends = rows[:1, :-1], rows[1:, :-1], rows[1:, -1]
        states = self.clip.vision_model(pixel_values=x.to(self.clip.device, self.clip.dtype)).last_hidden_state
        seen = self.clip.visual_projection(states)  # of every token, before the norm that CLIP's pooling has
        found = self.head(seen, words, counted(words, condition, self.threshold))[:, 0]
        return self.scale * F.cosine_similarity(ends.float(), found.float(), dim=-1)


@final
@dataclass(frozen=True)
class PromptReader(NetworkReader):
    """The text side of MPS's CLIP, for `TextFeatures`."""

    tokenizer: Any

    @torch.no_grad()
    def text_features(self, prompts: Sequence[str]) -> Tensor:
        """[B, 78, D] of B prompts, in the type of the network: the 77 tokens, then what the end token sums up."""
        tokens = self.tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=self._context, return_tensors="pt"
        )
        # without a mask, as released: the padding takes part
        out = self.model.text_model(input_ids=tokens.input_ids.to(self.device))
        states = torch.cat([out.last_hidden_state, out.pooler_output[:, None]], 1)
        projected: Tensor = self.model.text_projection(states)
        return projected

    def too_long(self, prompts: Sequence[str]) -> list[str]:
        return longer_than(self._context, self.tokenizer, prompts)

    @property
    def _context(self) -> int:
        return int(self.model.config.text_config.max_position_embeddings)


def counted(words: Tensor, condition: Tensor, threshold: float) -> Tensor:
    """bool [B, M]: which words [B, M, D] count; of every sample at least the one that is most like the condition.

    Its largest similarity to a token of the condition [1, K, D] is more than `threshold` of the largest in its sample.
    """
    likeness = torch.einsum("bmd,kd->bmk", words.float(), condition[0].float()).amax(2)
    return likeness / likeness.amax(1, keepdim=True) > threshold


def _located(weights: str | Path | None) -> Path:
    if weights is None:
        raise ValueError(f"mps: no weights were given, and none can be fetched: {CONVERT}")
    if not Path(weights).is_file():
        raise ValueError(f"weights of mps: expected the file of a state dict, found none at {weights}; {CONVERT}")
    return Path(weights)


def _tensors(path: Path) -> dict[str, Any]:
    try:
        return read_state(path)
    except ValueError as error:
        if isinstance(error.__cause__, pickle.UnpicklingError):
            raise ValueError(f"{path}: expected a state dict; {CONVERT}") from error
        raise


def _backbone(backbone: str) -> tuple[Any, Any]:
    try:
        config: Any = AutoConfig.from_pretrained(backbone)
        tokenizer = AutoTokenizer.from_pretrained(backbone)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"mps: expected {backbone} to be the folder or hub id of a CLIP, with config.json and its "
                         f"tokenizer, could not load it ({first_line(error)}); with a network, run `hf download "
                         f"{backbone}` once, or give a local copy as backbone=FOLDER") from error  # fmt: skip
    if config.model_type != "clip":
        raise ValueError(f"mps: expected {backbone} to be a CLIP, its model_type is {config.model_type}")
    return config, tokenizer


def _clip(state: Mapping[str, Tensor], config: Any, path: Path, kind: torch.dtype) -> Any:
    own = {key.removeprefix("model."): value for key, value in state.items()
           if not key.startswith(("cross_model.", *UNUSED))}  # fmt: skip
    with torch.device("meta"):
        wanted = {key: value.shape for key, value in CLIPModel(config).state_dict().items()}
    check_keys(wanted, own, path, "MPS")
    try:
        model: Any = CLIPModel.from_pretrained(None, config=config, state_dict=own, dtype=kind)
    except (RuntimeError, SafetensorError) as error:
        raise ValueError(f"{path}: could not read it: {error}") from error
    return model.requires_grad_(False).eval()


def _head(state: Mapping[str, Tensor], path: Path, kind: torch.dtype) -> CrossModel:
    own = {key.removeprefix("cross_model."): value for key, value in state.items() if key.startswith("cross_model.")}
    head = CrossModel(head_sizes(state, path))
    load_strictly(head, own, path)
    return head.to(kind).requires_grad_(False).eval()
