"""VQAScore with any vision-language model of transformers: how likely it says Yes. Lin et al. 2024, arXiv 2404.01291.

    score = P("Yes" | picture, 'Does this figure show "CAPTION"? Please answer Yes or No.')

The question is that of t2v_metrics 3.1 for chat models. The paper's own model, CLIP-FlanT5, has another question,
another layout and sqrt(P(Yes) P(end | Yes)); it is not read here, and numbers of different models do not compare.
Deviations from t2v_metrics: one forward pass instead of generating, so no sampling setting of the checkpoint counts;
special tokens in a caption are spelled as text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, final

import torch
from PIL import Image
from torch import Tensor

from diffalign.rewards.base import Card, Images, dispatch
from diffalign.rewards.local_vlm import load_vlm, user_turn
from diffalign.rewards.rubrics import harmless

QUESTION = 'Does this figure show "{}"? Please answer Yes or No.'
OUTPUTS: dict[str, tuple[Callable[[Tensor], Tensor], str, tuple[float, float]]] = {
    "probability": (torch.exp, "probability of the answer", (0.0, 1.0)),
    "logit": (
        lambda logs: logs - torch.log(-torch.expm1(logs)),
        "log-odds of the answer",
        (-float("inf"), float("inf")),
    ),
}


@final
class VQAScore:
    """The probability of an answer, in fp32 from the logits; of an answer of several tokens, their geometric mean.

    Pictures are shown one at a time, by the model's own processor, so no score depends on its batch.

    Args:
        weights: folder or hub id of a model that transformers knows as image-text-to-text, with its processor.
        question: with {} where the caption goes.
        answer: what the model should say.
        output: "probability", or "logit" for its log-odds.
        device: where the model lives.
        dtype: of the model: bfloat16, float16 or float32.

    Raises:
        ValueError: a checkpoint that is not to be had or is none of these, a question without {}, an empty answer or an
            unknown output.
    """

    name: ClassVar[str] = "vqascore"
    card: Card = Card(
        unit="probability of the answer",
        range=(0.0, 1.0),
        source="any image-text-to-text model; arXiv 2404.01291, question of t2v_metrics 3.1",
        code="Apache-2.0",
        weights="the model's own",
        differentiable=False,
        side=None,
        across_prompts=True,
        checked="formula only",
    )

    def __init__(
        self,
        *,
        weights: str | Path = "Qwen/Qwen2.5-VL-7B-Instruct",
        question: str = QUESTION,
        answer: str = "Yes",
        output: str = "probability",
        device: torch.device | str = "cpu",
        dtype: str = "bfloat16",
    ) -> None:
        if question.count("{}") != 1:
            raise ValueError(f"vqascore.question: expected one {{}} where the caption goes, got {question!r}")
        if output not in OUTPUTS:
            raise ValueError(f"vqascore.output: expected one of {', '.join(OUTPUTS)}, got {output!r}")
        self.processor, self.model = load_vlm(weights, device, dtype)
        self.answer: list[int] = self.processor.tokenizer(answer, add_special_tokens=False).input_ids
        if not self.answer:
            raise ValueError(f"vqascore.answer: expected what the model should say, got {answer!r}")
        self.question = question
        self._transform, unit, bounds = OUTPUTS[output]
        self.card = replace(self.card, unit=unit, range=bounds)

    def __call__(self, images: Images, prompts: Sequence[str]) -> Tensor:
        """Scores [B]; see `Reward.__call__`."""
        return dispatch(self.name, images, prompts, exact=self._score, differentiable=None)

    def _score(self, pictures: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        logs = [self._log_probability(picture, prompt) for picture, prompt in zip(pictures, prompts, strict=True)]
        return self._transform(torch.stack(logs)).float()

    def _log_probability(self, picture: Image.Image, caption: str) -> Tensor:
        """Mean over the answer's tokens, fp64: log-odds near certainty need more than fp32 has."""
        text = self.question.replace("{}", harmless(caption, self.processor.tokenizer))
        inputs = user_turn(self.processor, [picture], text).to(self.model.device, self.model.dtype)
        answer = torch.tensor(self.answer, device=self.model.device)
        logits = self.model(**_continued(inputs, answer[:-1]), use_cache=False).logits[0, -len(answer) :]
        logs = logits.double().log_softmax(-1)
        return logs.gather(-1, answer[:, None]).mean().cpu()


def _continued(inputs: Any, tokens: Tensor) -> dict[str, Any]:
    """The inputs with more tokens of text at their end; whatever else is there per token gets the value of text, 0."""
    length = inputs["input_ids"].shape[1]
    more = {"input_ids": tokens[None], "attention_mask": torch.ones_like(tokens)[None]}
    return {
        key: torch.cat([value, more.get(key, torch.zeros_like(tokens)[None]).to(value)], 1)
        if isinstance(value, Tensor) and value.shape == (1, length)
        else value
        for key, value in inputs.items()
    }
