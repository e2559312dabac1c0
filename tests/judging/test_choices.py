"""Groups, their places, and the database of choices."""

from __future__ import annotations

import sqlite3
import threading
from collections import Counter
from pathlib import Path

import pytest
from judging_helpers import choose, exported, groups_of, save_groups, session_of

from diffalign.judging.groups import read_groups
from diffalign.judging.session import Session, named
from diffalign.judging.store import Choice, open_store
from diffalign.manifests import read_manifest

PROMPTS = ["a red circle", "two blue squares", "a green cross"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_groups(tmp_path / "pictures", PROMPTS)


def test_groups_are_known_by_prompt_and_content_alone(folder: Path, tmp_path: Path) -> None:
    groups = groups_of(folder)
    assert [group.prompt for group in groups] == PROMPTS and [len(group.pictures) for group in groups] == [3] * 3
    moved = save_groups(tmp_path / "moved", PROMPTS)
    lines = (moved / "generations.jsonl").read_text().splitlines()
    (moved / "generations.jsonl").write_text("\n".join(reversed(lines)))
    assert [group.key for group in groups_of(moved)][::-1] == [group.key for group in groups]
    other = save_groups(tmp_path / "other", PROMPTS, first=1)
    assert not {group.key for group in groups_of(other)} & {group.key for group in groups}


def test_pairs_are_all_pairs_of_a_prompt(folder: Path) -> None:
    found = groups_of(folder, "pairs")
    assert Counter(group.prompt for group in found) == dict.fromkeys(PROMPTS, 3)
    assert {len(group.pictures) for group in found} == {2} and len({group.key for group in found}) == 9


def test_places_are_each_judge_s_own_and_stay(folder: Path) -> None:
    group = groups_of(save_groups(folder.parent / "wide", ["x"], each=5))[0]
    seen = {judge: group.shuffled(judge, 0) for judge in map(str, range(200))}
    assert all(group.shuffled(judge, 0) == order for judge, order in seen.items())
    assert all(sorted(order) == sorted(group.pictures) for order in seen.values())
    first = Counter(order[0] for order in seen.values())
    assert len(first) == 5 and min(first.values()) > 20  # 40 each are expected; none is kept from the first place
    assert group.shuffled("a", 0) != group.shuffled("a", 1) or group.shuffled("b", 0) != group.shuffled("b", 1)


def test_a_group_with_a_broken_picture_is_dropped_whole_named_and_counted(folder: Path) -> None:
    save_groups(folder, [*PROMPTS, "cut", " ", "same", "one"])
    (folder / "00000.png").unlink()
    (folder / "00009.png").write_bytes((folder / "00010.png").read_bytes()[:-30])
    for copy in ("00016.png", "00017.png"):
        (folder / copy).write_bytes((folder / "00015.png").read_bytes())
    (folder / "00019.png").write_bytes((folder / "00018.png").read_bytes())
    with (folder / "generations.jsonl").open("a") as file:
        file.write("no json\n")
    found = read_groups(read_manifest([folder]), "best")
    assert [group.prompt for group in found.groups] == [*PROMPTS[1:], "one"]
    assert found.counts == {"rows": 1, "broken": 3, "repeated": 3, "alone": 1}
    said = " | ".join(f"{row.source}: {row.reason}" for row in found.broken)
    assert "'a red circle'" in said and "00000.png cannot be read" in said
    assert "00009.png: not a readable image" in said and "the prompt is empty" in said and "line 22" in said


def test_progress_is_each_judge_s_own_and_outlives_the_session(folder: Path) -> None:
    first = session_of(folder)
    assert (first.look("ada")["judged"], first.look("ada")["of"]) == (0, 3)
    state = choose(first, "ada")
    assert state["judged"] == 1 and state["group"]["prompt"] == PROMPTS[1] and first.look("bob")["judged"] == 0
    choose(first, "ada", verdict="tie")
    again = session_of(folder)
    assert again.look("ada")["group"]["prompt"] == PROMPTS[2]
    done = choose(again, "ada", verdict="skip")
    assert done["group"] is None and (done["chosen"], done["ties"], done["skipped"]) == (1, 1, 1)
    assert again.retake("ada")["group"]["prompt"] == PROMPTS[2]
    assert again.look("bob")["judged"] == 0


def test_undo_marks_and_asks_again_and_deletes_nothing(folder: Path) -> None:
    session = session_of(folder)
    assert session.undo("ada")["judged"] == 0
    choose(session, "bob", 2)
    for pick in (0, 1):
        choose(session, "ada", pick)
    state = session.undo("ada")
    assert state["judged"] == 1 and state["group"]["prompt"] == PROMPTS[1]
    choose(session, "ada", 2)
    session.undo("ada")
    assert session.undo("ada")["judged"] == 0 and session.look("bob")["judged"] == 1
    with sqlite3.connect(session.store.path) as db:
        assert db.execute("SELECT judge, undone FROM choices ORDER BY id").fetchall() == [
            ("bob", 0), ("ada", 1), ("ada", 1), ("ada", 1)
        ]  # fmt: skip


def test_what_was_said_twice_in_two_windows_counts_once_and_is_undone_at_once(folder: Path) -> None:
    first, second = session_of(folder), session_of(folder)
    group = first.groups[0]
    one, two, _ = group.pictures
    first.choose("ada", group.key, "chosen", [one])
    assert second.choose("ada", group.key, "chosen", [two])["judged"] == 1
    assert [row.images[0].sha256 for row in exported(folder)] == [two]
    assert first.undo("ada")["judged"] == 0 == second.look("ada")["judged"]


def test_writers_do_not_get_in_each_other_s_way(tmp_path: Path) -> None:
    folder = save_groups(tmp_path / "pictures", [str(i) for i in range(12)], each=2)
    sessions = [session_of(folder) for _ in range(2)]
    errors: list[BaseException] = []

    def work(judge: str, session: Session) -> None:
        try:
            while session.look(judge)["group"]:
                choose(session, judge)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(f"judge {i}", sessions[i % 2])) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and Counter(c.judge for c in sessions[0].store.choices()) == {f"judge {i}": 12 for i in range(6)}


