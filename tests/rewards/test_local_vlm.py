"""A judge on this machine: a random Qwen2.5-VL of two narrow layers, with a tokenizer of single bytes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from loopback import gray
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from diffalign.rewards import load_reward
from diffalign.rewards.local_vlm import LocalVLM

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
           "<|video_pad|>"]  # fmt: skip
TEMPLATE = (
    "{% for turn in messages %}<|im_start|>{{ turn.role }}\n{% for part in turn.content %}{% if part.type == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    bare = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(letters)}, merges=[]))
    bare.pre_tokenizer, bare.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    bare.add_special_tokens(SPECIAL)
    return PreTrainedTokenizerFast(tokenizer_object=bare, eos_token="<|im_end|>", pad_token="<|endoftext|>")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As the hub has it, in 60 kB."""
    folder = tmp_path_factory.mktemp("vlm")
    tokenizer = byte_tokenizer()
    ids = {word: tokenizer.convert_tokens_to_ids(word) for word in SPECIAL}
    text = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
            "num_key_value_heads": 2, "vocab_size": len(tokenizer), "max_window_layers": 2,
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
    tokenizer.save_pretrained(folder)
    Qwen2VLImageProcessorPil(min_pixels=28 * 28, max_pixels=4 * 28 * 28).save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture(scope="module")
def judge(folder: Path) -> LocalVLM:
    return LocalVLM(weights=folder, dtype="float32", max_tokens=6)


def written(judge: LocalVLM, text: str, *, end: bool) -> None:
    """Makes the head write `text`, whatever it reads: each step's token is forced."""
    tokens = judge.processor.tokenizer(text)["input_ids"]
    if end:
        tokens = [*tokens, judge.processor.tokenizer.eos_token_id]
    step = iter(tokens)

    def force(_module: object, _inputs: object, logits: torch.Tensor) -> torch.Tensor:
        forced = torch.full_like(logits, -1e4)
        forced[..., next(step)] = 0
        return forced

    judge.model.lm_head.register_forward_hook(force)


def test_it_looks_at_the_pictures_and_reads_the_text_and_is_greedy(judge: LocalVLM):
    def first_logits(level: int, text: str) -> torch.Tensor:
        seen = []
        handle = judge.model.lm_head.register_forward_hook(lambda _m, _i, logits: seen.append(logits[0, -1].clone()))
        try:
            judge.ask([gray(level, 28)], text)
        finally:
            handle.remove()
        return seen[0]

    base = first_logits(10, "good?")
    assert torch.equal(base, first_logits(10, "good?"))
    assert (base - first_logits(250, "good?")).abs().max() > 1e-3
    assert (base - first_logits(10, "bad??")).abs().max() > 1e-3
    answers = {judge.ask([gray(10, 28)], "good?") for _ in range(3)}
    assert len(answers) == 1, "the checkpoint's own config asks for sampling"


@pytest.mark.parametrize(
    ("said", "end", "score"), [("Score: 7", True, 7.0), ("Score: 7", False, None), ("7", True, None)]
)
def test_it_is_a_judge_like_any_other(folder: Path, said: str, end: bool, score: float | None):
    section = {"name": "local", "weights": str(folder), "max_tokens": len(said) + end}
    reward = load_reward("vlm", judge=section)  # in bf16, as is the default
    written(reward.asker, said, end=end)
    scores = reward([Image.new("RGBA", (40, 30), "red")], ["a red square"])
    assert scores.tolist() == [score] if score else scores.isnan().all()
    assert reward.reasons == [""] if score else "cut after" in reward.reasons[0] or "0 times" in reward.reasons[0]


def test_what_is_no_such_model_is_refused(tmp_path: Path, clip_folder: Path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip"}))
    for wrong in (tmp_path / "nothing", tmp_path, clip_folder):
        with pytest.raises(ValueError, match="expected a vision-language model of transformers with its processor"):
            LocalVLM(weights=wrong)
