"""What is written is whole, or not there: old content survives a failure, and nothing else is left."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from diffalign.writing import replacing, replacing_folder, write_json, write_text


def test_a_file_and_its_folder_are_there_only_when_the_block_has_ended(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.txt"
    with replacing(path) as partial:
        partial.write_text("one")
        assert not path.exists() and partial.parent == path.parent
    write_text(path, "zwei Füchse")
    assert path.read_bytes() == "zwei Füchse".encode() and os.listdir(path.parent) == ["a.txt"]


@pytest.mark.parametrize("error", [ValueError, OSError, KeyboardInterrupt])
def test_a_failure_leaves_the_old_file_or_folder_and_nothing_else(tmp_path: Path, error: type[BaseException]) -> None:
    file, folder = tmp_path / "a.txt", tmp_path / "b"
    file.write_text("old")
    folder.mkdir()
    (folder / "c.txt").write_text("old")
    with pytest.raises(error), replacing(file) as partial:
        partial.write_text("half")
        raise error
    with pytest.raises(error), replacing_folder(folder) as partial:
        (partial / "c.txt").write_text("half")
        raise error
    assert sorted(os.listdir(tmp_path)) == ["a.txt", "b"]
    assert file.read_text() == (folder / "c.txt").read_text() == "old"


def test_what_no_json_can_hold_leaves_the_old_document(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"ü": 1})
    assert path.read_bytes() == b'{\n  "\\u00fc": 1\n}\n'
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"a": float("nan")}, allow_nan=False)
    assert json.loads(path.read_text()) == {"ü": 1} and os.listdir(tmp_path) == ["a.json"]


@pytest.mark.parametrize("ascii_only", [True, False])
def test_the_name_of_a_file_in_another_encoding_costs_no_document(tmp_path: Path, ascii_only: bool) -> None:
    name = os.fsdecode(b"caf\xe9.png")
    write_json(tmp_path / "a.json", {"where": name}, ensure_ascii=ascii_only)
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == {"where": name}


def test_a_folder_takes_the_place_of_a_full_one_whole(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "a"
    for name in ("first", "second"):
        with replacing_folder(folder) as partial:
            assert os.listdir(partial) == []
            (partial / name).mkdir()
            (partial / name / "x").write_text(name)
    assert os.listdir(folder) == ["second"] and os.listdir(folder.parent) == ["a"]


def test_what_a_kill_left_is_not_mixed_with_the_next_attempt(tmp_path: Path) -> None:
    for ending in ("partial", "previous"):
        (tmp_path / f"a.{ending}").mkdir()
        (tmp_path / f"a.{ending}" / "stale").write_text("")
    with replacing_folder(tmp_path / "a") as partial:
        (partial / "x").write_text("new")
        assert (tmp_path / "a.previous" / "stale").exists(), "the only whole copy, until the new one is"
    assert os.listdir(tmp_path) == ["a"] and os.listdir(tmp_path / "a") == ["x"]


def test_a_folder_that_cannot_take_its_place_costs_the_old_one_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x").write_text("old")
    rename = os.replace

    def fails(source: Path, target: Path) -> None:
        if Path(source).name == "a.partial":
            raise OSError("no space left")
        rename(source, target)

    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(OSError, match="no space left"), replacing_folder(tmp_path / "a"):
        pass
    assert (tmp_path / "a" / "x").read_text() == "old" and os.listdir(tmp_path) == ["a"]
