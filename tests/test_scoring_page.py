"""The page of scores: which pictures are on it, and how a browser shows it."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest
from PIL import Image
from scoring_helpers import Choosy, Red
from test_report import BROWSER, PROBE

from diffalign.manifests import Entry, read_manifest
from diffalign.rewards.base import Weighted
from diffalign.scoring.command import Wanted, score_pictures
from diffalign.scoring.engines import Job
from diffalign.scoring.page import NAMED, SHOWN, ends, page_file


@pytest.fixture
def page(tmp_path: Path) -> Path:
    """30 pictures of different shapes with hostile prompts, one without a score and one that is broken."""
    prompts = []
    for number in range(30):
        Image.new("RGBA", (8 + 20 * number, 300), (5 * number, 0, 0, 200)).save(tmp_path / f"{number:02d}.png")
        prompts.append(f"<script>alert({number})</script> & {'w' * 300}" if number else "unsure")
    (tmp_path / "07.png").write_text("no picture")
    rewards = Weighted({"red": (Red(), 1.0), "choosy": (Choosy(), 0.5)})
    listed = [row for row in read_manifest([tmp_path], prompts) if isinstance(row, Entry)]
    job = Job(rewards, {"red": {"weight": 1.0}, "choosy": {"weight": 0.5}}, "cpu")
    told = score_pictures(listed, job, Wanted(tmp_path / "out" / "s.jsonl", best_of=1, page=tmp_path / "out"))
    assert told.data["page"] == str(tmp_path / "out" / "index.html") and "best and worst pictures in" in told.text
    return tmp_path / "out" / "index.html"


def test_the_ends_are_the_best_and_the_worst_and_nothing_is_in_both() -> None:
    scores = [float(number) for number in range(10)]
    assert ends(scores, 3) == ([9, 8, 7], [0, 1, 2])
    assert ends(scores, 12) == ([9, 8, 7, 6, 5], [0, 1, 2, 3, 4])
    assert ends(scores[:3], 12) == ([2, 1], [0]) and ends([1.0]) == ([0], [])
    assert ends([float("nan")]) == ([], []) and ends([]) == ([], [])


def test_the_page_is_one_file_that_escapes_prompts_and_shows_both_ends_with_units(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert "<script>" not in text and "&lt;script&gt;alert(29)" in text
    assert not re.search(r"""src=["'](?!data:image/)""", text) and "http" not in re.sub(r"data:[^\"]+", "", text)
    assert text.count("<figure>") == 2 * SHOWN + 2 * SHOWN + 2 * SHOWN  # red, choosy and their sum
    red = text.partition('id="r1"')[2].partition('id="r2"')[0]
    numbers = [int(name) for name in re.findall(r"<small>\S*?(\d\d)\.png</small>", red)]
    assert numbers[:SHOWN] == list(range(29, 29 - SHOWN, -1))  # not only what --best-of keeps
    assert numbers[SHOWN:] == [number for number in range(SHOWN + 1) if number != 7]
    assert red.count('<small class="unit">level</small>') == 2 * SHOWN and "1 red + 0.5 choosy" in text
    assert text.count("07.png: expected a whole picture") == 1 and "1 was skipped" in text


def test_a_page_names_only_so_many_broken_rows(tmp_path: Path) -> None:
    for number in range(NAMED + 12):
        (tmp_path / f"{number:03d}.png").write_text("no picture")
    Image.new("RGB", (8, 8)).save(tmp_path / "whole.png")
    job = Job(Weighted({"red": (Red(), 1.0)}), {"red": {"weight": 1.0}}, "cpu")
    score_pictures(read_manifest([tmp_path], ["x"]), job, Wanted(tmp_path / "s.jsonl", page=tmp_path / "p.html"))
    text = (tmp_path / "p.html").read_text()
    assert text.count("expected a whole picture") == NAMED and "and 12 more" in text
    assert "weighted" not in text  # the sum of one reward says nothing new
    assert page_file(Path("a/b.HTML")) == Path("a/b.HTML") and page_file(Path("a/b")) == Path("a/b/index.html")


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
@pytest.mark.parametrize("width", [1200, 400])
def test_a_browser_shows_every_picture_and_nothing_sticks_out(page: Path, tmp_path: Path, width: int) -> None:
    probed = tmp_path / "probed.html"
    text = page.read_text(encoding="utf-8").replace('loading="lazy"', "")  # all of them now
    probed.write_text(text.replace("</html>", PROBE + "</html>"), encoding="utf-8")
    done = subprocess.run(
        [str(BROWSER), "--headless=new", "--no-sandbox", "--disable-gpu", f"--window-size={width},900",
         f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", probed.as_uri()],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    found = re.search(r"""data-probe=["'](.*?)["']>""", done.stdout)
    assert found, done.stdout[-500:] + done.stderr[-2000:]
    seen = json.loads(found[1].replace("&quot;", '"'))
    assert seen == {"images": 6 * SHOWN + 3, "broken": 0, "overflow": seen["overflow"], "requests": 0}
    assert seen["overflow"] <= 0
