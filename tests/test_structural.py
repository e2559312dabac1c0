"""Structural pairs: variants of real clips that share their layout, and labels of their segments."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from miniatures import stable_diffusion, wan
from PIL import Image
from torch import Tensor

from diffalign.answers import Unreached
from diffalign.cli import main
from diffalign.console import Result
from diffalign.data.clips import write_clip
from diffalign.data.examples import load_examples
from diffalign.data.options import Framing
from diffalign.data.readers import read_jsonl
from diffalign.data.views import view_of
from diffalign.labeling.segments import label_segments, stretches
from diffalign.pipelines import load_pipeline
from diffalign.pipelines.base import LatentPipeline
from diffalign.sampling import ddim_stepper, guided, sample
from diffalign.shapes.clips import render_clip
from diffalign.shapes.motion import parse_moving
from diffalign.structural import times_from, vary

LEFT, STILL = "a red circle moving left", "a blue square standing still"


def call(*words: object) -> int:
    with pytest.raises(SystemExit) as ended:
        main([str(word) for word in words])
    return int(ended.value.code or 0)


def clip(caption: str, seed: int = 0, frames: int = 9, size: int = 64) -> np.ndarray:
    return render_clip(parse_moving(caption), random.Random(seed), frames, size)


def model() -> LatentPipeline:
    return load_pipeline(wan(), max_sequence_length=32)


def test_the_walk_begins_on_the_samplers_own_grid_at_the_level() -> None:
    pipe = model()
    for level in (0.3, 0.75, 0.9):
        times = times_from(pipe, 40, level)
        grid = pipe.times(40)
        assert torch.equal(times, grid[-len(times) :]) and times[-1] == 0
        assert (times[0] - level).abs() == (grid[:-1] - level).abs().min()
    assert torch.equal(times_from(pipe, 40, 1.0), pipe.times(40))
    pictures = load_pipeline(stable_diffusion())
    assert float(times_from(pictures, 20, 0.75)[0]) == pytest.approx(750, abs=25)
    for level in (0.0, 1.1):
        with pytest.raises(ValueError, match="level: expected a share of the noise axis above 0"):
            times_from(pipe, 40, level)


def test_a_variant_is_the_clip_noised_and_walked_from_there() -> None:
    pipe, g = model(), torch.Generator().manual_seed(0)
    x0 = torch.randn(2, *pipe.latent_shape(32, 32, 5), generator=g)
    found = vary(pipe, x0, [LEFT, STILL], seeds=[3, 4], level=0.6, steps=5, guidance_scale=2.0)
    times = times_from(pipe, 5, 0.6)
    eps = torch.stack([torch.randn(x0.shape[1:], generator=torch.Generator().manual_seed(seed)) for seed in (3, 4)])
    x_t = (1 - times[0]) * x0 + times[0] * eps
    policy = guided(pipe.predict, pipe.encode_prompts(["", ""]), 2.0)
    step = ddim_stepper(policy, pipe.process, pipe.parametrization, pipe.encode_prompts([LEFT, STILL]))
    with torch.no_grad():
        torch.testing.assert_close(found, sample(step, x_t, times).x)
    alone = vary(pipe, x0[1:], [STILL], seeds=[4], level=0.6, steps=5, guidance_scale=2.0)
    torch.testing.assert_close(alone, found[1:], atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="as many prompts and seeds as latents, got 1 and 2 for 2"):
        vary(pipe, x0, [LEFT], seeds=[0, 1])


def test_less_noise_stays_nearer_to_the_clip(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a network that says the velocity towards its input's own mean, so that walks do not blow up."""
    pipe, g = model(), torch.Generator().manual_seed(0)
    x0 = torch.randn(4, *pipe.latent_shape(32, 32, 5), generator=g)
    monkeypatch.setattr(pipe, "predict", lambda x_t, t, condition: x_t - x_t.mean())
    far = [(vary(pipe, x0, [""] * 4, seeds=range(4), level=level, steps=20) - x0).square().mean().item()
           for level in (0.2, 0.5, 0.8)]  # fmt: skip
    assert far[0] < far[1] < far[2]


