"""Two sets of pictures against each other: who meets whom, numbers worked out by hand, and the page."""

from __future__ import annotations

import json
import math
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
from scipy.stats import spearmanr
from scoring_helpers import save_reds
from test_report import BROWSER, PROBE

from diffalign.arguments import Asked
from diffalign.comparing.command import compare_pictures
from diffalign.comparing.match import Meeting, match, said
from diffalign.comparing.measure import correlations, flattened, judge
from diffalign.comparing.page import PAIRS, SHOWN, extremes
from diffalign.manifests import read_manifest
from diffalign.scoring.command import Wanted, score_pictures
from diffalign.scoring.engines import load_job
from diffalign.scoring.files import ScoreRow, write_scores

NAN = math.nan
RED = "scoring_helpers:Red"


def row(prompt: str, score: float = 0.0, seed: object = None, **scores: float) -> ScoreRow:
    extra = {} if seed is None else {"seed": seed}
    return ScoreRow("a.png", prompt, {"x": score, **scores}, {}, extra)


def meet(a: list[ScoreRow], b: list[ScoreRow]) -> list[tuple[str, tuple[tuple[int, int], ...]]]:
    return [(meeting.way, meeting.pairs) for meeting in match(a, b).meetings]


def test_pictures_meet_by_seed_else_in_order_else_each_with_each():
    seeded = [row("p", seed=seed) for seed in (3, 1, 2)]
    assert meet(seeded, [row("p", seed=seed) for seed in ("2", "3", "9")]) == [("seed", ((0, 1), (2, 0)))]  # csv: text
    assert meet(seeded, [row("p", seed=seed) for seed in (7, 8, 9)]) == [("order", ((0, 0), (1, 1), (2, 2)))]
    assert meet(seeded, [row("p", seed=1), row("p", seed=1), row("p")]) == [("order", ((0, 0), (1, 1), (2, 2)))]
    assert meet(seeded[:2], [row("p")]) == [("all", ((0, 0), (1, 0)))]
    assert meet([row("p"), row("q"), row("p")], [row("q"), row("p"), row("p")]) == [
        ("order", ((0, 1), (2, 2))), ("order", ((1, 0),))]  # fmt: skip


def test_what_only_one_side_has_is_counted_and_said():
    a = [row("p", seed=1), row("p", seed=2), row("a"), row("a")]
    found = match(a, [row("p", seed=1), row("b"), row("p", seed=5)])
    assert (found.only_a, found.only_b, found.unmatched, found.ways) == (("a",), ("b",), 2, {"seed": 1})
    assert said(found) == (
        "1 prompts in both (pictures paired: 1 by seed); only in A 1, only in B 1; "
        "2 pictures have a seed that the other side lacks"
    )


def test_the_win_rate_is_a_mean_over_prompts_of_the_mean_over_pairs():
    a = [row("p", 1), row("p", 2), row("p", 3), row("p", 4), row("q", 5), row("r", 0), row("r", NAN), row("s", NAN)]
    b = [row("p", 2), row("p", 2), row("p", 1), row("p", 1), row("q", 9), row("r", 0), row("r", 1), row("s", 1)]
    found = judge("x", match(a, b), a, b)
    # p: won, tied, lost, lost = 3/8 and -1; q: won = 1 and +4; r: tied = 1/2 and 0, with one pair missing; s: missing
    assert found.win_rate.estimate == pytest.approx((3 / 8 + 1 + 1 / 2) / 3)
    assert found.difference.estimate == pytest.approx((-1 + 4 + 0) / 3)
    assert (found.mean_a, found.mean_b) == pytest.approx(((2.5 + 5 + 0) / 3, (1.5 + 9 + 0) / 3))
    assert (found.prompts, found.pairs, found.ties, found.missing) == (3, 6, 2, 2)
    assert 3 / 8 <= found.win_rate.low < found.win_rate.estimate < found.win_rate.high <= 1
    assert found == judge("x", match(a, b), a, b)  # the draws of the bootstrap are fixed


def test_swapping_the_sides_turns_the_win_rate_around():
    a = [row(f"{i}", math.sin(i)) for i in range(12)]
    b = [row(f"{i}", math.cos(i)) for i in range(12)]
    one, other = judge("x", match(a, b), a, b), judge("x", match(b, a), b, a)
    assert one.win_rate.estimate == pytest.approx(1 - other.win_rate.estimate)
    assert one.difference.estimate == pytest.approx(-other.difference.estimate)


def test_one_prompt_has_no_interval_and_none_with_scores_no_number():
    a, b = [row("p", 1)], [row("p", 2)]
    assert math.isnan(judge("x", match(a, b), a, b).win_rate.low)
    nobody = judge("x", match(a, [row("p", NAN)]), a, [row("p", NAN)])
    assert math.isnan(nobody.win_rate.estimate) and nobody.missing == 1 and nobody.pairs == 0