def test_the_store_keeps_what_was_shown_where(folder: Path) -> None:
    session = session_of(folder, seed=3)
    choose(session, "ada", 1)
    [choice] = session.store.choices()
    assert choice.picks == (list(session.groups[0].pictures)[1],)
    assert list(choice.shown) == session.groups[0].shuffled("ada", 3)
    assert session.store.choices("bob") == []


@pytest.mark.parametrize(
    ("verdict", "picks", "message"),
    [
        ("chosen", [], "expected 1 of the pictures"),
        ("chosen", ["0" * 64], "expected 1 of the pictures"),
        ("tie", ["0" * 64], "expected 0 of the pictures"),
        ("best", [], "expected chosen, tie or skip"),
    ],
)
def test_answers_that_are_none_are_refused(folder: Path, verdict: str, picks: list[str], message: str) -> None:
    session = session_of(folder)
    with pytest.raises(ValueError, match=message):
        session.choose("ada", session.groups[0].key, verdict, picks)
    with pytest.raises(ValueError, match="not among those that are judged here"):
        session.choose("ada", "0" * 64, verdict, picks)
    assert session.store.choices() == []


@pytest.mark.parametrize("name", ["", "  ", "a" * 81, "a\x00b", "\ud800", None, 7])
def test_names_that_are_none(name: object) -> None:
    with pytest.raises(ValueError, match="expected the judge's name"):
        named(name)


def test_a_database_of_another_run_is_refused(folder: Path, tmp_path: Path) -> None:
    session_of(folder)
    other = groups_of(save_groups(tmp_path / "other", PROMPTS, first=50))
    db = folder / "judgments.sqlite"
    with pytest.raises(ValueError, match=r"choices of another run, .*pictures: none of its 3 groups .* choose another"):
        open_store(db, other, "best", "other")
    with pytest.raises(ValueError, match=r"asked for 'best', and --ask order was given; leave --ask out"):
        open_store(db, groups_of(folder), "order", "pictures")
    for content in (b"no database, but long enough to look like one" * 20, b""):
        (tmp_path / "file").write_bytes(content)
        with pytest.raises(ValueError, match="expected a database that diffalign judge made"):
            open_store(tmp_path / "file", other, "best", "other")
    with sqlite3.connect(tmp_path / "foreign") as foreign:
        foreign.execute("CREATE TABLE choices (id)")
    with pytest.raises(ValueError, match="expected a database that diffalign judge made"):
        open_store(tmp_path / "foreign", other, "best", "other")
    with pytest.raises(OSError, match="cannot be used"):
        open_store(tmp_path, other, "best", "other")


def test_a_folder_that_lost_or_got_groups_goes_on(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    choose(session_of(folder), "ada")
    choose(session_of(folder), "ada")
    (folder / "00000.png").unlink()
    found = read_groups(read_manifest([folder]), "best").groups
    with caplog.at_level("INFO"):
        store = open_store(folder / "judgments.sqlite", found, "best", "pictures")
    assert "1 of its groups are not here" in caplog.text
    assert Session(found, store, "best").look("ada")["judged"] == 1 and len(store.choices()) == 2
    assert [row.prompt for row in exported(folder)] == [PROMPTS[1]]


def test_a_database_that_has_gone_is_no_new_empty_one(folder: Path) -> None:
    session = session_of(folder)
    session.store.path.unlink()
    with pytest.raises(OSError, match="cannot be used"):
        choose(session, "ada")
    assert not session.store.path.exists()


def test_a_choice_of_an_unknown_verdict_never_enters_the_database(folder: Path) -> None:
    session = session_of(folder)
    with pytest.raises(OSError, match="CHECK constraint"):
        session.store.add(Choice("ada", session.groups[0].key, "maybe"))
