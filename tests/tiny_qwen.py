"""Folders of Qwen2-VL in small, random, as the hub has them: a flat config.json of 2024 and a tokenizer of pieces."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from diffalign.rewards.rubrics import rubric

ROOM = 1100  # rows of the embedding, more than there are words, as in the released models

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
           "<|video_pad|>"]  # fmt: skip
# Qwen2-VL-Instruct's: a system message where none is given, then the parts of a turn in their order
SYSTEM = (
    "{% if loop.first and turn.role != 'system' %}<|im_start|>system\n"
    "You are a helpful assistant.<|im_end|>\n{% endif %}"
)
CHAT = (
    "{% for turn in messages %}" + SYSTEM + "<|im_start|>{{ turn.role }}\n{% for part in turn.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% elif part.type == 'video' %}"
    "<|vision_start|><|video_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    """Bytes, and what occurs often in the rubrics, so that these are not thousands of tokens long."""
    bare = Tokenizer(models.BPE())
    bare.pre_tokenizer, bare.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=1000, initial_alphabet=letters, show_progress=False)
    bare.train_from_iterator([rubric("hpsv3"), rubric("videoreward")], trainer)
    bare.add_special_tokens(SPECIAL)
    return PreTrainedTokenizerFast(tokenizer_object=bare, eos_token="<|im_end|>", pad_token="<|endoftext|>")


def qwen2_base(folder: Path) -> Path:
    """config.json and tokenizer of a small Qwen2-VL, in the layout of transformers 4.45; the vocabulary has room."""
    words = tokenizer()
    ids = {word: words.convert_tokens_to_ids(word) for word in SPECIAL}
    config = {
        "architectures": ["Qwen2VLForConditionalGeneration"], "model_type": "qwen2_vl", "hidden_size": 64,
        "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "vocab_size": ROOM, "rope_theta": 1000000.0, "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
        "rms_norm_eps": 1e-05, "hidden_act": "silu", "max_position_embeddings": 32768, "tie_word_embeddings": True,
        "bos_token_id": 0, "eos_token_id": ids["<|im_end|>"], "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"], "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"], "torch_dtype": "bfloat16", "transformers_version": "4.41.2",
        "vision_config": {"depth": 2, "embed_dim": 32, "mlp_ratio": 4, "num_heads": 2, "in_chans": 3,
                          "hidden_size": 64, "patch_size": 14, "spatial_merge_size": 2, "spatial_patch_size": 14,
                          "temporal_patch_size": 2},
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    words.save_pretrained(folder)
    return folder


def qwen2_shapes(words: int) -> dict[str, list[int]]:
    """Shapes by name of the reward models' body, as transformers 4.45 names them, with a language head."""
    shapes: dict[str, list[int]] = {"visual.patch_embed.proj.weight": [32, 3, 2, 14, 14]}
    norms = {f"norm{i}.{part}": [32] for i in (1, 2) for part in ("weight", "bias")}
    maps = {"attn.qkv": [96, 32], "attn.proj": [32, 32], "mlp.fc1": [128, 32], "mlp.fc2": [32, 128]}
    for layer in range(2):
        shapes |= {f"visual.blocks.{layer}.{name}": shape for name, shape in norms.items()}
        shapes |= _linear(f"visual.blocks.{layer}.", maps)
    shapes |= {"visual.merger.ln_q.weight": [32], "visual.merger.ln_q.bias": [32]}
    shapes |= _linear("visual.merger.", {"mlp.0": [128, 128], "mlp.2": [64, 128]})
    shapes["model.embed_tokens.weight"] = [words, 64]
    for layer in range(2):
        inside = f"model.layers.{layer}."
        shapes |= _linear(inside + "self_attn.", {"q_proj": [64, 64], "k_proj": [32, 64], "v_proj": [32, 64]})
        shapes |= {f"{inside}self_attn.o_proj.weight": [64, 64], f"{inside}mlp.gate_proj.weight": [96, 64],
                   f"{inside}mlp.up_proj.weight": [96, 64], f"{inside}mlp.down_proj.weight": [64, 96]}  # fmt: skip
        shapes |= {f"{inside}{name}_layernorm.weight": [64] for name in ("input", "post_attention")}
    return shapes | {"model.norm.weight": [64], "lm_head.weight": [words, 64]}


def _linear(prefix: str, maps: dict[str, list[int]]) -> dict[str, list[int]]:
    return {f"{prefix}{name}.{part}": shape if part == "weight" else shape[:1]
            for name, shape in maps.items() for part in ("weight", "bias")}  # fmt: skip


def byte_tokenizer() -> PreTrainedTokenizerFast:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    bare = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(letters)}, merges=[]))
    bare.pre_tokenizer, bare.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    bare.add_special_tokens(SPECIAL)
    return PreTrainedTokenizerFast(tokenizer_object=bare, eos_token="<|im_end|>", pad_token="<|endoftext|>")


def qwen25_vl(folder: Path) -> Path:
    """A random Qwen2.5-VL of two narrow layers as the hub has it, with its processor and weights, in 60 kB."""
    words = byte_tokenizer()
    ids = {word: words.convert_tokens_to_ids(word) for word in SPECIAL}
    text = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
            "num_key_value_heads": 2, "vocab_size": len(words), "max_window_layers": 2,
            "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4}}  # fmt: skip
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 32,
              "fullatt_block_indexes": [0]}  # fmt: skip
    config = Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"], vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"], tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(3)
    model = Qwen2_5_VLForConditionalGeneration(config)
    model.generation_config.update(eos_token_id=[ids["<|im_end|>"]], pad_token_id=0, do_sample=True, temperature=0.5)
    for weight in model.parameters():
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=0.3)
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    Qwen2VLImageProcessorPil(min_pixels=28 * 28, max_pixels=4 * 28 * 28).save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(CHAT.replace(SYSTEM, ""))
    return folder
