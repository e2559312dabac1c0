"""The models behind GenEval's rules: the CLIP that names colors, and a small random Mask2Former."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, Mask2FormerImageProcessor, SwinConfig

from diffalign.rewards import load_reward
from diffalign.rewards.detectors import COCO, Mask2Former, instances
from diffalign.rewards.geneval_colors import ColorNamer, cut_out
from diffalign.rewards.geneval_rules import COLORS, Detection
from diffalign.rewards.preprocess import square_recipe

RGB = {
    "red": (230, 20, 20), "orange": (255, 140, 0), "yellow": (250, 240, 30), "green": (20, 180, 20),
    "blue": (20, 20, 230), "purple": (110, 20, 150), "pink": (255, 120, 190), "brown": (120, 70, 20),
    "black": (0, 0, 0), "white": (255, 255, 255),
}  # fmt: skip
METADATA = {"a red dog": {"include": [{"class": "dog", "color": "red"}]}}


class ByEye:
    """A tower whose features are the mean color; the third sentence misleads, loudly."""

    recipe = square_recipe(8, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    scale = 100.0

    def __init__(self) -> None:
        self.asked: list[str] = []

    def image_features(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean((2, 3))

    def text_features(self, prompts: Sequence[str]) -> torch.Tensor:
        self.asked += prompts
        return torch.stack([self._text(prompt) for prompt in prompts])

    def too_long(self, prompts: Sequence[str]) -> list[str]:
        return []

    def _text(self, prompt: str) -> torch.Tensor:
        x = torch.tensor(RGB[prompt.split()[4].removesuffix("-colored")]) / 127.5 - 1
        return -100 * x if prompt.endswith("object") else x


def test_each_color_is_named_from_three_sentences_of_equal_weight():
    tower = ByEye()
    namer = ColorNamer(tower)
    picture = Image.new("RGB", (100, 10))
    for index, color in enumerate(COLORS):
        picture.paste(RGB[color], (10 * index, 0, 10 * index + 10, 10))
    objects = [Detection("dog", (10 * index, 0, 10 * index + 10, 10), 0.9) for index in range(10)]
    assert namer(picture, objects, "dog") == list(COLORS)
    assert namer(picture, objects[3:4], "dog") == ["green"]
    assert tower.asked[:3] == ["a photo of a red dog", "a photo of a red-colored dog", "a photo of a red object"]
    assert len(tower.asked) == 30
    namer(picture, objects, "cat")
    assert len(tower.asked) == 60


def test_what_is_not_the_object_is_gray():
    picture = Image.new("RGB", (20, 20), RGB["blue"])
    picture.paste(RGB["red"], (5, 5, 8, 8))
    mask = np.zeros((20, 20), bool)
    mask[5:8, 5:8] = True
    box = (0.4, 2.6, 11.5, 12.0)
    bare, masked = (np.array(cut_out(picture, Detection("dog", box, 0.9, m))) for m in (None, mask))
    assert bare.shape == masked.shape == (9, 12, 3)
    assert (masked[2:5, 5:8] == RGB["red"]).all() and (masked == (153, 153, 153)).all(-1).sum() == 9 * 12 - 9
    assert (bare[0, 0] == RGB["blue"]).all()
    assert ColorNamer(ByEye())(picture, [Detection("dog", box, 0.9)], "dog") == ["blue"]
    assert cut_out(picture, Detection("dog", (3.1, 3.1, 3.2, 3.3), 0.9)).size == (1, 1)


def test_a_color_is_judged_by_the_clip_that_is_given(clip_folder: Path):
    """A random CLIP is wrong about colors, but always in the same way: some color passes, and one only."""
    found = [Detection("dog", (2, 2, 30, 30), 0.9)]
    detector = type("Finds", (), {"classes": COCO, "__call__": lambda self, picture, confidence: found})()
    rows = {color: {"include": [{"class": "dog", "color": color}]} for color in COLORS}
    reward = load_reward("geneval", metadata=rows, detector=detector, color_model=str(clip_folder))
    picture = Image.new("RGB", (32, 32), "red")
    scores = reward([picture] * 10, list(COLORS))
    assert scores.sum() == 1 and torch.equal(scores, reward([picture] * 10, list(COLORS)))


def test_no_clip_is_loaded_where_no_color_is_asked_for(tmp_path: Path):
    detector = type("Finds", (), {"classes": COCO, "__call__": lambda self, picture, confidence: []})()
    load_reward("geneval", metadata={"a": {"include": [{"class": "dog"}]}}, detector=detector, color_model="nowhere")
    with pytest.raises(ValueError, match=r"geneval, the CLIP that names colors \(color_weights"):
        load_reward("geneval", metadata=METADATA, detector=detector, color_weights=tmp_path / "none")


def logits(*classes: tuple[int, float]) -> torch.Tensor:
    """[Q, 81] of queries that are one class with this probability, else nothing."""
    x = torch.full((len(classes), 81), -50.0)
    for row, (label, probability) in enumerate(classes):
        x[row, label], x[row, 80] = torch.tensor([probability, 1 - probability]).log()
    return x


def test_instances_by_hand():
    masks = torch.full((4, 8, 8), -9.0)
    masks[0, 2:4, 1:6] = 9.0
    masks[1, :, 7] = 2.0
    masks[3] = 9.0
    found = instances(logits((16, 0.8), (15, 0.9), (0, 0.9), (0, 0.3)), masks, (8, 8), 0.3)
    assert [(one.name, one.box) for one in found] == [("cat", (7, 0, 8, 8)), ("dog", (1, 2, 6, 4))]
    assert found[0].confidence == pytest.approx(0.9 * torch.tensor(2.0).sigmoid().item(), abs=1e-6)
    assert found[1].confidence == pytest.approx(0.8, abs=2e-4)
    assert found[1].mask.dtype == bool and found[1].mask.sum() == 10
    assert instances(logits((16, 0.3)), masks[:1], (8, 8), 0.3) == []


def test_boxes_are_in_pixels_of_the_picture():
    masks = torch.full((1, 8, 8), -9.0)
    masks[0, 4:, 2:4] = 9.0
    (found,) = instances(logits((16, 0.9)), masks, (160, 40), 0.3)
    assert found.mask.shape == (40, 160)
    assert found.box == (40, 20, 80, 40)  # the zero between equal logits is half way between their centers


@pytest.fixture(scope="module")
def mask2former_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As the hub has it: model and image processor, and COCO's classes under other names."""
    folder = tmp_path_factory.mktemp("mask2former")
    names = ["motorbike" if name == "motorcycle" else name for name in COCO]
    stages = ["stage1", "stage2", "stage3", "stage4"]
    backbone = SwinConfig(image_size=64, embed_dim=8, depths=[1] * 4, num_heads=[1] * 4, window_size=2,
                          out_features=stages)  # fmt: skip
    config = Mask2FormerConfig(
        backbone_config=backbone, feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_feedforward_dim=16,
        encoder_layers=1, decoder_layers=2, num_attention_heads=2, dim_feedforward=16, num_queries=12,
        id2label=dict(enumerate(names)), label2id={name: index for index, name in enumerate(names)},
    )  # fmt: skip
    torch.manual_seed(0)
    Mask2FormerForUniversalSegmentation(config).save_pretrained(folder)
    Mask2FormerImageProcessor(size={"height": 64, "width": 64}).save_pretrained(folder)
    return folder