def test_correlations_are_spearmans_of_the_pictures_that_both_rewards_score():
    y = [3.0, 1.0, 4.0, 1.0, 5.0, NAN]
    rows = [row("p", float(i), y=score, flat=1.0) for i, score in enumerate(y)]
    table = correlations(["x", "y", "flat"], rows)
    assert table["x"]["x"] == pytest.approx(1) and table["x"]["y"] == pytest.approx(table["y"]["x"])
    assert table["x"]["y"] == pytest.approx(spearmanr(range(5), y[:5]).statistic)
    assert math.isnan(table["x"]["flat"]) and math.isnan(correlations(["x", "y"], rows[:2])["x"]["y"])
    assert [(first, second) for first, second, _ in flattened(table)] == [("x", "y"), ("x", "flat"), ("y", "flat")]


def test_within_prompts_two_rewards_may_disagree_that_agree_on_which_prompts_are_easy():
    rows = [row(f"{p}", 10.0 * p + i, y=10.0 * p - i) for p in range(4) for i in range(3)]
    assert correlations(["x", "y"], rows)["x"]["y"] > 0.8
    assert correlations(["x", "y"], rows, within=True)["x"]["y"] == pytest.approx(-1)
    even = [row(f"{p}", float(i), y=0.1 * p) for p in range(7) for i in range(3)]  # of which the means are not exact
    assert math.isnan(correlations(["x", "y"], even, within=True)["x"]["y"])


def test_the_page_shows_the_prompts_that_differ_most_on_either_side():
    a = [row(f"{i}", 0.0) for i in range(9)]
    b = [row(f"{i}", float(gap)) for i, gap in enumerate([0, 3, -1, 5, 2, -4, 1, -2, NAN])]
    for_b, for_a = extremes("x", match(a, b), a, b, shown=3)
    assert [(meeting.prompt, gap) for meeting, gap in for_b] == [("3", 5), ("1", 3), ("4", 2)]
    assert [(meeting.prompt, gap) for meeting, gap in for_a] == [("5", -4), ("7", -2), ("2", -1)]
    assert extremes("x", match(a, a), a, a) == ([], [])
    assert isinstance(for_b[0][0], Meeting)


@pytest.fixture
def folders(tmp_path: Path) -> tuple[str, str]:
    """Pictures of three prompts, two each: B's are redder by 10. B has a prompt more, and a broken picture."""
    for name, offset in (("a", 0), ("b", 2)):
        rows = [{"image": f"{n + offset:03d}.png", "prompt": f"<script>{n // 2}</script>"} for n in range(6)]
        save_reds(tmp_path / name, 6 + offset)
        more = [{"image": "000.png", "prompt": "more"}, {"image": "broken.png", "prompt": "more"}] if offset else []
        (tmp_path / name / "broken.png").write_text("no picture")
        (tmp_path / name / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows + more)))
    return str(tmp_path / "a"), str(tmp_path / "b")


def compare(a: str, b: str, page: Path | None = None, **asked: Any) -> dict[str, Any]:
    result = compare_pictures(a, b, Asked(**{"reward": [RED], "device": "cpu"} | asked), page)
    assert all(len(cells) == len(result.header) for cells in result.rows)
    return result.data | {"text": result.text}


def test_two_folders_are_scored_in_one_run(folders: tuple[str, str]):
    found = compare(*folders)
    red = found["rewards"][RED]
    assert (red["win_rate"], red["difference"], red["ties"], red["pairs"]) == (1.0, 10.0, 0, 6)
    assert (found["prompts"], found["only_a"], found["only_b"], found["pictures"]) == (3, 0, 1, [6, 7])
    assert found["matched_by"] == {"order": 3} and "only in B 1" in found["text"]
    assert len(found["broken_pictures"]) == 1 and "broken.png: expected a whole picture" in found["text"]
    # a reward that compares sees both sides: of reds 5, 10 | 15, 20 those of A win 0 and 1/3
    won = compare(*folders, reward=["scoring_helpers:redder_wins"])["rewards"]["scoring_helpers:redder_wins"]
    assert (won["mean_a"], won["mean_b"]) == pytest.approx((1 / 6, 5 / 6))


