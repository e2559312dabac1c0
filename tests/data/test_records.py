"""The schema: what a record refuses, which pictures it compares, and bytes that are read where they lie."""

from __future__ import annotations

import hashlib
import math
from dataclasses import replace
from pathlib import Path

import pytest

from diffalign.data.records import (
    BrokenRow,
    FileSlice,
    MediaSource,
    PreferenceRecord,
    label_scores,
    make_record,
)

PICTURES = tuple(MediaSource(bytes([i])) for i in range(4))
RECORD = PreferenceRecord("a cat", PICTURES[:2], (1.0, 0.0), "row 1")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"prompt": " \n"}, "caption is empty"),
        ({"images": PICTURES[:1], "scores": (1.0, 0.0)}, "images with a score each"),
        ({"scores": (1.0, 2.0, 3.0)}, "got 2 and 3"),
        ({"scores": (1.0, math.nan)}, "finite"),
        ({"scores": (math.inf, 0.0)}, "finite"),
        ({"prompt_loser": " "}, "prompt_loser is empty"),
        ({"segments": (1, 2)}, "segment labels"),
    ],
)
def test_a_bad_record_is_refused(changes: dict[str, object], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        replace(RECORD, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"prompt": None}, "caption as text, got None"),
        ({"prompt_loser": 3}, "prompt_loser as text"),
        ({"segments": "101"}, "segments as a list"),
        ({"segments": [True]}, "segments as a list"),
        ({"segments": [2]}, "segment labels"),
        ({"segments": []}, "segment labels"),
        ({"regions": [[1], [[1]]]}, "regions as a list"),
        ({"regions": [[1, "1"]]}, "regions as a list"),
        ({"regions": [[1], 1]}, "regions as a list"),
        ({"regions": [[2]]}, "regions as rows"),
        ({"regions": [[1], [1, 0]]}, "regions as rows"),
        ({"regions": []}, "regions as rows"),
        ({"regions": [[]]}, "regions as rows"),
    ],
)
def test_values_of_a_file_become_a_broken_row_that_says_why(values: dict[str, object], reason: str) -> None:
    row = make_record("row 1", values.pop("prompt", "a cat"), PICTURES[:2], [1.0, 0.0], **values)  # type: ignore[arg-type]
    assert isinstance(row, BrokenRow) and row.source == "row 1" and reason in row.reason


def test_captions_lose_the_spaces_around_them() -> None:
    row = make_record("row 1", " a cat\n", PICTURES[:2], [1.0, 0.0], segments=[1, 0, -1])
    assert isinstance(row, PreferenceRecord) and row.prompt == "a cat" and row.segments == (1, 0, -1)


def test_winner_and_loser() -> None:
    assert RECORD.winner_loser() == PICTURES[:2] and not RECORD.tie
    assert replace(RECORD, scores=(0.0, 1.0)).winner_loser() == PICTURES[1::-1]
    tie = replace(RECORD, scores=(0.5, 0.5))
    assert tie.tie and tie.winner_loser() == PICTURES[:2]


def test_all_pairs_of_a_ranking() -> None:
    ranked = replace(RECORD, images=PICTURES, scores=(2.0, 9.0, 2.0, 1.0))
    assert ranked.comparisons("best_worst") == [(1, 3)]
    assert ranked.comparisons("all") == [(1, 0), (1, 2), (1, 3), (0, 2), (0, 3), (2, 3)]


@pytest.mark.parametrize(("label", "scores"), [(1, (1.0, 0.0)), (0.0, (0.0, 1.0)), (0.5, (0.5, 0.5))])
def test_labels(label: object, scores: tuple[float, float]) -> None:
    assert label_scores(label) == scores


@pytest.mark.parametrize("label", [None, "1", True, 2, -1, 0.7, math.nan, [1]])
def test_other_labels_are_refused(label: object) -> None:
    with pytest.raises(ValueError, match="label_0 to be 1"):
        label_scores(label)


def test_bytes_of_every_kind_of_source(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"0123456789")
    assert MediaSource(file).read() == b"0123456789"
    assert MediaSource(FileSlice(file, 2, 3)).read() == b"234"
    assert MediaSource(b"234").sha256 == MediaSource(FileSlice(file, 2, 3)).sha256 == hashlib.sha256(b"234").hexdigest()
    assert "234" not in repr(MediaSource(b"234"))  # a message must not print a picture


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    file = tmp_path / "file"
    for source in (MediaSource(file), MediaSource(FileSlice(file, 0, 3))):
        with pytest.raises(ValueError, match=r"file cannot be read \(No such file"):
            source.read()
    file.write_bytes(b"01")
    with pytest.raises(ValueError, match="truncated: expected 3 bytes at 1, got 1"):
        FileSlice(file, 1, 3).read()


def test_the_hash_is_computed_once(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"01")
    source = MediaSource(file)
    first = source.sha256
    file.unlink()
    assert source.sha256 == first
