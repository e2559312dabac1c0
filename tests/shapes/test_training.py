"""What the small models are trained with."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from diffalign.shapes.grammar import RELATIONS, inverse, parse, scenes
from diffalign.shapes.train_sd import NOISY_FROM, NOISY_SHARE, draw_times
from diffalign.shapes.train_text import sides


def test_sides_say_the_same_of_a_scene_from_both_ends():
    both = scenes("validation", "two")
    assert torch.equal(sides(both), sides([inverse(scene) for scene in both]))
    assert not torch.equal(sides(both[:1]), sides([type(both[0])(both[0].things[::-1], both[0].relation)]))


def test_sides_of_one_caption_by_hand():
    left, right = RELATIONS.index("left of"), RELATIONS.index("right of")
    found = sides([parse("a green cross right of a red circle"), parse("two blue squares")])
    assert found[0, left].tolist() == [1, 1] and found[0, right].tolist() == [2, 4]  # red circle, green cross
    assert found[0].count_nonzero() == 4 and found[1].count_nonzero() == 0


def test_half_of_the_times_are_noisy_and_the_rest_uniform():
    t = draw_times(40_000, 1000, torch.Generator().manual_seed(0))
    assert t.min() >= 0 and t.max() == 999
    noisy = (t >= 1000 * NOISY_FROM).float().mean().item()
    assert abs(noisy - (NOISY_SHARE + (1 - NOISY_SHARE) * (1 - NOISY_FROM))) < 0.01
    below = t[t < 1000 * NOISY_FROM].float()
    assert abs(below.mean().item() - 500 * NOISY_FROM) < 5


@pytest.mark.slow
def test_training_goes_on_from_shipped_weights_and_then_from_where_it_was(root: Path, tmp_path: Path):
    words = [sys.executable, "-m", "diffalign.shapes.train_sd", "--init", str(root / "assets" / "tiny-sd"),
             "--out", str(tmp_path / "sd"), "--pool", "64", "--batch", "4", "--teach-text", "2"]  # fmt: skip
    first = subprocess.run([*words, "--steps", "2"], capture_output=True, text=True, check=False)
    assert first.returncode == 0, first.stderr
    assert "text encoder: all sides right on" in first.stdout and "step 2 validation" in first.stdout
    again = subprocess.run([*words, "--steps", "3"], capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    assert "resumed at step 2" in again.stdout and "step 3 validation" in again.stdout
    assert "text encoder" not in again.stdout  # it is taught once
