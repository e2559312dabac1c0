"""A vision-language model of transformers on this machine, as a judge: greedy decoding, one question at a time."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, final

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from diffalign.answers import Answer
from diffalign.errors import first_line
from diffalign.rewards.preprocess import to_rgb
from diffalign.rewards.towers import dtype_named


@final
class LocalVLM:
    """An `Asker`: the pictures, then the text, in one user turn of the model's own chat template.

    Args:
        weights: folder or hub id of a model that transformers knows as image-text-to-text, with its processor.
        device: where it lives.
        dtype: float32, bfloat16 or float16.
        max_tokens: of one answer; an answer that is cut there is missing.

    Raises:
        ValueError: a checkpoint that is not to be had or is none of these.
    """

    workers: ClassVar[int] = 1

    def __init__(
        self,
        *,
        weights: str | Path,
        device: torch.device | str = "cpu",
        dtype: str = "bfloat16",
        max_tokens: int = 1024,
    ) -> None:
        if max_tokens < 1:
            raise ValueError(f"max_tokens: expected at least 1, got {max_tokens}")
        self.processor, self.model = load_vlm(weights, device, dtype)
        self.max_tokens = max_tokens
        self._ends = _end_tokens(self.model.generation_config.eos_token_id)
        self._turn = threading.Lock()

    @torch.no_grad()
    def ask(self, pictures: Sequence[Image.Image], text: str) -> Answer:
        """The answer to `text`, which follows the pictures.

        Raises:
            ValueError: a picture with more than 8 bits per channel.
        """
        inputs = user_turn(self.processor, pictures, text).to(self.model.device, self.model.dtype)
        with self._turn:
            # checkpoints bring sampling settings of their own, which transformers warns of unless they are unset
            made = self.model.generate(
                **inputs, max_new_tokens=self.max_tokens, do_sample=False, temperature=None, top_p=None, top_k=None
            )
        written = made[0, inputs["input_ids"].shape[1] :]
        if int(written[-1]) not in self._ends:
            return Answer(None, f"the answer was cut after max_tokens ({self.max_tokens}); give more")
        return Answer(self.processor.batch_decode(written[None], skip_special_tokens=True)[0])


def load_vlm(weights: str | Path, device: torch.device | str, dtype: str) -> tuple[Any, Any]:
    """(processor, frozen model in eval mode) of a folder or hub id.

    Raises:
        ValueError: an unknown dtype, or a checkpoint that is not to be had or not image-text-to-text.
    """
    number = dtype_named(dtype)
    try:
        processor = AutoProcessor.from_pretrained(str(weights))
        model: Any = AutoModelForImageTextToText.from_pretrained(str(weights), dtype=number)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"{weights}: expected a vision-language model of transformers with its processor, could not load it "
            f"({first_line(error)}); with a network, run `hf download {weights}` once, or give a folder as weights"
        ) from error
    return processor, model.to(device).requires_grad_(False).eval()


def user_turn(processor: Any, pictures: Sequence[Image.Image], text: str) -> Any:
    """What the model reads when a user shows the pictures, then says the text, and it is to answer.

    Raises:
        ValueError: a picture with more than 8 bits per channel.
    """
    parts: list[dict[str, Any]] = [{"type": "image", "image": to_rgb(picture)} for picture in pictures]
    turns = [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]
    return processor.apply_chat_template(
        turns, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )


def _end_tokens(ids: int | list[int] | None) -> set[int]:
    if ids is None:
        raise ValueError("expected a model whose generation config has an eos_token_id, got one without")
    return {ids} if isinstance(ids, int) else set(ids)
