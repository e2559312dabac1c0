"""Clips through everything: files, cache, every method, validation and resuming, on a miniature of Wan."""

from __future__ import annotations

import csv
import json
import logging
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from miniatures import stable_diffusion, wan
from PIL import Image
from safetensors.torch import load_file

from diffalign.cache import Cache
from diffalign.data.check import check
from diffalign.data.examples import load_examples
from diffalign.data.options import Framing
from diffalign.data.views import view_of
from diffalign.methods import METHODS
from diffalign.pipelines import load_pipeline
from diffalign.pipelines.lora import WEIGHTS_NAME
from diffalign.rewards import load_rewards
from diffalign.shapes.clips import render_clip
from diffalign.shapes.motion import parse_moving
from diffalign.startup import prepare_run
from diffalign.trainer import train

CAPTIONS = ["a red circle moving left", "a blue square standing still", "a green cross moving up then stopping",
            "a yellow circle moving right quickly"]  # fmt: skip
FRAMES = 5
SEEN = Framing(32, frames=FRAMES)
WALK = {"steps": 3, "guidance": 2.0}
DRAWN = {"steps": 3, "guidance": 2.0}
PAID: dict[str, Any] = {"rewards": {"moving-shapes": {"mode": "score"}, "jpeg": 1e-3}}
LEARNED: dict[str, Any] = {"rewards": {"tiny-clip": 1.0}}
WINS: dict[str, Any] = {"rewards": {"winrate": {"preference": {"name": "reward", "rewards": {"jpeg": 1.0}}}}}
# what each needs beside its name, so that a step takes a moment
RUNS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "inpo": ({"steps": 4}, {}),
    "smpo": ({"steps": 4}, {}),
    "inversion_dpo": ({"steps": 3, "sampled": 2}, {}),
    "rankdpo": ({"phi": "scores"}, {}),
    **{name: (DRAWN, {}) for name in ("seppo", "spin", "dro")},
    "online_dpo": (DRAWN, PAID),
    **dict.fromkeys(("ddpo", "dpok"), (WALK, PAID)),
    **{name: ({"group": 2, **WALK}, PAID) for name in ("grpo", "nft")},
    "prdp": ({"group": 2, "updates": 1, **WALK}, PAID),
    "d3po": ({"mode": "pairs", **WALK}, PAID),
    "pref_grpo": ({"group": 2, **WALK}, WINS),
    **dict.fromkeys(("alignprop", "draft_lv"), (WALK, LEARNED)),
    "draft": ({"last": 2, **WALK}, LEARNED),
    "refl": ({"late": 2, "goal": None, **WALK}, LEARNED),
    "drtune": ({"late": 1, "trained": 2, **WALK}, LEARNED),
}

QUICK = ("dpo", "densedpo", "seppo", "d3po", "draft")


def clip(caption: str, seed: int, frames: int = FRAMES) -> np.ndarray:
    return render_clip(parse_moving(caption), random.Random(seed), frames, 32)


def frames_of(folder: Path, clip: np.ndarray) -> str:
    """Its frames as files; the folder's name."""
    folder.mkdir(parents=True)
    for number, array in enumerate(clip):
        Image.fromarray(array).save(folder / f"{number}.png")
    return folder.name


