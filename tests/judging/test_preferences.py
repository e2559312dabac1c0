"""The preferences that are made of choices, and that what reads them takes them as they were meant."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from judging_helpers import choose, exported, save_groups, session_of
from PIL import Image

from diffalign.data.check import check
from diffalign.data.options import DataOptions, Framing
from diffalign.data.views import lists, pairs
from diffalign.judging.command import Place, export_choices
from diffalign.judging.session import Session

PROMPTS = ["a red circle", "two blue squares", "a green cross"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_groups(tmp_path / "pictures", PROMPTS)


def test_the_best_of_a_group_is_better_than_each_other(folder: Path) -> None:
    session = session_of(folder)
    choose(session, "ada", 2)
    choose(session, "ada", verdict="tie")
    choose(session, "ada", verdict="skip")
    choose(session, "bob", 0)
    rows = exported(folder)
    assert [(row.user, row.prompt, row.scores) for row in rows] == [
        ("ada", PROMPTS[0], (1.0, 0.0, 0.0)),
        ("bob", PROMPTS[0], (1.0, 0.0, 0.0)),
        ("ada", PROMPTS[1], (0.5, 0.5, 0.5)),
    ]
    pictures = [sorted(group.pictures) for group in session.groups]
    assert [sorted(image.sha256 for image in row.images) for row in rows] == [pictures[0], pictures[0], pictures[1]]
    assert [row.images[0].sha256 for row in rows[:2]] == [list(session.groups[0].pictures)[place] for place in (2, 0)]
    # what nobody said, such as which of the others is better, is in no pair
    made = [pairs(row, DataOptions(ranking="all"), Framing(64)) for row in rows]
    assert [[example.members for example in some] for some in made] == [[(0, 1), (0, 2)], [(0, 1), (0, 2)], []]
    report = check(str(folder.parent / "out"))
    assert report.usable and (report.records, report.ties, report.broken) == (3, 1, 0)
    assert [row.user for row in exported(folder, judge="bob")] == ["bob"]


def test_an_order_is_a_ranking(folder: Path) -> None:
    session = session_of(folder, "order")
    group = session.groups[0]
    one, two, three = group.pictures
    with pytest.raises(ValueError, match="expected 3 of the pictures"):
        session.choose("ada", group.key, "chosen", [one])
    session.choose("ada", group.key, "chosen", [three, one, two])
    [row] = exported(folder)
    assert row.scores == (1.0, 0.5, 0.0) and [image.sha256 for image in row.images] == [three, one, two]
    [example] = lists(row, DataOptions(), Framing(64), unit_scores=True)
    assert example.members == (0, 1, 2)


def test_pairs_are_records_of_two(folder: Path) -> None:
    session = session_of(folder, "pairs")
    for pick in (0, 1, 1):
        choose(session, "ada", pick)
    rows = exported(folder)  # asks what the database asks
    assert [row.scores for row in rows] == [(1.0, 0.0)] * 3 and {row.prompt for row in rows} == {PROMPTS[0]}


def test_merged_records_are_the_mean_of_the_judges(folder: Path) -> None:
    session = session_of(folder)
    for judge, pick in (("a", 0), ("b", 1), ("c", 1), ("d", 1)):
        choose(session, judge, pick)
    choose(session, "a", 0)
    choose(session, "b", verdict="tie")
    first, second = exported(folder, merge=True)
    assert first.user is None and first.scores == (0.75, 0.25, 0.0)
    assert [image.sha256 for image in first.images] == [list(session.groups[0].pictures)[place] for place in (1, 0, 2)]
    assert second.scores == (0.75, 0.25, 0.25)


def test_a_folder_of_pictures_with_one_prompt_for_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        Image.new("RGB", (8, 8), (ord(name), 0, 0)).save(f"{name}.tif")
    place = Place(".", prompt=["a red circle"], db=Path("new") / "d.sqlite")
    found, store, ask = place.open()
    assert ask == "best" and [group.prompt for group in found.groups] == ["a red circle"]
    choose(Session(found.groups, store, ask), "ada")
    export_choices(place, Path("p.jsonl"), None, False)
    [line] = (tmp_path / "p.jsonl").read_text().splitlines()
    assert json.loads(line) == {
        "prompt": "a red circle", "images": ["a.tif", "b.tif"], "scores": [1.0, 0.0], "user": "ada",
    }  # fmt: skip
