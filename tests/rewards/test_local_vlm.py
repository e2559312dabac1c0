"""A judge on this machine: a random Qwen2.5-VL of two narrow layers, with a tokenizer of single bytes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from loopback import gray
from PIL import Image
from tiny_qwen import qwen25_vl

from diffalign.rewards import load_reward
from diffalign.rewards.local_vlm import LocalVLM


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return qwen25_vl(tmp_path_factory.mktemp("vlm"))


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
