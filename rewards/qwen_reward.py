"""Qwen2-VL as a reward model: hidden states at reward tokens, instead of a language head's logits.

HPSv3 and VideoReward are both this. Two facts of theirs are easily lost:

- Positions are 0, 1, 2 ... along all three axes of Qwen's rotary embedding, pictures included: transformers 4.45, which
  both were trained with, gives no others to a model that is called below its language head. Current releases compute
  two-dimensional positions there, and other rewards.
- The turns are in the chat template of Qwen2-VL-Instruct with its default system message. They are written out here, so
  that a template that comes with some copy of the base model cannot change a score.

Checkpoints are in the layout of transformers 4.45 (`visual.*`, `model.*`), which current releases have renamed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase, Qwen2VLModel

from diffalign.errors import first_line
from diffalign.rewards.checkpoints import check_keys
from diffalign.rewards.qwen_pictures import MERGE, patched

TURNS = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>{seen}"
    "<|vision_end|>{asked}<|im_end|>\n<|im_start|>assistant\n"
)
PADS = {"image": "<|image_pad|>", "video": "<|video_pad|>"}
OLD_NAMES = {"visual.": "visual.", "model.": "language_model."}  # 4.45's -> those of a Qwen2VLModel


@dataclass(frozen=True)
class QwenReader:
    """A frozen Qwen2-VL body with the tokens that it is read at.

    Args:
        model: in eval mode, in any dtype.
        tokenizer: of the base model, with the reward tokens added.
        tokens: ids of the reward tokens; each stands in every question once.
        kind: "image" or "video", which says what the patches are to the model.
    """

    model: Any
    tokenizer: PreTrainedTokenizerBase
    tokens: tuple[int, ...]
    kind: str

    def __call__(self, seen: Sequence[Tensor], questions: Sequence[str]) -> Tensor:
        """Hidden states [B, T, D] at the T reward tokens, fp32, with the gradient of what is seen.

        Args:
            seen: B pictures or clips [F, 3, h, w] in [0, 1], sides in multiples of 28.
            questions: B texts that end the user's turn, with every reward token once.
        """
        cut = [patched(clip) for clip in seen]
        texts = [_turns(question, grid, PADS[self.kind]) for question, (_, grid) in zip(questions, cut, strict=True)]
        device = self.model.device
        # padded on the right, so that the positions of a text do not depend on its neighbors
        read = self.tokenizer(texts, padding=True, padding_side="right", return_tensors="pt").to(device)
        patches = torch.cat([rows for rows, _ in cut]).to(device, self.model.dtype)
        grids = torch.tensor([grid for _, grid in cut], device=device)
        return self.states(read.input_ids, read.attention_mask, patches, grids)

    def states(self, ids: Tensor, mask: Tensor, patches: Tensor, grids: Tensor) -> Tensor:
        """[B, T, D] of tokens [B, L], their mask, patches [N, 1176] and grids [B, 3]."""
        patch, grid = ("pixel_values", "image_grid_thw") if self.kind == "image" else (
            "pixel_values_videos", "video_grid_thw")  # fmt: skip
        count, length = ids.shape
        positions = torch.arange(length, device=ids.device).expand(3, count, length)
        states = self.model(
            input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False, **{patch: patches, grid: grids}
        ).last_hidden_state
        at = torch.stack([(ids == token).int().argmax(1) for token in self.tokens], 1)
        return states[torch.arange(count, device=ids.device)[:, None], at].float()


def _turns(question: str, grid: Sequence[int], pad: str) -> str:
    t, h, w = grid
    return TURNS.replace("{seen}", pad * (t * h * w // MERGE**2)).replace("{asked}", question)


def load_tokenizer(base: str, tokens: Sequence[str], reward: str) -> PreTrainedTokenizerBase:
    """The base model's tokenizer with the reward tokens behind its own.

    Raises:
        ValueError: not to be had, or no tokenizer of Qwen2-VL.
    """
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(base)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _no_base(base, reward, error) from error
    known = tokenizer.get_added_vocab()
    if lacking := [word for word in (*PADS.values(), "<|vision_start|>", "<|im_start|>") if word not in known]:
        raise ValueError(f"{base}: expected the tokenizer of a Qwen2-VL, its vocabulary lacks {', '.join(lacking)}")
    tokenizer.add_tokens(list(tokens), special_tokens=True)
    return tokenizer


def load_body(state: Mapping[str, Tensor], base: str, words: int, where: Path, dtype: torch.dtype, reward: str) -> Any:
    """A frozen Qwen2VLModel with every weight from `state`, whose names are those of transformers 4.45.

    Args:
        base: folder or hub id; of it only config.json is read.
        words: length of the tokenizer's vocabulary, which the embedding must have too.
        where: the checkpoint's file, for messages.

    Raises:
        ValueError: a missing or surplus key, another shape, or a base that is not to be had.
    """
    config = load_config(base, reward)
    config.text_config.vocab_size = words
    with torch.device("meta"):
        wanted = {key: value.shape for key, value in Qwen2VLModel(config).state_dict().items()}
    renamed = new_names(state)
    check_keys(wanted, renamed, where, "a reward model on Qwen2-VL")
    model: Any = Qwen2VLModel.from_pretrained(None, config=config, state_dict=renamed, dtype=dtype)
    return model.requires_grad_(False).eval()


def load_config(base: str, reward: str) -> Any:
    """The configuration of a Qwen2-VL.

    Raises:
        ValueError: not to be had, or of another model.
    """
    try:
        config: Any = AutoConfig.from_pretrained(base)
    except (OSError, ValueError, KeyError) as error:
        raise _no_base(base, reward, error) from error
    if config.model_type != "qwen2_vl":
        raise ValueError(f"{base}: expected the config of a Qwen2-VL, its model_type is {config.model_type}")
    return config


def load_base(base: str, words: int, dtype: torch.dtype, reward: str) -> Any:
    """The base model's own Qwen2VLModel, its vocabulary cut or grown to `words`; rows that are grown are zero.

    Raises:
        ValueError: not to be had, or not all weights of a Qwen2-VL.
    """
    load_config(base, reward)
    try:
        model, report = Qwen2VLModel.from_pretrained(base, dtype=dtype, output_loading_info=True)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise _no_base(base, reward, error) from error
    if missing := sorted(report["missing_keys"]):
        raise ValueError(f"{base}: expected all weights of a Qwen2-VL, it lacks {', '.join(missing[:3])} ...")
    if surplus := sorted(key for key in report["unexpected_keys"] if key != "lm_head.weight"):
        raise ValueError(f"{base}: expected a Qwen2-VL and no more, it has also {', '.join(surplus[:3])} ...")
    rows: Tensor = model.language_model.embed_tokens.weight
    kept = torch.zeros(words, rows.shape[1], dtype=rows.dtype)
    kept[: len(rows)] = rows.detach()[:words]
    model.language_model.embed_tokens = nn.Embedding.from_pretrained(kept)
    return model.requires_grad_(False).eval()


def new_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """4.45's names as a Qwen2VLModel has them now; a name that is neither stays, so that it is found surplus."""
    renamed = {}
    for key, value in state.items():
        old = next((prefix for prefix in OLD_NAMES if key.startswith(prefix)), None)
        renamed[OLD_NAMES[old] + key.removeprefix(old) if old else key] = value
    return renamed


def _no_base(base: str, reward: str, error: Exception) -> ValueError:
    return ValueError(
        f"{reward}: expected {base} to be the folder or hub id of a Qwen2-VL, with config.json and its tokenizer, "
        f"could not load it ({first_line(error)}); with a network, run `hf download {base}` once, or give a copy as "
        f"base=FOLDER"
    )
