"""The demo's numbers, and its page as a browser shows it."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffalign import demo
from diffalign.demo import Drawn, summary
from diffalign.prompts import Prompt
from diffalign.report import SHOWN_PER_CATEGORY, write_report
from diffalign.trainer import RunResult

BROWSER = next((b for b in ("chromium", "chromium-browser", "google-chrome") if shutil.which(b)), None)
CATEGORIES = ("single", "two", "count")
# what the page is once everything has loaded: pictures that are none, and what is wider than the window
PROBE = """<script>onload = () => {
  const broken = [...document.images].filter(image => !image.naturalWidth).length;
  document.body.dataset.probe = JSON.stringify({images: document.images.length, broken,
    overflow: document.documentElement.scrollWidth - innerWidth, requests: performance.getEntriesByType("resource")
      .filter(entry => !entry.name.startsWith("data:")).length});
};</script>"""


def drawn(count: int, passed: np.ndarray, clip: float) -> Drawn:
    pictures = [Image.new("RGB", (64, 64), (40 * i % 256, 90, 120)) for i in range(count)]
    return Drawn(pictures, passed, np.full(count, clip))


@pytest.fixture
def numbers() -> tuple[list[Prompt], Drawn, Drawn, Drawn]:
    prompts = [Prompt(f"a <b>{name}</b> & {i}", CATEGORIES[i % 3]) for i in range(45) for name in [CATEGORIES[i % 3]]]
    rng = np.random.default_rng(0)
    base = rng.integers(0, 2, 45).astype(float)
    aligned = np.maximum(base, rng.integers(0, 2, 45))
    return prompts, drawn(45, base, 80.0), drawn(45, aligned, 81.5), drawn(15, base[:15], 79.0)


def test_the_summary_is_what_the_draws_say(numbers):
    prompts, base, aligned, sft = numbers
    report = summary(prompts, base, aligned, sft)
    gain = (aligned.passed - base.passed).mean()
    assert report["prompts"] == 45 and report["sft_prompts"] == 15
    assert (
        math.isclose(report["gain"], gain) and report["gain"] == report["aligned_pass_rate"] - report["base_pass_rate"]
    )
    assert 0 < report["gain_ci95"][0] < gain < report["gain_ci95"][1]
    assert (report["base_clip"], report["aligned_clip"]) == (80.0, 81.5)
    assert report["sft_pass_rate"] == report["base_pass_rate_on_sft_prompts"]
    rows = report["per_category"]
    assert set(rows) == set(CATEGORIES) and sum(row["prompts"] for row in rows.values()) == 45
    whole = sum(row["prompts"] * row["aligned_pass_rate"] for row in rows.values()) / 45
    assert math.isclose(whole, report["aligned_pass_rate"])
    json.dumps(report, allow_nan=False)


@pytest.fixture
def page(numbers, tmp_path: Path) -> Path:
    prompts, base, aligned, sft = numbers
    report = summary(prompts, base, aligned, sft) | {
        "train_seconds": 1.0, "total_seconds": 2.0, "seed": 0, "quick": False}  # fmt: skip
    metrics = [{"step": s, "loss": 0.69, "accuracy": 0.5, "d_w": 0.0, "d_l": 1e-4, "h_abs": 0.1, "validation/loss": 0.7}
               for s in (0, 10, 20)]  # fmt: skip
    examples = [(p, base.pictures[i], aligned.pictures[i], bool(base.passed[i]), bool(aligned.passed[i]))
                for i, p in enumerate(prompts)]  # fmt: skip
    write_report(tmp_path / "report.html", report, examples, {"dpo": metrics, "sft": metrics})
    return tmp_path / "report.html"


def test_the_page_is_one_file_that_escapes_prompts_and_does_not_pick_its_pictures(page):
    text = page.read_text(encoding="utf-8")
    assert "a &lt;b&gt;single&lt;/b&gt; &amp; 0" in text and "<b>single</b>" not in text
    assert not re.search(r"""(src|href)=["'](?!data:)""", text), "the page reads something outside itself"
    assert text.count("<figure>") == 3 * SHOWN_PER_CATEGORY
    for first in range(3):  # the first ones of each category
        shown = re.findall(rf"<figcaption>a &lt;b&gt;{CATEGORIES[first]}&lt;/b&gt; &amp; (\d+)", text)
        assert [int(i) for i in shown] == list(range(first, 45, 3))[:SHOWN_PER_CATEGORY]


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
@pytest.mark.parametrize("width", [1200, 400])
def test_a_browser_shows_every_picture_and_nothing_sticks_out(page, tmp_path, width):
    probed = tmp_path / "probed.html"
    probed.write_text(page.read_text(encoding="utf-8").replace("</html>", PROBE + "</html>"), encoding="utf-8")
    done = subprocess.run(
        [str(BROWSER), "--headless=new", "--no-sandbox", "--disable-gpu", f"--window-size={width},900",
         f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", probed.as_uri()],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    found = re.search(r"""data-probe=["'](.*?)["']>""", done.stdout)
    assert found, done.stdout[-500:] + done.stderr[-2000:]
    seen = json.loads(found[1].replace("&quot;", '"'))
    assert seen == {"images": 2 * 3 * SHOWN_PER_CATEGORY + 6, "broken": 0, "overflow": seen["overflow"], "requests": 0}
    assert seen["overflow"] <= 0


def test_a_demo_that_is_stopped_draws_nothing_of_a_half_trained_lora(monkeypatch, tmp_path, caplog):
    stopped = RunResult(tmp_path / "dpo", steps=7, metrics={}, interrupted=True)
    monkeypatch.setattr(demo, "train", lambda *_: stopped)
    monkeypatch.setattr(demo, "_draw", lambda *_: pytest.fail("it drew"))
    with pytest.raises(SystemExit) as stop:
        demo.run(tmp_path, quick=True)
    assert stop.value.code == 0 and "stopped at step 7" in caplog.text
    assert not (tmp_path / "report.json").exists()
