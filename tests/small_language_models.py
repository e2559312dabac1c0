"""Checkpoints of rewards on language models, small, in the layouts of the official files; one function each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import oracle
import torch
from safetensors.torch import save_file
from tiny_qwen import ROOM, qwen2_base, qwen2_shapes, tokenizer
from torch import Tensor
from transformers import Idefics2Config, Idefics2Processor
from transformers.models.idefics2.image_processing_pil_idefics2 import Idefics2ImageProcessorPil

from diffalign.rewards.videoreward_files import TOKENS
from diffalign.rewards.videoscore import VideoScoreNetwork

HPSV3_HEAD = {"rm_head.0.weight": [1024, 64], "rm_head.0.bias": [1024], "rm_head.3.weight": [16, 1024],
              "rm_head.3.bias": [16], "rm_head.5.weight": [2, 16], "rm_head.5.bias": [2]}  # fmt: skip
RANK = 4
MEANS, DEVIATIONS = {"VQ": 0.5, "MQ": -0.25, "TA": 1.0}, {"VQ": 2.0, "MQ": 0.5, "TA": 1.5}
VIDEOREWARD: dict[str, Any] = {
    "data_config": {"max_frame_pixels": 200704, "prompt_template_type": "detailed_special"},
    "model_config": {"output_dim": 1, "use_special_tokens": True, "reward_token": "special"},
    "peft_lora_config": {"lora_r": RANK, "lora_alpha": 8, "vision_lora": False, "use_rslora": False,
                         "lora_namespan_exclude": ["lm_head", "rm_head", "embed_tokens", "visual"]},
    "inference_config": {f"{d}_mean": value for d, value in MEANS.items()}
    | {f"{d}_std": value for d, value in DEVIATIONS.items()},
}  # fmt: skip


def hpsv3_state(words: int) -> dict[str, Tensor]:
    """All keys of HPSv3.safetensors."""
    return oracle.seeded({key: torch.empty(shape) for key, shape in (qwen2_shapes(words) | HPSV3_HEAD).items()})


def hpsv3(folder: Path) -> Path:
    """The official file, whose vocabulary has the reward token; `qwen2_base` is its base."""
    save_file(hpsv3_state(len(tokenizer()) + 1), folder / "HPSv3.safetensors")
    return folder


def videoreward_state(words: int) -> dict[str, Tensor]:
    """All keys of the whole model, without a LoRA."""
    shapes = qwen2_shapes(words) | {"rm_head.weight": [1, 64]}
    return oracle.seeded({key: torch.empty(shape) for key, shape in shapes.items()})


def videoreward_words() -> int:
    """The vocabulary's length with the three reward tokens."""
    return len(tokenizer()) + len(TOKENS)


def adapted(state: dict[str, Tensor]) -> list[str]:
    """The linear maps that the released training adapts: all of the language model."""
    return [key.removesuffix(".weight") for key, value in state.items()
            if key.startswith("model.layers.") and value.ndim == 2]  # fmt: skip


def factors(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The LoRA on `adapted`."""
    generator = torch.Generator().manual_seed(5)
    made = {}
    for module in adapted(state):
        out, into = state[f"{module}.weight"].shape
        made[f"{module}.lora_A.weight"] = 0.1 * torch.randn(RANK, into, generator=generator)
        made[f"{module}.lora_B.weight"] = 0.1 * torch.randn(out, RANK, generator=generator)
    return made


def videoreward(folder: Path, config: dict[str, Any] = VIDEOREWARD) -> Path:
    """The adapter, what is trained beside it, and the settings, as the released training saves them."""
    step = folder / "checkpoint-20"
    step.mkdir(parents=True)
    state = videoreward_state(videoreward_words())
    low = {f"base_model.model.{key}": value for key, value in factors(state).items()}
    save_file(low, step / "adapter_model.safetensors")
    beside = {key: value for key, value in state.items()
              if key.startswith("visual.") or key in ("model.embed_tokens.weight", "rm_head.weight")}  # fmt: skip
    torch.save({f"base_model.model.{key}": value for key, value in beside.items()}, step / "non_lora_state_dict.pth")
    (folder / "model_config.json").write_text(json.dumps(config))
    return folder


def videoreward_base(folder: Path) -> Path:
    """Qwen2-VL-2B-Instruct's layout: a tied language head that is not in the file, and room in the vocabulary."""
    state = videoreward_state(ROOM)
    del state["lm_head.weight"], state["rm_head.weight"]
    save_file(state, qwen2_base(folder) / "model.safetensors", metadata={"format": "pt"})
    return folder


def videoscore(folder: Path) -> Path:
    """config.json, processor and weights under the names of the released class: model.* and score.*."""
    tokenizer().save_pretrained(folder / "words")
    words = type(tokenizer()).from_pretrained(folder / "words")  # a copy of its own, to which tokens are added
    images = Idefics2ImageProcessorPil(size={"shortest_edge": 28, "longest_edge": 56}, do_image_splitting=False)
    processor = Idefics2Processor(images, words, image_seq_len=4)
    ids = {"image_token_id": words.convert_tokens_to_ids("<image>"), "pad_token_id": words.pad_token_id}
    text = {"model_type": "mistral", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
            "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": len(words),
            "pad_token_id": ids["pad_token_id"], "max_position_embeddings": 4096, "sliding_window": 4096,
            "bos_token_id": 0, "eos_token_id": 0}  # fmt: skip
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
              "image_size": 56, "patch_size": 14}  # fmt: skip
    perceiver = {"resampler_n_latents": 4, "resampler_depth": 1, "resampler_n_heads": 2, "resampler_head_dim": 16,
                 "num_key_value_heads": 1, "hidden_size": 32}  # fmt: skip
    config = Idefics2Config(text_config=text, vision_config=vision, perceiver_config=perceiver,
                            image_token_id=ids["image_token_id"], num_labels=5)  # fmt: skip
    network = VideoScoreNetwork(config)
    network.load_state_dict({key: value.float() for key, value in oracle.seeded(network.state_dict()).items()})
    network.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
