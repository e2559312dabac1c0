"""Whether a picture shows the text that its prompt quotes, as Flow-GRPO asks it. Liu et al. 2025, arXiv 2505.05470.

    score = 1 - min(distance(text, target), len(target)) / len(target)

The target stands between the first two double quotes of the prompt. Both texts are lower case and without spaces; the
distance is 0 where the target is part of the text, else Levenshtein's. What reads the picture is not part of the rule,
and the released code reads with PaddleOCR 2: scores of different engines must not be compared.

Two deviations from the released code: a prompt without a quoted text is an error that says so, not an IndexError; and a
picture that the engine fails on scores NaN, not 0, which a training run could not tell from a wrong text.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, final

import torch
from PIL import Image
from torch import Tensor

from diffalign.rewards.base import Card, Images, dispatch
from diffalign.rewards.missing import MISSING, of_clips, tell_missing
from diffalign.rewards.preprocess import to_rgb
from diffalign.table import resolve

Lines = Sequence[tuple[str, float]]  # (text, confidence), in reading order
Engine = Callable[[Image.Image], Lines]

ENGINES: dict[str, str] = {"rapidocr": "diffalign.rewards.ocr:RapidOCR"}


@final
class OCR:
    """The share of the quoted text that can be read in the picture, in [0, 1]; NaN where the engine fails.

    `reasons` keeps, of the latest call, why a picture has no score; "" where it has one. A clip's score is the mean
    over its frames, and missing if one of them is.

    Args:
        engine: a row of `ENGINES`, a dotted path "package.module:function" (or class, made without arguments), or a
            function: RGB picture -> [(text, confidence)]. Lines whose confidence is not above 0 are not read.

    Raises:
        ValueError: an engine that is not to be had; when called, a prompt without quoted text, or an engine that
            returns something else.
    """

    name: ClassVar[str] = "ocr"
    card: ClassVar[Card] = Card(
        unit="1 - distance / length",
        range=(0.0, 1.0),
        source="rapidocr, or an engine of one's own; arXiv 2505.05470",
        code="MIT",
        weights="that of the engine (rapidocr: Apache-2.0)",
        differentiable=False,
        side=None,
        across_prompts=True,
        checked="official code, no weights",
    )

    def __init__(self, engine: str | Engine = "rapidocr") -> None:
        self._engine = load_engine(engine) if isinstance(engine, str) else engine
        self.reasons: list[str] = []

    def __call__(self, images: Images, prompts: Sequence[str]) -> Tensor:
        """Scores [B]; see `Reward.__call__`. Float pixels are rounded to 8 bits first."""
        scores = dispatch(self.name, images, prompts, exact=self._score, differentiable=None)
        self.reasons = of_clips(self.reasons, len(images))
        tell_missing(self.name, self.reasons)
        return scores

    def _score(self, pictures: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        targets = [quoted(prompt) for prompt in prompts]  # before anything is read: that takes a second a picture
        pictures = [to_rgb(picture) for picture in pictures]
        verdicts = [self._judge(picture, target) for picture, target in zip(pictures, targets, strict=True)]
        self.reasons = [reason for _, reason in verdicts]
        return torch.tensor([score for score, _ in verdicts])

    def _judge(self, picture: Image.Image, target: str) -> tuple[float, str]:
        """(score, "") or (NaN, reason)."""
        try:
            lines = self._engine(picture)
        except Exception as error:  # any engine may be here, and each has errors of its own
            size = f"{picture.width} x {picture.height}"
            return MISSING, f"the engine failed on a picture of {size} pixels: {error!r:.200}"
        return similarity(joined(lines), target), ""


def load_engine(name: str) -> Engine:
    """The engine of a row of `ENGINES`, or of a dotted path.

    Raises:
        ValueError: unknown, or its package is not installed.
    """
    found: Any = resolve(ENGINES, name, "OCR engine")
    engine: Any = found() if inspect.isclass(found) else found
    return engine


def quoted(prompt: str) -> str:
    """What stands between the first two double quotes of a prompt.

    Raises:
        ValueError: there are no two, or nothing but spaces between them.
    """
    parts = prompt.split('"', 2)
    if len(parts) < 3 or not squeezed(parts[1]):
        raise ValueError(f'ocr: expected a prompt with the text to read in double quotes, such as: a sign that says '
                         f'"open"; got {prompt!r}')  # fmt: skip
    return parts[1]


def joined(lines: Lines) -> str:
    """The texts of lines, one after the other; those with a confidence that is not above 0 are left out.

    Raises:
        ValueError: not pairs of a text and a number.
    """
    try:
        return "".join(text for text, confidence in lines if confidence > 0)
    except (TypeError, ValueError) as error:
        raise ValueError(f"ocr: expected the engine to return [(text, confidence), ...], got {lines!r:.200}") from error


def similarity(text: str, target: str) -> float:
    """1 - d / len(target) in [0, 1], of texts in lower case without spaces.

    d is 0 where the target is part of the text, else Levenshtein's distance, at most len(target).
    """
    text, target = squeezed(text), squeezed(target)
    distance = 0 if target in text else min(levenshtein(text, target), len(target))
    return 1 - distance / len(target)


def squeezed(text: str) -> str:
    """Lower case, without spaces."""
    return text.replace(" ", "").lower()


def levenshtein(first: str, second: str) -> int:
    """The least number of inserted, deleted and replaced letters between two texts (Wagner and Fischer 1974)."""
    row = list(range(len(second) + 1))
    for i, a in enumerate(first, start=1):
        diagonal, row[0] = row[0], i
        for j, b in enumerate(second, start=1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (a != b))
    return row[-1]


@final
class RapidOCR:
    """PaddleOCR's small models in ONNX, which the package `rapidocr` ships: nothing is downloaded.

    Raises:
        ValueError: the packages are not installed.
    """

    def __init__(self) -> None:
        try:
            import onnxruntime  # noqa: F401  rapidocr asks for it only when it reads the first picture
            import rapidocr
        except ImportError as error:
            raise ValueError(f"ocr: the engine 'rapidocr' needs packages that are not installed ({error}); "
                             f"pip install 'diffalign[ocr]', or name another: engine=package.module:function"
                             ) from error  # fmt: skip
        self._read = rapidocr.RapidOCR(params={"Global.log_level": "error"})

    def __call__(self, picture: Image.Image) -> list[tuple[str, float]]:
        """Lines with a confidence of at least 0.5, rapidocr's own bound; none for a picture without text."""
        found = self._read(picture)
        return list(zip(found.txts or (), found.scores or (), strict=True))
