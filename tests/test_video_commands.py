"""Clips on the command line: drawn, listed, played, scored and made into preferences."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from chromium import NEEDS_CHROMIUM, chromium
from miniatures import stable_diffusion, wan
from PIL import Image
from selenium.webdriver.support.ui import WebDriverWait

from diffalign import drawing
from diffalign.cli import main
from diffalign.data.clips import write_clip
from diffalign.generation import generate
from diffalign.pipelines import load_pipeline
from diffalign.pipelines.lora import attach_lora, save_lora
from diffalign.shapes.clips import render_clip
from diffalign.shapes.motion import parse_moving

LEFT, STILL = "a red circle moving left", "a blue square standing still"
SIZE = ("--height", "32", "--width", "32", "--num-frames", "5", "--steps", "2", "--max-sequence-length", "32")


def call(*words: object) -> int:
    with pytest.raises(SystemExit) as ended:
        main([str(word) for word in words])
    return int(ended.value.code or 0)


def rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def rendered(folder: Path, caption: str, name: str, seed: int = 0, frames: int = 9) -> Path:
    write_clip(render_clip(parse_moving(caption), random.Random(seed), frames), folder / name, 8)
    return folder / name


def test_generate_writes_clips_with_sheets_and_a_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert call("generate", "--model", wan(), "--prompt", LEFT, "--prompt", STILL, "--num-images", 2, "--out", out,
                "--seed", 7, "--fps", 8, *SIZE, "--json") == 0  # fmt: skip
    told = json.loads(capsys.readouterr().out)
    listed = rows(out / "generations.jsonl")
    assert told["videos"] == listed and [row["seed"] for row in listed] == [7, 8, 9, 10]
    assert [row["prompt"] for row in listed] == [LEFT, LEFT, STILL, STILL]
    pipe = load_pipeline(wan(), max_sequence_length=32)
    clips = generate(pipe, [LEFT], seeds=[8], steps=2, height=32, width=32, num_frames=5)
    assert clips.shape == (1, 5, 3, 32, 32)
    sheet = torch.from_numpy(np.array(Image.open(out / "sheets" / "00001.png"))).view(32, 5, 32, 3)
    expected = (clips[0] * 255).round().byte().permute(2, 0, 3, 1)
    assert (sheet.int() - expected.int()).abs().max() <= 1  # drawn in a batch of four
    page = (out / "index.html").read_text()
    assert page.count("<video") == 4 and page.count(LEFT) == 1 and "http" not in page


@pytest.mark.parametrize(
    ("model", "words", "message"),
    [
        (stable_diffusion, ("--num-frames", "5"), "draws pictures: expected no number of frames, got 5"),
        (wan, ("--num-frames", "6"), "of the form 4 n + 1, got 6; the nearest is"),
        (wan, ("--num-frames", "5", "--height", "33"), "multiples of 16"),
        (wan, ("--num-frames", "5", "--fps", "0"), "fps: expected frames a second above 0 and at most 240, got 0"),
    ],
)
def test_a_canvas_that_cannot_be_is_refused(
    model: Any, words: tuple[str, ...], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("generate", "--model", model(), "--prompt", LEFT, "--out", tmp_path / "x", *words) == 2
    assert message in " ".join(capsys.readouterr().err.split()) and not (tmp_path / "x").exists()


def test_base_and_lora_are_compared_on_clips_and_played_side_by_side(tmp_path: Path) -> None:
    pipe = load_pipeline(wan(), max_sequence_length=32)
    for parameter in attach_lora(pipe, rank=2):
        torch.nn.init.normal_(parameter, std=0.5, generator=torch.Generator().manual_seed(0))
    save_lora(pipe, tmp_path / "lora")
    assert call("evaluate", "--model", wan(), "--lora", tmp_path / "lora", "--prompt", LEFT, "--prompt", STILL,
                "--reward", "jpeg", "--out", tmp_path / "out", *SIZE) == 0  # fmt: skip
    report = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert report["rewards"]["jpeg"]["gain"] != 0
    page = (tmp_path / "out" / "index.html").read_text()
    for file in ("base/00000.mp4", "aligned/00000.mp4", "base/00001.mp4", "aligned/sheets/00001.png"):
        assert file in page and (tmp_path / "out" / file).exists()


def test_clips_are_scored_and_become_preferences(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good, bad = rendered(tmp_path, LEFT, "good.mp4"), rendered(tmp_path, STILL, "bad.mp4")
    (tmp_path / "cut.mp4").write_bytes(good.read_bytes()[:200])
    lines = [{"video": file, "prompt": LEFT} for file in ("good.mp4", "bad.mp4", "cut.mp4")]
    Image.new("RGB", (64, 64)).save(tmp_path / "still.png")
    lines.append({"image": "still.png", "prompt": STILL})
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    scores, page = tmp_path / "scores.jsonl", tmp_path / "page.html"
    assert call("score", tmp_path, "--reward", "moving-shapes", "--reward", "tiny-clip=0.01", "--out", scores,
                "--page", page) == 0  # fmt: skip
    found = {Path(row["image"]).name: row["scores"] for row in rows(scores)}
    assert found["good.mp4"]["moving-shapes"] == 1 and found["bad.mp4"]["moving-shapes"] == 0
    assert set(found) == {"good.mp4", "bad.mp4", "still.png"} and found["still.png"]["moving-shapes"] == 0
    said = capsys.readouterr()
    assert "cut.mp4" in said.out + said.err
    assert page.read_text().count("<img") >= 4
    labels = tmp_path / "labels.jsonl"
    assert call("label", scores, "--reward", "moving-shapes", "--out", labels) == 0
    [row] = rows(labels)
    assert [Path(name).name for name in row["images"]] == ["good.mp4", "bad.mp4"] and row["scores"] == [1, 0]
    assert call("label", scores, "--reward", "moving-shapes", "--out", tmp_path / "labels.parquet") == 2
    assert "choose a file that ends in .jsonl" in " ".join(capsys.readouterr().err.split())
    assert call("data", "check", labels, "--num-frames", 9) == 0
    assert call("data", "check", labels, "--num-frames", 90) == 1
    assert "the clip has 9 frames, and 90 are needed" in capsys.readouterr().out
    assert bad.exists()


def test_clips_that_are_compared_have_to_be_alike(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, other = rendered(tmp_path, LEFT, "a.mp4"), rendered(tmp_path, LEFT, "b.mp4", frames=11)
    wins = ("--reward", "winrate", "--set", "winrate.preference={name: reward, rewards: {moving-shapes: 1.0}}")
    assert call("score", one, other, "--prompt", LEFT, *wins) == 2
    assert "need clips of one size and length" in " ".join(capsys.readouterr().err.split())
    rendered(tmp_path, STILL, "b.mp4")
    assert call("score", one, other, "--prompt", LEFT, *wins, "--json") == 0
    assert [row["scores"]["winrate"] for row in json.loads(capsys.readouterr().out)["images"]] == [1, 0]


@NEEDS_CHROMIUM
def test_the_page_plays_all_clips_from_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clips = [render_clip(parse_moving(caption), random.Random(0), 17) for caption in (LEFT, STILL)]
    pixels = torch.from_numpy(np.stack(clips)).permute(0, 1, 4, 2, 3).float() / 255
    monkeypatch.setattr(drawing, "generate", lambda *_, **__: pixels)
    monkeypatch.setattr("diffalign.pipelines.wan.Wan.latent_shape", lambda *_: ())
    assert call("generate", "--model", wan(), "--prompt", LEFT, "--prompt", STILL, "--out", tmp_path / "out") == 0
    with chromium(tmp_path / "profile") as driver:
        driver.get((tmp_path / "out" / "index.html").as_uri())
        wait = WebDriverWait(driver, 30, 0.05)
        ready = "return [...document.querySelectorAll('video')].map(v => [v.readyState, v.videoWidth, v.duration])"
        wait.until(lambda _: all(state >= 2 for state, *_ in driver.execute_script(ready)))
        assert [[width, round(length, 2)] for _, width, length in driver.execute_script(ready)] == [[64, 1.06]] * 2
        driver.find_element("css selector", "#play").click()
        times = "return [...document.querySelectorAll('video')].map(v => v.paused ? -1 : v.currentTime)"
        wait.until(lambda _: min(driver.execute_script(times)) > 0.05)
        driver.find_element("css selector", "#pause").click()
        assert driver.execute_script(times) == [-1, -1]
        driver.save_screenshot(str(tmp_path / "page.png"))
    assert Image.open(tmp_path / "page.png").size[0] >= 1100
