"""GenEval: objects, counts, colors and positions, judged by a detector. Ghosh et al. 2023, arXiv 2310.11513.

    score = 1 if a picture shows what its prompt asks for, else 0

The rules are those of the released code to the last case (`geneval_rules`). The detector is not: the released code runs
mmdetection's Mask2Former in an environment of 2022, this one transformers' Mask2Former with weights of another training
run. Scores are therefore called geneval-hf, and are not those of papers. The second deviation: CLIP names colors with
QuickGELU, which its weights were trained with; the released code, under open_clip 3, leaves it out.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, final

import torch
from PIL import Image
from torch import Tensor

from diffalign.rewards.base import Card, Images, dispatch
from diffalign.rewards.detectors import DETECTORS, REPO, Detector
from diffalign.rewards.geneval_colors import ColorNamer
from diffalign.rewards.geneval_rules import (
    CONFIDENCE,
    COUNTING_CONFIDENCE,
    Detection,
    Task,
    Verdict,
    judge,
    keep,
)
from diffalign.rewards.geneval_tasks import read_tasks
from diffalign.rewards.preprocess import to_rgb
from diffalign.rewards.towers import load_tower
from diffalign.table import build

MODES = ("pass", "score")
CLIP = "open_clip:ViT-L-14-quickgelu/openai"


@final
class GenEval:
    """1.0 for a picture that shows what its prompt asks for, else 0.0 (or the share of requirements that hold).

    Args:
        metadata: GenEval's evaluation_metadata.jsonl, or a mapping prompt -> such a row; see `read_tasks`.
        mode: "pass" for 1.0 or 0.0; "score" for the share of requirements (rows of include and exclude) that hold.
        detector: a row of `DETECTORS`, a dotted path "package.module:Class" of your own, or a `Detector`.
        weights: of the detector: folder or hub id, instead of facebook/mask2former-swin-small-coco-instance.
        color_model: the CLIP that names colors, as `load_tower` takes it; loaded only if some prompt asks for one.
        color_weights: a local copy of it.
        confidence: boxes that are not above it do not count.
        counting_confidence: the same for prompts whose tag is "counting".
        max_overlap: boxes of one class that overlap by this much count once; 1 lets all count.
        device: where the models live.

    Raises:
        ValueError: unknown mode, metadata or a checkpoint that cannot be read; when called, a prompt that is not in the
            metadata.
    """

    name: ClassVar[str] = "geneval"
    card: ClassVar[Card] = Card(
        unit="1 or 0 (geneval-hf)",
        range=(0.0, 1.0),
        source=f"{REPO}, not the official detector; {CLIP} for colors; arXiv 2310.11513",
        code="MIT",
        weights='"other" (detector), MIT (CLIP)',
        differentiable=False,
        side=None,
        across_prompts=True,
        checked="official code, no weights",
    )

    def __init__(
        self,
        metadata: str | Path | Mapping[str, Mapping[str, Any]],
        *,
        mode: str = "pass",
        detector: str | Detector = "mask2former",
        weights: str | Path | None = None,
        color_model: str = CLIP,
        color_weights: str | Path | None = None,
        confidence: float = CONFIDENCE,
        counting_confidence: float = COUNTING_CONFIDENCE,
        max_overlap: float = 1.0,
        device: torch.device | str = "cpu",
    ) -> None:
        if mode not in MODES:
            raise ValueError(f"geneval.mode: expected one of {', '.join(MODES)}, got {mode!r}")
        self.mode = mode
        self._detector = _detector(detector, weights, device)
        self._tasks = read_tasks(metadata, self._detector.classes)
        self._confidence, self._counting_confidence = confidence, counting_confidence
        self._max_overlap = max_overlap
        colored = any(wanted.color for task in self._tasks.values() for wanted in task.include)
        self._colors = _color_namer(color_model, color_weights, device) if colored else None

    def __call__(self, images: Images, prompts: Sequence[str]) -> Tensor:
        """Scores [B]; see `Reward.__call__`. Float pixels are rounded to 8 bits first."""
        return dispatch(self.name, images, prompts, exact=self._score, differentiable=None)

    def verdicts(self, pictures: Sequence[Image.Image], prompts: Sequence[str]) -> list[Verdict]:
        """For each picture whether it passes, and if not, why: `str` of each fault says so.

        Raises:
            ValueError: a prompt that is not in the metadata.
        """
        tasks = [self._task(prompt) for prompt in prompts]
        return [self._verdict(to_rgb(picture), task) for picture, task in zip(pictures, tasks, strict=True)]

    def _score(self, pictures: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        verdicts = self.verdicts(pictures, prompts)
        return torch.tensor([float(v.ok) if self.mode == "pass" else v.score for v in verdicts])

    def _verdict(self, picture: Image.Image, task: Task) -> Verdict:
        confidence = self._counting_confidence if task.counting else self._confidence
        found = keep(self._detector(picture, confidence), confidence, max_overlap=self._max_overlap)
        return judge(found, task, partial(self._name_colors, picture))

    def _name_colors(self, picture: Image.Image, objects: Sequence[Detection], name: str) -> list[str]:
        assert self._colors is not None  # there is a prompt that asks for a color
        return self._colors(picture, objects, name)

    def _task(self, prompt: str) -> Task:
        if prompt not in self._tasks:
            near = difflib.get_close_matches(prompt, self._tasks, n=1)
            hint = f"; the nearest is {near[0]!r}" if near else ""
            raise ValueError(f"geneval: expected a prompt of its metadata ({len(self._tasks)} prompts), got "
                             f"{prompt!r}{hint}")  # fmt: skip
        return self._tasks[prompt]


def _detector(detector: str | Detector, weights: str | Path | None, device: torch.device | str) -> Detector:
    if not isinstance(detector, str):
        return detector
    made: Detector = build(DETECTORS, detector, what="detector", weights=weights, device=device)
    return made


def _color_namer(model: str, weights: str | Path | None, device: torch.device | str) -> ColorNamer:
    try:
        return ColorNamer(load_tower(model, weights, device, reward="geneval"))
    except ValueError as error:
        raise ValueError(f"geneval, the CLIP that names colors (color_weights names a local copy): {error}") from error
