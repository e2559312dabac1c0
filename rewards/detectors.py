"""Object detectors for rewards that judge what is in a picture, and where."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol, final

import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoConfig, AutoImageProcessor, Mask2FormerForUniversalSegmentation

from diffalign.errors import first_line
from diffalign.rewards.geneval_rules import Detection

# COCO's 80 classes in COCO's order, under the names that GenEval's prompts give them (see NOTICE)
COCO = (
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light",
    "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow", "elephant",
    "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee", "skis", "snowboard",
    "sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard", "tennis racket", "bottle",
    "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple", "sandwich", "orange", "broccoli",
    "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch", "potted plant", "bed", "dining table", "toilet",
    "tv", "laptop", "computer mouse", "tv remote", "computer keyboard", "cell phone", "microwave", "oven", "toaster",
    "sink", "refrigerator", "book", "clock", "vase", "scissors", "teddy bear", "hair drier", "toothbrush",
)  # fmt: skip
REPO = "facebook/mask2former-swin-small-coco-instance"
TOP = 100  # pairs of a mask and a class that are looked at, as in COCO's evaluation

DETECTORS: dict[str, str] = {"mask2former": "diffalign.rewards.detectors:Mask2Former"}


class Detector(Protocol):
    """Finds objects of known classes."""

    @property
    def classes(self) -> tuple[str, ...]:
        """The names that it gives."""

    def __call__(self, picture: Image.Image, confidence: float) -> list[Detection]:
        """What is in an RGB picture, in any order; objects that are not above `confidence` may be left out."""


@final
class Mask2Former:
    """A Mask2Former for COCO's instances, by transformers. Cheng et al. 2022, arXiv 2112.01527.

    Not the weights of GenEval's own detector, which are mmdetection's of the same architecture: scores differ.

    Args:
        weights: folder or hub id with model and processor, instead of facebook/mask2former-swin-small-coco-instance.
        device: where the model lives.

    Raises:
        ValueError: a checkpoint that is not to be had, or not of this kind.
    """

    def __init__(self, *, weights: str | Path | None = None, device: torch.device | str = "cpu") -> None:
        self._model, self._processor = _load(str(weights or REPO))
        self._model.requires_grad_(False).eval().to(device)

    @property
    def classes(self) -> tuple[str, ...]:
        """COCO's 80."""
        return COCO

    @torch.no_grad()
    def __call__(self, picture: Image.Image, confidence: float) -> list[Detection]:
        """The objects of an RGB picture above `confidence`, with masks; see `instances`."""
        x = self._processor(images=[picture], return_tensors="pt")["pixel_values"]
        output = self._model(pixel_values=x.to(self._model.device))
        return instances(output.class_queries_logits[0], output.masks_queries_logits[0], picture.size, confidence)


def instances(
    class_logits: Tensor, mask_logits: Tensor, size: tuple[int, int], confidence: float, classes: tuple[str, ...] = COCO
) -> list[Detection]:
    """The objects above `confidence`, most probable class first, of one picture's queries.

    The confidence of a query and a class is the class's probability times the mean probability of the mask's pixels.
    Masks are enlarged as logits, as in mmdetection, and not at 384 pixels and then as bits, as transformers does, so
    that boxes are exact to the pixel; a box's right and bottom are the first column and row past its mask.

    Args:
        class_logits: [Q, C + 1], the last class is "no object".
        mask_logits: [Q, h, w] over the whole picture.
        size: (width, height) of the picture.
    """
    probability = class_logits.float().softmax(-1)[:, :-1]
    best, pair = probability.flatten().topk(min(TOP, probability.numel()))
    pair, best = pair[best > confidence], best[best > confidence]  # the mask can only lower it
    if not len(pair):
        return []
    queries, labels = pair // probability.shape[1], pair % probability.shape[1]
    logits = mask_logits[queries].float()[None]
    logits = F.interpolate(logits, size=(size[1], size[0]), mode="bilinear", align_corners=False)[0]
    masks = logits > 0
    inside = (logits.sigmoid() * masks).flatten(1).sum(1) / masks.flatten(1).sum(1).clamp(min=1)
    return [
        _detection(classes[label], mask, score)
        for label, mask, score in zip(labels.tolist(), masks, (best * inside).tolist(), strict=True)
        if score > confidence and mask.any()
    ]


def _detection(name: str, mask: Tensor, confidence: float) -> Detection:
    columns, rows = (mask.any(axis).nonzero().flatten().tolist() for axis in (0, 1))
    box = float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)
    return Detection(name, box, confidence, mask.cpu().numpy())


def _load(folder: str) -> tuple[Any, Any]:
    try:
        config = AutoConfig.from_pretrained(folder)
        if config.model_type != "mask2former":
            raise ValueError(f"its model_type is {config.model_type}, not mask2former")
        loaded: Any = Mask2FormerForUniversalSegmentation.from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True
        )
        processor = AutoImageProcessor.from_pretrained(folder)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ValueError(
            f"geneval: {folder} is no folder of a Mask2Former with its image processor, nor to be had from the hub "
            f"({first_line(error)}); with a network, run `hf download {REPO}` once, or give a local "
            f"copy: weights=FOLDER, on the command line --weights geneval=FOLDER"
        ) from error
    model, report = loaded
    if missing := sorted(report["missing_keys"]):
        raise ValueError(f"{folder}: the checkpoint lacks weights of a Mask2Former: {missing[:3]} ...")
    # by position and not by name: some checkpoints say motorbike and aeroplane
    names = [config.id2label[index] for index in sorted(config.id2label)]
    if len(names) != len(COCO) or (names[0], names[-1]) != (COCO[0], COCO[-1]):
        raise ValueError(f"{folder}: expected COCO's 80 classes, from person to toothbrush, got {len(names)}: "
                         f"{', '.join(names[:3])} ...")  # fmt: skip
    return model, processor