def test_mask2former_finds_what_transformers_finds(mask2former_folder: Path, photographs: list[Image.Image]):
    """The same classes, and confidences up to the size at which a mask's mean is taken (transformers: 384 pixels)."""
    detector = Mask2Former(weights=mask2former_folder)
    model, processor = detector._model, detector._processor
    picture = photographs[2]
    found = detector(picture, 0.0)
    with torch.no_grad():
        output = model(**processor(images=[picture], return_tensors="pt"))
    reference = processor.post_process_instance_segmentation(output, threshold=0.0)[0]["segments_info"]
    ours = sorted((one.confidence, one.name) for one in found)[-8:]
    theirs = sorted((one["score"], COCO[one["label_id"]]) for one in reference)[-8:]
    assert [name for _, name in ours] == [name for _, name in theirs]
    assert [score for score, _ in ours] == pytest.approx([score for score, _ in theirs], rel=0.02)
    for one in found:
        left, top, right, bottom = map(int, one.box)
        assert one.mask.shape == picture.size[::-1]
        assert one.mask[top:bottom, left:right].sum() == one.mask.sum()
        assert one.mask[:, left].any() and one.mask[:, right - 1].any()


def test_the_whole_reward_on_it(mask2former_folder: Path, clip_folder: Path, photographs: list[Image.Image]):
    """What the random detector believes most is there, in the one color that the random CLIP sees, or not at 0.3."""
    name = Mask2Former(weights=mask2former_folder)(photographs[0], 0.0)[0].name
    rows = {color: {"include": [{"class": name, "color": color}]} for color in COLORS}
    common = {"weights": mask2former_folder, "color_model": str(clip_folder), "metadata": rows}
    believes = load_reward("geneval", confidence=0.0, **common)
    assert believes([photographs[0]] * 10, list(COLORS)).sum() == 1
    assert load_reward("geneval", **common)([photographs[0]] * 10, list(COLORS)).sum() == 0


def test_other_checkpoints_are_refused(mask2former_folder: Path, clip_folder: Path, tmp_path: Path):
    with pytest.raises(ValueError, match="model_type is clip, not mask2former"):
        Mask2Former(weights=clip_folder)
    with pytest.raises(ValueError, match="--weights geneval=FOLDER"):
        Mask2Former(weights=tmp_path / "none")
    config = Mask2FormerConfig.from_pretrained(mask2former_folder)
    for file in mask2former_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config.id2label = {index: f"LABEL_{index}" for index in range(80)}
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="expected COCO's 80 classes, from person to toothbrush, got 80: LABEL_0"):
        Mask2Former(weights=tmp_path)
