"""`diffalign optimize-noise`: folders, the page, going on, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from miniatures import stable_diffusion
from PIL import Image

from diffalign import cli
from diffalign.noise import command
from diffalign.noise.command import IN_STRIP, Strip, means
from diffalign.noise.page import Shown

PROMPTS = ["a red circle", "two blue squares", "a green <cross>"]


def run(out: Path, *more: str, prompts: list[str] | None = None) -> int:
    with pytest.raises(SystemExit) as end:
        cli.main(["optimize-noise", *(prompts or PROMPTS), "--model", str(stable_diffusion()), "--reward", "tiny-clip",
                  "--reward", "jpeg=0", "--steps", "3", "--option", "lr=9", "--out", str(out), *more])  # fmt: skip
    return int(end.value.code or 0)


def names(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir()}


def test_a_folder_for_each_prompt_and_a_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "found"
    assert run(out, "--prompts-at-once", "2", "--seed", "5", "--json") == 0
    said = json.loads(capsys.readouterr().out)
    assert said["prompts"] == 3 and said["done_before"] == 0 and said["best"] >= said["first"]
    assert names(out) == {"00000", "00001", "00002", "settings.json", "index.html"}
    for number, prompt in enumerate(PROMPTS):
        folder = out / f"{number:05d}"
        assert names(folder) == {"best-0000.png", "first-0000.png", "strip.png", "noise.json", "noise.safetensors"}
        report = json.loads((folder / "noise.json").read_text())
        assert report["prompts"] == [prompt] and report["seeds"] == [5 + number] and report["settings"]["lr"] == 9.0
        assert Image.open(folder / "strip.png").size == (3 * 32, 32) and set(report["history"][0]) >= {"jpeg", "norm"}
    page = (out / "index.html").read_text()
    assert page.count("data:image/png") == 3 * 3 and page.count("data:image/svg+xml") == 3
    assert "a green &lt;cross&gt;" in page and "<cross>" not in page


def test_what_is_done_is_not_done_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "found"
    assert run(out, prompts=PROMPTS[:1]) == 0
    before = (out / "00000" / "noise.safetensors").read_bytes()
    capsys.readouterr()
    assert run(out, "--json") == 0
    assert json.loads(capsys.readouterr().out)["done_before"] == 1
    assert (out / "00000" / "noise.safetensors").read_bytes() == before and (out / "00002").exists()
    monkeypatch.setattr(command, "load_pipeline", lambda *args, **keywords: pytest.fail("there was nothing left to do"))
    assert run(out) == 0


def test_ctrl_c_leaves_what_was_found_and_the_next_call_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopping(prompts: Any, progress: Any) -> Any:
        if progress.iteration == 1:
            raise KeyboardInterrupt
        return "..."

    out = tmp_path / "found"
    with monkeypatch.context() as patched:
        patched.setattr(command, "table", stopping)
        assert run(out) == 130
    report = json.loads((out / "00000" / "noise.json").read_text())
    assert report["interrupted"] and len(report["history"]) == 2 and "interrupted" in (out / "index.html").read_text()
    assert not (out / "00001").exists()
    assert run(out) == 0
    assert not json.loads((out / "00000" / "noise.json").read_text())["interrupted"] and (out / "00002").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--option", "lr"), "--option lr: expected KEY=VALUE, such as lr=5"),
        (("--option", "memory=low"), "--option memory=low: has an option of its own, --memory"),
        (("--option", "lrr=1"), "did you mean 'lr'"),
        (("--prompts-at-once", "0"), "--prompts-at-once: expected at least 1, got 0"),
        (("--method", "renno"), "did you mean 'reno'"),
        (("--height", "31"), "multiples of 4, got 31 x 32"),
        (("--dtype", "int8"), "--dtype: expected float32, bfloat16 or float16, got 'int8'"),
    ],
)
def test_bad_options_are_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], more: tuple[str, ...], message: str
) -> None:
    assert run(tmp_path / "found", *more) == 2
    said = capsys.readouterr().err
    assert message in said and "Traceback" not in said


def test_results_of_other_settings_or_prompts_are_not_mixed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "found"
    assert run(out, prompts=PROMPTS[:1]) == 0
    assert run(out, "--memory", "low") == 2
    assert "made with another keywords; choose another --out" in capsys.readouterr().err
    assert run(out, prompts=["another prompt"]) == 2
    assert "expected the result of 'another prompt' with seed 0, got that of 'a red circle'" in capsys.readouterr().err
    other = tmp_path / "mine"
    other.mkdir()
    (other / "x.txt").write_text("x")
    assert run(other) == 2 and names(other) == {"x.txt"}


def test_a_call_that_was_refused_leaves_the_folder_free(tmp_path: Path) -> None:
    out = tmp_path / "found"
    assert run(out, "--method", "renno") == 2 and run(out, prompts=PROMPTS[:1]) == 0


def test_means_are_over_prompts_that_have_both_scores() -> None:
    totals = [(1.0, 2.0), (None, 9.0), (3.0, 6.0)]
    shown = [Shown(Path("x"), {"first": {"total": [a]}, "best": {"total": [b]}}) for a, b in totals]
    assert means(shown) == (2.0, 4.0, 2)
    assert means(shown[1:2])[2] == 0


def test_a_strip_keeps_a_dozen_at_even_distances() -> None:
    strip = Strip()
    for number in range(100):
        strip.add(number, torch.full((1, 3, 2, 2), number / 255))
    kept = [number for number, _ in strip.kept]
    assert len(kept) <= IN_STRIP and kept == list(range(0, 100, strip.every))
    assert strip.picture(0).getpixel((2, 0)) == (strip.every,) * 3
