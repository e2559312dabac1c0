"""GenEval's rules against 240 pictures' worth of boxes and 200 pairs of boxes that the released code judged."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from PIL import Image

from diffalign.rewards import geneval_rules as rules
from diffalign.rewards import load_reward
from diffalign.rewards.detectors import COCO
from diffalign.rewards.geneval_rules import COLORS, Detection, Requirement, Task, judge, keep, overlap, relations
from diffalign.rewards.geneval_tasks import read_tasks

GOLDEN = oracle.golden("geneval")
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


def detections(case: dict[str, Any]) -> list[Detection]:
    boxes = [(name, [float(np.float32(v)) for v in box]) for name, boxes in case["detections"].items() for box in boxes]
    return [Detection(name, tuple(box[:4]), box[4]) for name, box in boxes]


def task_of(case: dict[str, Any]) -> Task:
    return read_tasks({"": case["row"]}, COCO)[""]


def by_column(objects, name) -> list[str]:
    """The color that stood in for CLIP's when the golden verdicts were made."""
    return [COLORS[int(one.box[0]) % 10] for one in objects]


def verdict(case: dict[str, Any], shuffled: random.Random | None = None) -> rules.Verdict:
    task, boxes = task_of(case), detections(case)
    if shuffled:
        shuffled.shuffle(boxes)
    return judge(keep(boxes, rules.COUNTING_CONFIDENCE if task.counting else rules.CONFIDENCE), task, by_column)


def agree() -> int:
    return sum(verdict(case).ok == case["correct"] for case in GOLDEN["cases"])


def thing(name: str, left: float = 0, top: float = 0, confidence: float = 0.95, size: float = 10) -> Detection:
    return Detection(name, (left, top, left + size, top + size), confidence)


def test_classes_and_constants_are_genevals():
    assert list(COCO) == GOLDEN["classes"]
    assert GOLDEN["constants"] == {
        "threshold": rules.CONFIDENCE, "counting_threshold": rules.COUNTING_CONFIDENCE, "max_objects": rules.MOST,
        "max_overlap": 1.0, "position_threshold": rules.SLACK,
    }  # fmt: skip


def test_every_verdict_and_every_fault_is_the_official_one():
    for case in GOLDEN["cases"]:
        found = verdict(case)
        assert found.ok == case["correct"], case
        assert [list(dataclasses.astuple(fault)) for fault in found.faults] == case["faults"], case


def test_the_same_boxes_are_kept():
    for case in GOLDEN["cases"]:
        wanted = {name: [detections({"detections": {name: case["detections"][name]}})[i] for i in indices]
                  for name, indices in case["kept"].items()}  # fmt: skip
        assert keep(detections(case), rules.COUNTING_CONFIDENCE if task_of(case).counting else 0.3) == wanted


def test_every_relation_and_every_overlap_is_the_official_one():
    for a, b, sides, iou in GOLDEN["geometry"]:
        assert list(relations(tuple(a), tuple(b))) == sides
        assert overlap(tuple(a), tuple(b)) == iou


@pytest.mark.parametrize(
    ("constant", "value"), [("CONFIDENCE", 0.6), ("COUNTING_CONFIDENCE", 0.3), ("SLACK", 1.0), ("SIDE", 0.9)]
)
def test_with_another_constant_verdicts_differ(constant: str, value: float, monkeypatch: pytest.MonkeyPatch):
    assert agree() == 240
    monkeypatch.setattr(rules, constant, value)
    assert agree() <= 236


def test_the_order_of_detections_does_not_matter():
    rng = random.Random(0)
    for case in GOLDEN["cases"]:
        assert verdict(case, rng) == verdict(case)


def test_opposite_sides_and_self_overlap():
    for a, b, *_ in GOLDEN["geometry"]:
        assert {OPPOSITE[side] for side in relations(tuple(a), tuple(b))} == set(relations(tuple(b), tuple(a)))
        assert overlap(tuple(a), tuple(b)) == overlap(tuple(b), tuple(a)) and overlap(tuple(a), tuple(a)) == 1
    assert overlap((0, 0, 9, 9), (10, 0, 19, 9)) == 0  # the last column of one, the first of the other
    assert overlap((0, 0, 9, 9), (9, 0, 18, 9)) == pytest.approx(10 / 190)


def test_confidences_are_strict_and_sixteen_of_a_class_are_kept():
    assert keep([thing("dog", confidence=0.3)]) == {}
    assert len(keep([thing("dog", confidence=0.3000001)])["dog"]) == 1
    many = [thing("dog", confidence=0.5 + i / 100) for i in range(20)]
    assert keep(many)["dog"] == many[:3:-1]
    found = keep(many)
    assert judge(found, Task((Requirement("dog", 16),), (Requirement("dog", 17),)), by_column).ok
    assert not judge(found, Task((Requirement("dog", 17),)), by_column).ok