def test_vary_writes_pairs_of_what_can_be_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number, caption in enumerate((LEFT, STILL)):
        write_clip(clip(caption), tmp_path / f"{number}.mp4", 8)
        (tmp_path / f"{number}.txt").write_text(caption)
    write_clip(clip(LEFT, frames=3), tmp_path / "short.mp4", 8)
    (tmp_path / "short.txt").write_text(LEFT)
    words = ("vary", tmp_path, "--model", wan(), "--steps", 4, "--height", 32, "--width", 32, "--num-frames", 5,
             "--fps", 8, "--max-sequence-length", 32)  # fmt: skip
    assert call(*words, "--out", tmp_path / "out", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    rows = [json.loads(line) for line in (tmp_path / "out" / "pairs.jsonl").read_text().splitlines()]
    assert rows == told["pairs"] and [row["prompt"] for row in rows] == [LEFT, STILL]
    assert rows[0]["scores"] == [0, 0] and len({seed for row in rows for seed in row["seeds"]}) == 4
    assert "the clip has 3 frames" in told["broken"][0]["reason"] and "short.mp4" in told["broken"][0]["source"]
    assert all((tmp_path / "out" / name).exists() for row in rows for name in row["videos"])
    assert (tmp_path / "out" / "index.html").read_text().count("<video") == 4
    (tmp_path / "out" / "00001-a.mp4").unlink()
    listed = tmp_path / "out" / "pairs.jsonl"
    before = (tmp_path / "out" / "00000-a.mp4").stat().st_mtime_ns
    listed.write_text(listed.read_text()[:-9])  # as a kill leaves it
    assert call(*words, "--out", tmp_path / "out") == 0
    assert [json.loads(line) for line in listed.read_text().splitlines()] == rows
    assert (tmp_path / "out" / "00000-a.mp4").stat().st_mtime_ns == before  # is not drawn again
    assert (tmp_path / "out" / "00001-a.mp4").exists()
    capsys.readouterr()
    assert call(*words, "--out", tmp_path / "out", "--level", 0.5) == 2
    assert "were made with another level" in " ".join(capsys.readouterr().err.split())
    assert call(*words, "--out", tmp_path / "b", "--level", 2) == 2 and not (tmp_path / "b").exists()


def test_vary_takes_pictures_for_a_model_of_pictures(tmp_path: Path) -> None:
    Image.fromarray(clip(LEFT)[0]).save(tmp_path / "a.png")
    assert call("vary", tmp_path / "a.png", "--prompt", LEFT, "--model", stable_diffusion(), "--steps", 4, "--level",
                0.5, "--out", tmp_path / "out") == 0  # fmt: skip
    [row] = [json.loads(line) for line in (tmp_path / "out" / "pairs.jsonl").read_text().splitlines()]
    assert [Image.open(tmp_path / "out" / name).size for name in row["images"]] == [(32, 32)] * 2


class Lighter:
    """Prefers the lighter one; gray of 0 has no verdict."""

    workers = 2

    def prefer(self, a: Any, b: Any, prompt: str) -> float:
        one, other = (float(shown.float().mean()) for shown in (a, b))
        return float("nan") if not one else 0.5 if one == other else float(one > other)


def frames(folder: Path, levels: Sequence[int]) -> str:
    folder.mkdir()
    for number, level in enumerate(levels):
        Image.new("RGB", (16, 16), (level,) * 3).save(folder / f"{number}.png")
    return folder.name


def pair(tmp_path: Path, first: Sequence[int], second: Sequence[int], name: str = "p") -> dict[str, Any]:
    videos = [frames(tmp_path / f"{name}{place}", levels) for place, levels in enumerate((first, second))]
    return {"prompt": "a", "videos": videos, "scores": [0, 0]}


def test_each_stretch_has_its_own_label_and_most_of_them_say_the_whole(tmp_path: Path) -> None:
    rows = [
        pair(tmp_path, [9, 9, 1, 1, 5, 5, 9], [1, 1, 9, 9, 5, 5, 1], "p"),
        pair(tmp_path, [9, 9, 9, 9], [1, 1, 1, 1, 1], "q"),
        pair(tmp_path, [0] * 4, [1] * 4, "r"),
        pair(tmp_path, [1] * 3, [2] * 3, "s"),
    ]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    result = label_segments(read_jsonl(str(tmp_path / "pairs.jsonl")), Lighter(), 4, tmp_path / "out.jsonl", {})
    [line] = (tmp_path / "out.jsonl").read_text().splitlines()
    found = json.loads(line)
    assert [Path(name).name for name in found.pop("videos")] == ["p0", "p1"]
    assert found == {"prompt": "a", "scores": [2, 1], "segments": [1, -1, 0, 1]}
    assert result.data["pairs_both_ways"] == 1 and result.data["ties"] == 1 and result.data["broken"] == 3
    said = " ".join(result.data["reasons"])
    for reason in ("have 4 and 5 frames", "no segment has a verdict", "3 frames cannot be cut into 4 segments"):
        assert reason in said
    seen = Framing(16, frames=7)
    section = {"name": "jsonl", "path": str(tmp_path / "out.jsonl"), "val_fraction": 0.0}
    assert load_examples(section, seen, view_of("labeled_parts")).train[0].signs == (1, -1, 0, 1)
    assert load_examples(section, seen).train[0].winner == 0  # to plain dpo the majority's pair


def test_labels_go_on_where_they_were_cut_off_and_end_where_nobody_answers(tmp_path: Path) -> None:
    rows = [pair(tmp_path, [9, 1], [1, 9], "p"), pair(tmp_path, [9, 9], [1, 1], "q"), pair(tmp_path, [9], [1], "r")]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    asked: list[int] = []

    class Leaves(Lighter):
        workers = 1

        def prefer(self, a: Any, b: Any, prompt: str) -> float:
            asked.append(1)
            if len(asked) == 3:
                raise Unreached("nobody answers at 127.0.0.1")
            return super().prefer(a, b, prompt)

    def label(preference: Lighter, **settings: Any) -> Result:
        return label_segments(
            read_jsonl(str(tmp_path / "pairs.jsonl")), preference, 2, tmp_path / "out.jsonl", settings
        )

    with pytest.raises(Unreached):
        label(Leaves())
    assert not (tmp_path / "out.jsonl").exists()
    journal = tmp_path / "out.jsonl.part"
    journal.write_text(journal.read_text() + '{"prompt": "a", "cl')  # as a kill leaves it
    with pytest.raises(ValueError, match="labels of other settings"):
        label(Leaves(), tie_margin=1)
    result = label(Leaves())
    assert len(asked) == 3 + 2 and result.data["pairs"] == 2 and result.data["broken"] == 1 and not journal.exists()
    found = [json.loads(line)["segments"] for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert found == [[1, -1], [1, 1]]


def test_stretches_differ_by_a_frame_at_most() -> None:
    parts = stretches(torch.arange(10)[:, None], 4)
    assert [part.flatten().tolist() for part in parts] == [[0, 1, 2], [3, 4, 5], [6, 7], [8, 9]]


def test_segments_by_rewards_and_by_a_judge_on_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [pair(tmp_path, [200] * 4, [0, 90, 0, 90])]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    words = ("label-segments", tmp_path / "pairs.jsonl", "--out", tmp_path / "out.jsonl", "--segments", 2)
    assert call(*words, "--reward", "jpeg", "--tie-margin", 1000) == 0
    assert json.loads((tmp_path / "out.jsonl").read_text())["segments"] == [0, 0]
    asked: list[tuple[int, str]] = []

    class Judge:
        workers = 1

        def ask(self, images: Sequence[Image.Image], question: str) -> Any:
            from diffalign.answers import Answer

            asked.append((len(images), question))
            return Answer(f"Better: {1 if np.asarray(images[0]).mean() > np.asarray(images[1]).mean() else 2}")

    monkeypatch.setattr("diffalign.rewards.pairwise.load_asker", lambda judge, device: Judge())
    assert call(*words, "--preference", "{judge: {model: x, base_url: y}, template: vlm-clip-pair}") == 0
    assert json.loads((tmp_path / "out.jsonl").read_text())["segments"] == [1, 1]
    assert len(asked) == 4 and "frames of its clip" in asked[0][1]  # both orders of both segments
    capsys.readouterr()
    assert call(*words) == 2 and "expected --reward NAME[=WEIGHT] or --preference" in capsys.readouterr().err
    assert call(*words, "--preference", "judge") == 2 and "expected a section" in capsys.readouterr().err


def test_a_tensor_is_what_preferences_see(tmp_path: Path) -> None:
    seen = []

    class Told:
        workers = 1

        def prefer(self, a: Any, b: Any, prompt: str) -> float:
            assert isinstance(a, Tensor) and isinstance(b, Tensor)
            seen.append((tuple(a.shape), a.dtype, prompt))
            return 1.0

    (tmp_path / "pairs.jsonl").write_text(json.dumps(pair(tmp_path, [9] * 4, [1] * 4)))
    label_segments(read_jsonl(str(tmp_path / "pairs.jsonl")), Told(), 2, tmp_path / "out.jsonl", {})
    assert seen == [((2, 3, 16, 16), torch.uint8, "a")] * 2
