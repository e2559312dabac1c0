"""One page for all the rollouts of a run: what is new is taken in, and choices go to the folder that has the group."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import pytest
from judging_helpers import answering, choose, post, program, save_groups
from PIL import Image

from diffalign.data.readers import read_jsonl
from diffalign.judging.command import DATABASE, Place, export_choices, rollouts
from diffalign.judging.command import following as follow
from diffalign.judging.following import Following
from diffalign.judging.store import SKIP, TIE
from diffalign.rewards import load_reward


def rollout(run: Path, name: str, prompts: list[str], first: int, ask: str = "best") -> Path:
    """As a run leaves it that waits for people: pictures, their listing, and a database."""
    folder = save_groups(run / name, prompts, first=first)
    Place(str(folder), ask=ask).open()
    return folder


def following(run: Path) -> Following:
    return follow(Place(str(run)), seed=0)


def test_what_a_run_draws_next_is_there_at_the_next_look(tmp_path: Path) -> None:
    page = following(tmp_path)
    empty = page.look("Ada")
    assert empty["waiting"] and empty["group"] is None and empty["of"] == 0 and page.count is None
    rollout(tmp_path, "b", ["a cat", "a dog"], 0)
    assert page.look("Ada")["of"] == 2
    choose(page.sessions[tmp_path / "b"], "Ada")
    rollout(tmp_path, "a", ["a cat"], 50, ask="order")  # later, whatever its name; the same prompt is another group
    seen = page.look("Ada")
    assert (seen["judged"], seen["of"], seen["group"]["prompt"], seen["ask"]) == (1, 3, "a dog", "best")
    seen = page.choose("Ada", seen["group"]["key"], TIE, [])
    assert (seen["judged"], seen["ties"], seen["group"]["prompt"], seen["ask"]) == (2, 1, "a cat", "order")
    assert set(seen["group"]["pictures"]) <= page.pictures.keys() and len(page.pictures) == 9
    with pytest.raises(ValueError, match="load the page again"):
        page.choose("Ada", "elsewhere", SKIP, [])


def test_undo_goes_back_over_rollouts_and_retake_asks_for_all_that_was_skipped(tmp_path: Path) -> None:
    folders = [rollout(tmp_path, name, [prompt], 60 * i) for i, (name, prompt) in enumerate([("x", "a"), ("y", "b")])]
    page = following(tmp_path)
    for _ in range(2):
        page.choose("Ada", page.look("Ada")["group"]["key"], SKIP, [])
    assert page.look("Ada")["group"] is None and page.look("Bo")["of"] == 2
    back = page.undo("Ada")
    assert (back["group"]["prompt"], back["judged"]) == ("b", 1)
    back = page.undo("Ada")
    assert (back["group"]["prompt"], back["judged"]) == ("a", 0)
    assert page.undo("Ada")["judged"] == 0
    for _ in range(2):
        page.choose("Ada", page.look("Ada")["group"]["key"], SKIP, [])
    again = page.retake("Ada")
    assert (again["skipped"], again["group"]["prompt"]) == (0, "a") and [*page.sessions] == folders


def test_a_folder_that_is_not_ready_is_tried_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = save_groups(tmp_path / "x", ["a"])
    page = following(tmp_path)
    assert page.look("Ada")["of"] == 0  # what is asked is not known before the run has made its database
    (folder / DATABASE).write_text("half")
    assert page.look("Ada")["of"] == 0 and "x cannot be judged yet" in caplog.text
    (folder / DATABASE).unlink()
    Place(str(folder)).open()
    assert page.look("Ada")["of"] == 1


def test_a_run_is_paid_while_one_page_is_open(tmp_path: Path) -> None:
    """Two calls of the reward, one after the other, and a judge who only ever asks the page what is next."""
    pictures = [Image.new("RGB", (16, 16), (shade, 0, 0)) for shade in range(8)]
    paid: list[list[float]] = []

    def run() -> None:
        reward = load_reward("human", folder=str(tmp_path / "people"), poll=0.05)
        paid.extend(reward(pictures[i : i + 4], ["a", "a", "b", "b"]).tolist() for i in (0, 4))

    (tmp_path / "people").mkdir()
    thread = threading.Thread(target=run)
    with answering(following(tmp_path / "people")) as url:
        thread.start()
        until = time.monotonic() + 60
        while thread.is_alive() and time.monotonic() < until:
            _, seen = post(url, "look", judge="Ada")
            if group := seen["group"]:
                post(url, "choose", judge="Ada", group=group["key"], verdict="chosen", picks=[min(group["pictures"])])
            time.sleep(0.02)
        thread.join(1)
    assert len(paid) == 2 and all(sorted(scores) == [0, 0, 1, 1] for scores in paid)
    export_choices(Place(str(tmp_path / "people")), tmp_path / "p.jsonl", None, False, watch=True)
    assert len(list(read_jsonl(str(tmp_path / "p.jsonl")))) == 4


def test_the_command_serves_and_exports_all_rollouts(tmp_path: Path) -> None:
    run = tmp_path / "people"
    rollout(run, "x", ["a"], 0)
    rollout(run, "y", ["b", "c"], 60)
    with program(run, "--watch") as (process, url):
        for _ in range(3):
            _, seen = post(url, "look", judge="Ada")
            post(url, "choose", judge="Ada", group=seen["group"]["key"], verdict=TIE)
        process.terminate()
        told = json.loads(process.communicate(timeout=60)[0])
    assert told["groups"] == 3 and told["judges"] == {"Ada": {"chosen": 0, "ties": 3, "skipped": 0}}
    found = export_choices(Place(str(run)), tmp_path / "p.jsonl", None, False, watch=True)
    assert found.data["records"] == 3 and found.data["ties"] == 3


def test_bad_input_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--watch and --db do not go together"):
        rollouts(Place(str(tmp_path), db=Path("x.sqlite")))
    with pytest.raises(ValueError, match="expected a folder, in which a run with the reward human"):
        rollouts(Place(str(tmp_path / "nowhere")))
    with pytest.raises(ValueError, match=r"\*/judgments.sqlite: no database of choices there; judge first"):
        export_choices(Place(str(tmp_path)), tmp_path / "p.jsonl", None, False, watch=True)