def test_files_of_scores_and_pictures_give_the_same(folders: tuple[str, str], tmp_path: Path):
    files = []
    for name, folder in zip("ab", folders, strict=True):
        files.append(str(tmp_path / f"{name}.csv"))
        score_pictures(read_manifest([folder]), load_job({RED: {"weight": 1.0}}, "cpu"), Wanted(Path(files[-1])))
    whole = compare(*folders)["rewards"]
    assert compare(*files, reward=[])["rewards"][RED] == whole[RED] | {"unit": "level"}
    assert compare(files[0], folders[1])["rewards"][RED] == compare(folders[0], files[1])["rewards"][RED] == whole[RED]
    with pytest.raises(ValueError, match="at least one --reward"):
        compare(files[0], folders[1], reward=[])
    with pytest.raises(ValueError, match="has no scores of jpeg"):
        compare(*files, reward=["jpeg"])


def test_what_cannot_be_compared_is_refused(folders: tuple[str, str], tmp_path: Path):
    write_scores(tmp_path / "w.jsonl", [ScoreRow("a.png", "p", {"winrate": 0.5})], ["winrate"], {})
    with pytest.raises(ValueError, match="winrate compares the pictures of one prompt with each other"):
        compare(str(tmp_path / "w.jsonl"), str(tmp_path / "w.jsonl"), reward=[])
    write_scores(tmp_path / "other.jsonl", [ScoreRow("a.png", "other", {RED: 0.5})], [RED], {})
    with pytest.raises(ValueError, match="prompts that both have, found none: 3 in .*, 1 in .*'other'"):
        compare(folders[0], str(tmp_path / "other.jsonl"))
    (tmp_path / "a" / "metadata.jsonl").write_text('{"image": "000.png"}')
    with pytest.raises(ValueError, match="no picture with a prompt; the first row is .*has no prompt"):
        compare(*folders)


def test_several_rewards_get_their_weighted_sum_and_correlations(folders: tuple[str, str]):
    found = compare(*folders, reward=[f"{RED}=2", "jpeg=0.5", "shapes=0"][:2])
    assert list(found["rewards"]) == [RED, "jpeg", "weighted"] and f"2 {RED} + 0.5 jpeg" in str(found["rewards"])
    assert list(found["spearman"]) == list(found["spearman_within_prompts"]) == [RED, "jpeg", "weighted"]
    assert f"Spearman of {RED} and jpeg: " in found["text"]
    logged = compare(*folders, reward=[f"{RED}=1", "jpeg=0"])
    assert list(logged["rewards"]) == [RED, "jpeg"]  # the sum of one reward says nothing new


@pytest.fixture
def page(tmp_path: Path) -> Path:
    """Twelve prompts that B wins and twelve that A does, six pictures each, one of them gone."""
    sides = []
    for name, sign in (("a", 1), ("b", -1)):
        files = save_reds(tmp_path / name, 24)
        rows = [ScoreRow(str(file), f"<script>{n}</script> & {'w' * 200}", {"x": sign * (n - 11.5)})
                for n, file in enumerate(files) for _ in range(6)]  # fmt: skip
        sides.append(tmp_path / f"{name}.jsonl")
        write_scores(sides[-1], rows, ["x"], {})
    (tmp_path / "a" / "000.png").unlink()
    compare(str(sides[0]), str(sides[1]), tmp_path / "out", reward=[])
    return tmp_path / "out" / "index.html"


def test_the_page_is_one_file_that_escapes_prompts(page: Path):
    text = page.read_text(encoding="utf-8")
    assert "<script>" not in text and "&lt;script&gt;23" in text
    assert not re.search(r"""src=["'](?!data:image/)""", text) and "http" not in re.sub(r"data:[^\"]+", "", text)
    assert text.count('<div class="prompt">') == 2 * SHOWN and text.count("<figure>") == 2 * 2 * SHOWN * PAIRS
    assert text.count("the picture is gone") == PAIRS and "24 prompts in both (pictures paired: 24 in order)" in text


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
@pytest.mark.parametrize("width", [1200, 400])
def test_a_browser_shows_every_picture_and_nothing_sticks_out(page: Path, tmp_path: Path, width: int):
    probed = tmp_path / "probed.html"
    text = page.read_text(encoding="utf-8").replace('loading="lazy"', "")
    probed.write_text(text.replace("</html>", PROBE + "</html>"), encoding="utf-8")
    done = subprocess.run(
        [str(BROWSER), "--headless=new", "--no-sandbox", "--disable-gpu", f"--window-size={width},900",
         f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", probed.as_uri()],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    found = re.search(r"""data-probe=["'](.*?)["']>""", done.stdout)
    assert found, done.stdout[-500:] + done.stderr[-2000:]
    seen = json.loads(found[1].replace("&quot;", '"'))
    assert seen == {"images": 4 * SHOWN * PAIRS - PAIRS, "broken": 0, "overflow": seen["overflow"], "requests": 0}
    assert seen["overflow"] <= 0