def test_too_many_is_a_fault_from_the_count_on():
    task = Task((Requirement("dog", 2),), (Requirement("dog", 3),), counting=True)
    by_count = [judge(keep([thing("dog")] * n), task, by_column) for n in range(5)]
    assert [v.ok for v in by_count] == [False, False, True, False, False]
    assert [str(fault) for fault in by_count[4].faults] == ["dog: wanted fewer than 3, found 4"]
    assert [v.score for v in by_count] == [0.5, 0.5, 1, 0.5, 0.5]


def test_only_the_most_confident_objects_are_looked_at():
    red, blue = thing("cup", left=0, confidence=0.5), thing("cup", left=4, confidence=0.6)
    task = Task((Requirement("cup", 1, "red"),))
    assert [str(fault) for fault in judge(keep([red, blue]), task, by_column).faults] == [
        "cup: wanted 1 red, found 1 blue"
    ]
    assert judge(keep([dataclasses.replace(red, confidence=0.7), blue]), task, by_column).ok


def test_a_position_needs_its_target_and_every_pair():
    task = Task((Requirement("dog", 2), Requirement("cat", 1, position=("left of", 0))))
    dogs = [thing("dog", left=100), thing("dog", left=200)]
    assert judge(keep([*dogs, thing("cat", left=0)]), task, by_column).ok
    between = judge(keep([*dogs, thing("cat", left=150)]), task, by_column)
    assert [str(fault) for fault in between.faults] == ["cat: wanted left of dog, found right of"]
    alone = judge(keep([dogs[0], thing("cat", left=0)]), task, by_column)
    assert [fault.kind for fault in alone.faults] == ["count", "target"] and alone.score == 0
    assert [str(f) for f in judge(keep([*dogs, thing("cat", left=100)]), task, by_column).faults] == [
        "cat: wanted left of dog, found on no side"
    ]


def test_boxes_that_overlap_count_once_if_that_is_asked_for():
    pair = [thing("dog", confidence=0.9), thing("dog", left=1, confidence=0.8), thing("cat", left=1, confidence=0.8)]
    assert len(keep(pair)["dog"]) == 2 and len(keep([pair[0], pair[0]], max_overlap=1.0)["dog"]) == 2
    assert keep(pair, max_overlap=0.5) == {"dog": pair[:1], "cat": pair[2:]}


ROWS = [
    {"tag": "single_object", "include": [{"class": "dog", "count": 1}], "prompt": "a photo of a dog"},
    {"tag": "counting", "include": [{"class": "dog", "count": 2}], "exclude": [{"class": "dog", "count": 3}],
     "prompt": "a photo of two dogs"},
    {"tag": "position", "include": [{"class": "dog", "count": 1},
                                    {"class": "cat", "count": 1, "position": ["left of", 0]}],
     "prompt": "a photo of a cat left of a dog"},
]  # fmt: skip


class Scripted:
    """Finds in a picture what was drawn for its width; says what it was asked."""

    classes = COCO

    def __init__(self, by_width: dict[int, list[Detection]]) -> None:
        self.by_width, self.asked = by_width, []

    def __call__(self, picture: Image.Image, confidence: float) -> list[Detection]:
        assert picture.mode == "RGB"
        self.asked.append(confidence)
        return self.by_width[picture.width]