def clips(folder: Path, count: int = 6, frames: int = FRAMES) -> dict[str, Any]:
    """Lists of three with shares for scores and a second caption, and pairs with segments: every view finds its own."""
    lines = []
    for i in range(count):
        caption = CAPTIONS[i % 4]
        names = [frames_of(folder / f"{i}-{j}", clip(CAPTIONS[(i + j) % 4], 3 * i + j, frames)) for j in range(3)]
        lines.append({"prompt": caption, "videos": names, "scores": [1.0, 0.5, 0.1 * i],
                      "prompt_loser": CAPTIONS[(i + 2) % 4]})  # fmt: skip
        if i < 4:
            lines.append({"prompt": caption, "videos": names[:2], "scores": [1.0, 0.0],
                          "prompt_loser": CAPTIONS[(i + 1) % 4], "segments": [1, -1]})  # fmt: skip
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return {"name": "jsonl", "path": str(folder), "val_fraction": 0.25}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with clips, whose cache all runs share."""
    folder = tmp_path_factory.mktemp("clips")
    (folder / "data").mkdir()
    clips(folder / "data")
    return folder


def config(place: Path, out: Path, name: str = "dpo", **changes: Any) -> dict[str, Any]:
    keywords, beside = RUNS.get(name, ({}, {}))
    values = {
        "pretrained_model_name_or_path": str(wan()),
        "resolution": 32,
        "num_frames": FRAMES,
        "max_sequence_length": 16,
        "lora": {"rank": 2},
        "method": {"name": name, **keywords},
        "data": {"name": "jsonl", "path": str(place / "data"), "val_fraction": 0.25},
        "train_batch_size": 2,
        "validation_batch_size": 2,
        "learning_rate": 1e-2,
        "max_train_steps": 1,
        "logging_steps": 1,
        "checkpointing_steps": 1,
        "report_to": "none",
        "output_dir": str(out),
        "cache_dir": str(place / "cache"),
    }
    return {**values, **beside, **changes}


def rows(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow)
                                  for name in METHODS if name != "ppd"])  # fmt: skip
def test_every_method_takes_clips_as_it_takes_pictures(name: str, place: Path, tmp_path: Path) -> None:
    result = train(config(place, tmp_path / "run", name))
    first = next(row for row in rows(result.folder) if "loss" in row)
    assert np.isfinite(first["loss"]) and first["grad_norm"] > 0
    assert any(value.abs().sum() > 0 for key, value in load_file(result.folder / WEIGHTS_NAME).items() if "B" in key)


def test_users_are_not_told_to_clips_yet(place: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'ppd' tells the network of users, which is there for pictures alone"):
        prepare_run(config(place, tmp_path / "run", "ppd"), [])


def test_a_rewards_gradient_reaches_the_latents_that_are_decoded(place: Path, tmp_path: Path) -> None:
    latents = torch.randn(2, 4, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    found = {}
    for few in (None, 1):
        prepared = prepare_run(config(place, tmp_path / str(few), "alignprop", decoded_latents=few), [])
        found[few] = prepared.reward_gradient(latents, CAPTIONS[:2])
    (all_scores, whole), (scores, part) = found[None], found[1]
    assert (whole.flatten(3).norm(dim=(1, 3)) > 0).all()
    assert part[:, :, 1].count_nonzero() == 0 and (part[:, :, 0].flatten(1).norm(dim=1) > 0).all()
    pipe, reward = load_pipeline(wan()), load_rewards({"tiny-clip": 1.0})
    first = latents.clone().requires_grad_()
    expected = reward(pipe.decode(first)[:, :1].clamp(0, 1), CAPTIONS[:2])  # a causal VAE's first frame, of all five
    torch.testing.assert_close(scores.total, expected.detach(), atol=1e-4, rtol=0)
    (slope,) = torch.autograd.grad(expected.sum(), first)
    torch.testing.assert_close(part, slope, atol=1e-4, rtol=1e-3)
    assert not torch.allclose(all_scores.total, scores.total)


@pytest.mark.slow
def test_a_run_on_clips_goes_on_where_it_was_stopped_and_shows_what_it_draws(place: Path, tmp_path: Path) -> None:
    more = {"validation_prompts": CAPTIONS[:2], "num_inference_steps": 2, "rewards": {"moving-shapes": 1.0}}
    whole = train(config(place, tmp_path / "whole", "densedpo", max_train_steps=2, **more))
    part = config(place, tmp_path / "part", "densedpo", **more)
    train(part)
    resumed = train({**part, "max_train_steps": 2, "resume_from_checkpoint": "latest"})
    one, other = (load_file(run.folder / WEIGHTS_NAME) for run in (whole, resumed))
    assert all(torch.equal(one[key], other[key]) for key in one)
    validated = [row for row in rows(whole.folder) if "validation/reward/moving-shapes" in row]
    assert {name for row in validated for name in row} >= {"validation/pictures/motion", "validation/loss"}
    [*_, sheet] = sorted((whole.folder / "samples").glob("*.png"))
    assert Image.open(sheet).size == (FRAMES * 32, 2 * 32)  # a row of frames for each prompt


def test_segments_are_as_the_clips_are(tmp_path: Path) -> None:
    names = [frames_of(tmp_path / name, clip(CAPTIONS[0], seed)) for seed, name in enumerate("ab")]
    for segments, message in (([1] * 6, "6 segment labels do not match the clip, which has 5 frames"),
                              (None, "no labels of segments")):  # fmt: skip
        row = {"prompt": CAPTIONS[0], "videos": names, "scores": [1, 0], "segments": segments}
        (tmp_path / "metadata.jsonl").write_text(json.dumps(row))
        with pytest.raises(ValueError, match=message):
            load_examples({"name": "jsonl", "path": str(tmp_path)}, SEEN, view_of("labeled_parts"))


def test_a_broken_or_short_clip_is_dropped_whole_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    good = [frames_of(tmp_path / name, clip(CAPTIONS[0], seed)) for seed, name in enumerate("ab")]
    short = frames_of(tmp_path / "short", clip(CAPTIONS[0], 2, frames=3))
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    pairs = [good, [good[0], short], [good[0], "broken.mp4"], [good[0], "absent.mp4"]]
    rows = [{"prompt": CAPTIONS[0], "chosen": chosen, "rejected": rejected} for chosen, rejected in pairs]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with caplog.at_level(logging.WARNING):
        found = load_examples({"name": "jsonl", "path": str(tmp_path), "val_fraction": 0.0}, SEEN)
    assert len(found.train) == 1
    reasons = [row.reason for row in found.broken]
    assert "clip 1: the clip has 3 frames, and 5 are needed" in reasons[0]
    assert "clip 1: not a readable clip" in reasons[1] and "absent.mp4 cannot be read" in reasons[2]
    assert "metadata.jsonl line 3" in caplog.text
    report = check(str(tmp_path), frames=FRAMES)
    assert report.records == 1 and report.broken == 3 and report.sizes == {"32x32": 2}


@pytest.mark.parametrize(("axis", "kept"), [("all", [("a", "b")]), ("MQ", [("b", "a")]), ("TA", [])])
def test_videoaligns_csv(axis: str, kept: list[tuple[str, str]], tmp_path: Path) -> None:
    for seed, name in enumerate("ab"):
        frames_of(tmp_path / "clips" / name, clip(CAPTIONS[0], seed))
    columns = ("path_A", "path_B", "prompt", "VQ", "MQ", "TA", "fps_A", "num_frames_A")
    lines = [("a", "b", CAPTIONS[0], "A", "B", "same", 8, 5), ("a", "b", CAPTIONS[0], "A", "A", "same", 8, 5),
             ("a", "b", CAPTIONS[0], "A", "A", "?", 8, 5), ("a", "a", CAPTIONS[0], "A", "A", "A", 8, 5)]  # fmt: skip
    with (tmp_path / "labels.csv").open("w", newline="") as file:
        csv.writer(file).writerows([columns, *(lines if axis == "all" else lines[:1])])
    section = {"name": "videoalign", "path": str(tmp_path), "axis": axis, "root": str(tmp_path / "clips"),
               "val_fraction": 0.0}  # fmt: skip
    if not kept:
        with pytest.raises(ValueError, match="1 ties"):
            load_examples(section, SEEN)
        return
    found = load_examples(section, SEEN)
    made = [tuple(Path(str(source.content)).name for source in example.sources) for example in found.train]
    assert made == kept
    if axis == "all":
        assert found.ties == 1 and [row.source for row in found.broken] == ["labels.csv row 3", "labels.csv row 4"]
        assert "TA (text alignment) to be A, B or same, got '?'" in found.broken[0].reason


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"axis": "quality"}, "unknown axis of videoalign 'quality'"),
        ({"path": "absent.csv"}, r"absent\.csv: cannot be read"),
        (
            {},
            r"expected the columns path_A, .*, TA; missing: VQ, MQ, TA; found path_A, path_B, prompt",
        ),
    ],
)
def test_a_csv_of_another_kind_is_refused(options: dict[str, str], message: str, tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("path_A,path_B,prompt\na,b,c\n")
    with pytest.raises(ValueError, match=message):
        load_examples({"name": "videoalign", "path": str(tmp_path), **options}, SEEN)


def test_what_a_clip_is_seen_as_is_part_of_its_key(place: Path, tmp_path: Path) -> None:
    section = {"name": "jsonl", "path": str(place / "data"), "val_fraction": 0.0}
    many, few, timed = (load_examples(section, Framing(32, frames=frames, fps=fps)).train[0]
                        for frames, fps in ((5, None), (1, None), (5, 8.0)))  # fmt: skip
    keys = {example.cache_keys()[0] for example in (many, few, timed)}
    assert len(keys) == 3 and many.pixels()[0].shape == (5, 3, 32, 32)
    pipe = load_pipeline(wan(), max_sequence_length=16)
    cache = Cache(tmp_path, pipe)
    cache.fill(pipe, [many], [], 2, lambda *_: None)
    pixels = torch.stack(many.pixels()).float() / 255
    torch.testing.assert_close(cache.moments(many)[0]["mean"], pipe.encode(pixels)[0][0])


@pytest.mark.parametrize(
    ("model", "changes", "message"),
    [
        (wan, {"num_frames": None, "data": None}, "draws clips: set num_frames"),
        (stable_diffusion, {"max_sequence_length": None}, "num_frames is for models that draw clips"),
        (wan, {"num_frames": 4}, "of the form 4 n . 1, got 4; the nearest is 5"),
        (wan, {"height": 40}, "multiples of 16, got 40 x 32"),
        (wan, {"num_frames": 0}, "num_frames: expected a number above 0"),
        (wan, {"num_frames": None, "fps": 8}, "fps is of clips: set num_frames too"),
        (stable_diffusion, {"num_frames": None, "decoded_latents": 2}, "decoded_latents is of clips: set num_frames"),
    ],
)
def test_what_cannot_work_is_refused(
    model: Any, changes: dict[str, Any], message: str, place: Path, tmp_path: Path
) -> None:
    if changes.get("data", 0) is None:  # pictures, which are read before the model is
        for number in range(2):
            Image.fromarray(clip(CAPTIONS[0], number)[0]).save(tmp_path / f"{number}.png")
        (tmp_path / "metadata.jsonl").write_text(
            json.dumps({"prompt": "a", "chosen": "0.png", "rejected": "1.png"}))  # fmt: skip
        changes = {**changes, "data": {"name": "jsonl", "path": str(tmp_path), "val_fraction": 0.0}}
    values = config(place, tmp_path / "run", **changes)
    with pytest.raises(ValueError, match=message):
        prepare_run({**values, "pretrained_model_name_or_path": str(model())}, [])
