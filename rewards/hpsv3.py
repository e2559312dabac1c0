"""HPSv3: Qwen2-VL-7B with a regression head, trained on human choices. Ma et al. 2025, arXiv 2508.03789.

    (mu, sigma) = head(hidden state at <|Reward|>),   score = mu

The model is asked in the words that it was trained on (assets/rubrics/hpsv3.json). mu and sigma are of a Gaussian over
the score; the released code returns both and ranks by mu. Model averages in its tables go from -0.2 (SD2) to 10.6
(Kolors). Deviations from the released code: a caption cannot spell a token of the model (`asked` in rubrics.py), and
thin pictures get a side of 28 pixels instead of none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, final

import torch
from PIL import Image
from torch import Tensor, nn

from diffalign.rewards.base import Card, Images, dispatch
from diffalign.rewards.checkpoints import HubFile, load_strictly, read_state
from diffalign.rewards.qwen_pictures import picture, pixels
from diffalign.rewards.qwen_reward import QwenReader, load_body, load_tokenizer
from diffalign.rewards.rubrics import asked
from diffalign.rewards.towers import dtype_named

FILE = HubFile("MizzenAI/HPSv3", "HPSv3.safetensors")
TOKEN = "<|Reward|>"
BUDGET = 256 * 28 * 28  # pixels, least and most alike
OUTPUTS = ("mu", "sigma")


@final
class HPSv3:
    """mu of HPSv3, or sigma, which says how sure it is.

    Args:
        weights: HPSv3.safetensors (16.6 GB), a folder that holds it, or a hub id with it, instead of MizzenAI/HPSv3.
        base: folder or hub id of Qwen2-VL-7B-Instruct; only its config and tokenizer are read.
        device: where the network lives; pixels are brought there.
        dtype: of the transformer: bfloat16 as released, float16 or float32. The head is fp32 whatever it is.
        output: "mu" or "sigma".

    Raises:
        ValueError: a checkpoint that is not to be had, or of another layout; when called, a picture whose sides differ
            by more than a factor of 200.
    """

    name: ClassVar[str] = "hpsv3"
    card: ClassVar[Card] = Card(
        unit="mu, mostly -3 to 15",
        range=(-float("inf"), float("inf")),
        source=f"{FILE.repo}, {FILE.name}; arXiv 2508.03789",
        code="MIT",
        weights="not stated; the code is MIT",
        differentiable=True,
        side=None,
        across_prompts=False,
        checked="official code, small weights",
    )

    def __init__(
        self,
        *,
        weights: str | Path | None = None,
        base: str = "Qwen/Qwen2-VL-7B-Instruct",
        device: torch.device | str = "cpu",
        dtype: str = "bfloat16",
        output: str = "mu",
    ) -> None:
        if output not in OUTPUTS:
            raise ValueError(f"hpsv3.output: expected one of {', '.join(OUTPUTS)}, got {output!r}")
        kind = dtype_named(dtype)
        path = FILE.locate(self.name, weights)
        state = read_state(path)
        state = state.get("model", state)  # checkpoints of the training code hold it one level down
        tokenizer = load_tokenizer(base, [TOKEN], self.name)
        body = {key: value for key, value in state.items() if not key.startswith(("rm_head.", "lm_head."))}
        model = load_body(body, base, len(tokenizer), path, kind, self.name).to(device)
        self.reader = QwenReader(model, tokenizer, (tokenizer.convert_tokens_to_ids(TOKEN),), "image")
        self.head = regression_head(state, path).to(device)
        self.column = OUTPUTS.index(output)

    def __call__(self, images: Images, prompts: Sequence[str]) -> Tensor:
        """Scores [B]; see `Reward.__call__`."""
        return dispatch(self.name, images, prompts, exact=self._score_pictures, differentiable=self._score_pixels)

    def _score_pictures(self, pictures: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        return self._score([picture(image, BUDGET, BUDGET) for image in pictures], prompts)

    def _score_pixels(self, x: Tensor, prompts: Sequence[str]) -> Tensor:
        return self._score(list(pixels(x, BUDGET, BUDGET).split(1)), prompts)

    def _score(self, seen: Sequence[Tensor], prompts: Sequence[str]) -> Tensor:
        questions = [asked("hpsv3", prompt, self.reader.tokenizer) for prompt in prompts]
        scores: Tensor = self.head(self.reader(seen, questions)[:, 0])[:, self.column]
        return scores


def regression_head(state: Mapping[str, Any], where: Path) -> nn.Sequential:
    """D -> 1024 -> 16 -> 2 with ReLU between, fp32; the dropout is an identity, so that the layers keep their numbers.

    Raises:
        ValueError: a missing or surplus key, or another shape.
    """
    own = {key.removeprefix("rm_head."): value for key, value in state.items() if key.startswith("rm_head.")}
    width = own["0.weight"].shape[-1] if "0.weight" in own else 1
    head = nn.Sequential(nn.Linear(width, 1024), nn.ReLU(), nn.Identity(), nn.Linear(1024, 16), nn.ReLU(),
                         nn.Linear(16, len(OUTPUTS)))  # fmt: skip
    load_strictly(head, own, where)
    return head.requires_grad_(False).eval()