@pytest.fixture
def metadata(tmp_path: Path) -> Path:
    (tmp_path / "evaluation_metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return tmp_path / "evaluation_metadata.jsonl"


def test_the_reward_passes_or_gives_the_share(metadata: Path):
    detector = Scripted({
        20: [thing("dog")], 21: [thing("cat")],
        30: [thing("dog"), thing("dog", left=30)], 31: [thing("dog"), thing("dog", left=30, confidence=0.85)],
        40: [thing("dog", left=80), thing("cat")], 41: [thing("dog"), thing("cat", left=80)],
    })  # fmt: skip
    pictures = [Image.new("RGBA" if width % 2 else "L", (width, 24)) for width in detector.by_width]
    prompts = [row["prompt"] for row in ROWS for _ in range(2)]
    passed = load_reward("geneval", metadata=metadata, detector=detector)(pictures, prompts)
    assert passed.tolist() == [1, 0, 1, 0, 1, 0]
    assert detector.asked == [0.3, 0.3, 0.9, 0.9, 0.3, 0.3]
    graded = load_reward("geneval", metadata=metadata, detector=detector, mode="score")
    assert graded(pictures, prompts).tolist() == [1, 0, 1, 0.5, 1, 0.5]
    assert [graded([p], [c]).item() for p, c in zip(pictures, prompts, strict=True)] == [1, 0, 1, 0.5, 1, 0.5]
    lenient = load_reward("geneval", metadata=metadata, detector=detector, counting_confidence=0.8)
    assert lenient(pictures, prompts).tolist() == [1, 0, 1, 1, 1, 0]
    assert [str(f) for v in graded.verdicts(pictures, prompts) for f in v.faults] == [
        "dog: wanted 1, found 0", "dog: wanted 2, found 1", "cat: wanted left of dog, found right of",
    ]  # fmt: skip


def test_a_mapping_is_read_like_the_file_and_pixels_like_pictures(metadata: Path):
    detector = Scripted({16: [thing("dog")]})
    given = {row["prompt"]: {key: row[key] for key in row if key != "prompt"} for row in ROWS}
    assert read_tasks(given, COCO) == read_tasks(metadata, COCO) == read_tasks(str(metadata), COCO)
    reward = load_reward("geneval", metadata=given, detector=detector)
    clips = torch.zeros(2, 3, 3, 16, 16)
    assert reward(clips, ["a photo of a dog", "a photo of two dogs"]).tolist() == [1, 0]
    with pytest.raises(ValueError, match="no gradient"):
        reward(torch.zeros(1, 3, 16, 16, requires_grad=True), ["a photo of a dog"])


def test_an_unknown_prompt_is_named_before_any_picture_is_looked_at(metadata: Path):
    detector = Scripted({})
    with pytest.raises(ValueError, match=r"3 prompts\), got 'a photo of a dogs'; the nearest is 'a photo of a dog'"):
        load_reward("geneval", metadata=metadata, detector=detector)([Image.new("RGB", (4, 4))], ["a photo of a dogs"])
    assert detector.asked == []


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 4: expected JSON"),
        ('["a"]', 'line 4: expected {"prompt"'),
        ('{"include": [{"class": "dog"}]}', 'line 4: expected {"prompt"'),
        ('{"prompt": "a", "include": []}', "line 4: expected at least one object"),
        ('{"prompt": "a", "include": {"class": "dog"}}', "line 4: expected include to be a list"),
        ('{"prompt": "a", "include": [{"count": 1}]}', r"line 4: include\[0\]: expected {\"class\""),
        ('{"prompt": "a", "include": [{"class": "dgo"}]}', "unknown class 'dgo', did you mean 'dog'"),
        ('{"prompt": "a", "include": [{"class": "dog", "colour": "red"}]}', "'colour', did you mean 'color'"),
        ('{"prompt": "a", "include": [{"class": "dog", "color": "gray"}]}', "unknown color 'gray'"),
        ('{"prompt": "a", "include": [{"class": "dog", "count": 0}]}', "from 1 on, got 0"),
        ('{"prompt": "a", "include": [{"class": "dog", "count": "2"}]}', "from 1 on, got '2'"),
        ('{"prompt": "a", "include": [{"class": "dog", "position": ["above", 0]}]}', "index of an earlier object"),
        ('{"prompt": "a", "include": [{"class": "dog"}, {"class": "cat", "position": ["near", 0]}]}', r"include\[1\]"),
        ('{"prompt": "a", "include": [{"class": "dog"}, {"class": "cat", "position": 0}]}', r"include\[1\]"),
        ('{"prompt": "a", "exclude": [{"class": "dog", "color": "red"}]}', r"exclude\[0\]: unknown key 'color'"),
        ('{"prompt": "a photo of a dog", "include": [{"class": "cat"}]}', "line 4: expected one row per prompt"),
    ],
)
def test_bad_metadata_is_named_with_its_line(metadata: Path, line: str, message: str):
    with metadata.open("a") as file:
        file.write(line + "\n")
    with pytest.raises(ValueError, match=message) as error:
        read_tasks(metadata, COCO)
    assert str(error.value).startswith(f"{metadata}, line 4: ")


def test_what_else_is_wrong_is_named(metadata: Path, tmp_path: Path):
    (tmp_path / "empty.jsonl").write_text("\n")
    for keywords, message in (
        ({"metadata": tmp_path / "none.jsonl"}, "could not read"),
        ({"metadata": tmp_path / "empty.jsonl"}, "at least one row"),
        ({"metadata": {"a": {"include": [{"class": "unicorn"}]}}}, "geneval.metadata, 'a'.*unknown class 'unicorn'"),
        ({"metadata": metadata, "mode": "strict"}, "pass, score, got 'strict'"),
        ({"metadata": metadata, "detector": "mask3former"}, "did you mean 'mask2former'"),
        ({}, "'geneval' needs metadata"),
    ):
        with pytest.raises(ValueError, match=message):
            load_reward("geneval", **({"detector": Scripted({})} | keywords))
