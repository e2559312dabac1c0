"""The server of `diffalign judge`, its command, and what is left of a choice when the server is killed."""

from __future__ import annotations

import io
import json
import signal
import sqlite3
import sys
import threading
from pathlib import Path

import pytest
from judging_helpers import answering, get, post, program, save_groups, session_of
from PIL import Image

from diffalign import cli
from diffalign.judging import server
from diffalign.judging.command import Place, Serving, judge_pictures

PROMPTS = ["a red circle", "<b>two</b> & 'blue' squares", "a green cross"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_groups(tmp_path / "pictures", PROMPTS)


def test_a_judge_is_asked_answers_and_comes_to_the_end(folder: Path) -> None:
    session = session_of(folder)
    with answering(session) as url:
        status, content, headers = get(url)
        assert status == 200 and b'name="judge"' in content and "no-store" in headers["cache-control"]
        assert b"const judge = " not in content
        page = get(f"{url}/?judge=%3Cb%3EAda")[1].decode()
        assert "&lt;b&gt;Ada" in page and "<b>Ada" not in page and "--export p.jsonl" in page
        state = post(url, "look", judge="Ada")[1]
        assert (state["judged"], state["of"], state["group"]["prompt"]) == (0, 3, PROMPTS[0])
        for picture in [*state["group"]["pictures"], *state["ahead"]]:
            status, content, headers = get(f"{url}/picture/{picture}")
            assert status == 200 and headers["content-type"] == "image/png" and "immutable" in headers["cache-control"]
            assert content == session.pictures[picture].source.read()
        for _ in range(3):
            group = state["group"]
            said = {"group": group["key"], "verdict": "chosen", "picks": group["pictures"][:1]}
            state = post(url, "choose", judge="Ada", **said)[1]
        assert state["group"] is None and state["chosen"] == 3
        assert post(url, "undo", judge=" Ada ")[1]["group"]["prompt"] == PROMPTS[2]
        assert post(url, "look", judge="Bob")[1]["judged"] == 0
    assert len(session.store.choices("Ada")) == 2


def test_a_page_of_one_judge_asks_for_no_name(folder: Path) -> None:
    with answering(session_of(folder), judge="Ada") as url:
        page = get(f"{url}/?judge=Bob")[1].decode()
        assert 'const judge = "Ada"' in page and "not you?" not in page


@pytest.mark.parametrize(
    "path",
    ["picture/00000.png", "picture/..%2f..%2fetc%2fpasswd", "picture/%2e%2e/%2e%2e/etc/passwd", "picture/",
     "etc/passwd", "picture//etc/passwd", "judgments.sqlite", "generations.jsonl", "picture/" + "0" * 64],
)  # fmt: skip
def test_nothing_is_served_but_pictures_of_the_groups_by_their_hash(folder: Path, path: str) -> None:
    with answering(session_of(folder)) as url:
        assert get(f"{url}/{path}")[0] in (404, 405)


def test_pictures_that_browsers_do_not_draw_become_png_and_lost_ones_are_said_to_be_lost(folder: Path) -> None:
    for name in ("00000", "00001", "00002"):
        Image.open(folder / f"{name}.png").save(folder / f"{name}.tif")
    listing = folder / "generations.jsonl"
    listing.write_text("".join(f"{line}\n".replace("png", "tif") for line in listing.read_text().splitlines()[:3]))
    session = session_of(folder)
    with answering(session) as url:
        first, second, _ = session.groups[0].pictures
        status, content, headers = get(f"{url}/picture/{first}")
        assert status == 200 and headers["content-type"] == "image/png"
        assert Image.open(io.BytesIO(content)).tobytes() == Image.open(folder / "00000.tif").tobytes()
        (folder / "00000.tif").unlink()
        (folder / "00001.tif").write_text("no picture")
        assert [get(f"{url}/picture/{picture}")[0] for picture in (first, second)] == [404, 404]


def test_what_is_no_request_of_the_page_is_refused_in_one_sentence(folder: Path) -> None:
    session = session_of(folder)
    group = session.groups[0]
    with answering(session) as url:
        said = {"judge": "Ada", "group": group.key, "verdict": "tie"}
        assert post(url, "choose", kind="text/plain", **said) == (415, {"error": "expected application/json"})
        assert get(f"{url}/", Host="evil.example")[0] == 400
        assert post(url, "erase", **said)[0] == 404
        for change in ({"judge": ""}, {"verdict": "best"}, {"group": "x"}, {"picks": "abc"}, {"picks": [1]}):
            status, told = post(url, "choose", **{**said, **change})
            assert status == 400 and told["error"]
        session.store.path.unlink()
        status, told = post(url, "choose", **said)
        assert status == 503 and "cannot be used" in told["error"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere"], "nowhere: no picture or clip there"),
        (["pictures", "--ask", "bset"], "did you mean 'best'?"),
        (["pictures", "--judge", " "], "expected the judge's name"),
        (["pictures", "--db", "other.sqlite"], "holds choices of another run, elsewhere"),
        (["pictures", "--db", "pictures/00000.png"], "expected a database that diffalign judge made, got another file"),
        (["pictures", "--port", "99999"], "choose another --port"),
        (["pictures", "--merge"], "--merge goes with --export"),
        (["pictures", "--export", "p.parquet"], "expected a file that ends in .jsonl"),
        (["pictures", "--export", "pictures/generations.jsonl"], "is what lists the pictures"),
        (["pictures", "--export", "p.jsonl"], "no database of choices there; judge first"),
        (["pictures", "--db", "mine.sqlite", "--export", "p.jsonl"], "no choice to write yet"),
        (["single"], "expected a prompt with two different pictures or more, found none (3 prompts with fewer"),
        (["untold", "--ask", "order"], "found none (3 rows of the manifest that cannot be used; "),
    ],
)  # fmt: skip
def test_bad_input_is_one_sentence(
    folder: Path,
    words: list[str],
    message: str,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(folder.parent)
    monkeypatch.delenv("DIFFALIGN_DEBUG", raising=False)
    monkeypatch.setattr(server, "serve", lambda app, opened: pytest.fail("it served"))
    Place("pictures", db=Path("mine.sqlite")).open()
    Place(str(save_groups(Path("elsewhere"), PROMPTS, first=70)), db=Path("other.sqlite")).open()
    save_groups(Path("single"), PROMPTS, each=1)
    (save_groups(Path("untold"), PROMPTS, each=1) / "generations.jsonl").unlink()
    capfd.readouterr()
    with pytest.raises(SystemExit) as stop:
        cli.main(["judge", *words])
    out, err = capfd.readouterr()
    assert stop.value.code == 2 and out == "" and "Traceback" not in err
    assert err.splitlines()[-1].startswith("diffalign: ") and message in err.splitlines()[-1]


def test_without_the_extra_it_says_what_to_install(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffalign.judging.server", None)
    monkeypatch.delattr("diffalign.judging.server")
    with pytest.raises(ValueError, match=r"pip install 'diffalign\[judge\]'"):
        judge_pictures(Place(str(folder)), Serving())


def test_others_in_the_network_are_let_in_with_a_warning(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(server, "serve", lambda app, opened: None)
    with caplog.at_level("INFO"):
        judge_pictures(Place(str(folder)), Serving(port=0))
        assert "anybody" not in caplog.text and "open http://127.0.0.1:" in caplog.text
        told = judge_pictures(Place(str(folder)), Serving(host="0.0.0.0", port=0))
    assert "anybody in the network can see the pictures and judge" in caplog.text
    assert told.text == f"0 judged, all saved in {folder / 'judgments.sqlite'}" and told.data["judges"] == {}


@pytest.mark.slow
def test_a_kill_in_the_middle_loses_no_answered_choice(tmp_path: Path) -> None:
    folder = save_groups(tmp_path / "pictures", [f"prompt {i}" for i in range(400)], each=2)
    answered: list[str] = []
    enough = threading.Event()

    def judge(url: str) -> None:
        state = post(url, "look", judge="Ada")[1]
        while group := state["group"]:
            try:
                said = {"group": group["key"], "verdict": "chosen", "picks": group["pictures"][:1]}
                state = post(url, "choose", judge="Ada", **said)[1]
            except (OSError, ValueError):  # the server has gone
                return
            answered.append(group["key"])
            if len(answered) >= 40:
                enough.set()

    with program(folder) as (process, url):
        thread = threading.Thread(target=judge, args=(url,))
        thread.start()
        assert enough.wait(120)
        process.kill()
        process.wait()
        thread.join(60)
    assert 40 <= len(answered) < 400
    session = session_of(folder)
    saved = {choice.group for choice in session.store.choices("Ada")}
    assert set(answered) <= saved and len(saved) <= len(answered) + 1  # the last may be saved and not answered
    with sqlite3.connect(session.store.path) as db:
        assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    assert session.look("Ada")["judged"] == len(saved)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_cleanly_and_it_says_how_far_the_judges_are(folder: Path, number: int) -> None:
    with program(folder) as (process, url):
        state = post(url, "look", judge="Ada")[1]["group"]
        assert post(url, "choose", judge="Ada", group=state["key"], verdict="tie")[0] == 200
        process.send_signal(number)
        out, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    told = json.loads(out)
    assert told["judges"] == {"Ada": {"chosen": 0, "ties": 1, "skipped": 0}} and told["groups"] == 3
    assert "Traceback" not in (folder.parent / "server.log").read_text()


@pytest.mark.slow
def test_training_takes_what_was_chosen(folder: Path) -> None:
    from diffalign.trainer import train

    session = session_of(folder)
    for judge in ("Ada", "Bob"):
        while group := session.look(judge)["group"]:
            session.choose(judge, group["key"], "chosen", group["pictures"][:1])
    out = folder.parent / "preferences.jsonl"
    with pytest.raises(SystemExit) as stop:
        cli.main(["judge", str(folder), "--export", str(out), "--json"])
    assert stop.value.code in (0, None)
    overrides = [f"data={{name: jsonl, path: {out}, ranking: all}}", "max_train_steps=2", "train_batch_size=2",
                 f"output_dir={folder.parent / 'run'}", f"cache_dir={folder.parent / 'cache'}", "validation_prompts=[]",
                 "report_to=none", "cpu=true"]  # fmt: skip
    assert train("tiny-sd/dpo", overrides).steps == 2
