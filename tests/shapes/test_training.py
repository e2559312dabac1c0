"""What the small models are trained with."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from diffalign.shapes.grammar import RELATIONS, inverse, parse, scenes
from diffalign.shapes.train_sd import NOISY_FROM, NOISY_SHARE, draw_times
from diffalign.shapes.train_text import after_end, side_reader, sides, sides_loss


def test_sides_say_the_same_of_a_scene_from_both_ends():
    both = scenes("validation", "two")
    assert torch.equal(sides(both), sides([inverse(scene) for scene in both]))
    assert not torch.equal(sides(both[:1]), sides([type(both[0])(both[0].things[::-1], both[0].relation)]))


def test_sides_of_one_caption_by_hand():
    left, right = RELATIONS.index("left of"), RELATIONS.index("right of")
    found = sides([parse("a green cross right of a red circle"), parse("two blue squares")])
    assert found[0, left].tolist() == [1, 1] and found[0, right].tolist() == [2, 4]  # red circle, green cross
    assert found[0].count_nonzero() == 4 and found[1].count_nonzero() == 0


def test_sides_are_asked_from_the_end_token_on_and_a_reader_that_knows_them_has_no_loss():
    scenes_, ids = [parse("a green cross right of a red circle")] * 2, torch.tensor([[5, 9, 3, 3], [5, 4, 9, 3]])
    asked = after_end(ids, end=9)
    assert asked.tolist() == [[False, True, True, True], [False, False, True, True]]
    wanted, reader = sides(scenes_), side_reader(8)
    with torch.no_grad():
        reader.weight.zero_()
        colors, shapes = reader.bias.view(4, 12).split((7, 5), dim=1)
        colors.fill_(-50.0).scatter_(1, wanted[0, :, :1], 50.0)
        shapes.fill_(-50.0).scatter_(1, wanted[0, :, 1:], 50.0)
    hidden = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(0))
    assert sides_loss(reader, hidden, asked, wanted).item() < 1e-6
    assert sides_loss(reader, hidden, asked, wanted.roll(1, dims=1)).item() > 10


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
    assert "text encoder taught for 2 steps" in first.stdout and "step 2 validation" in first.stdout
    again = subprocess.run([*words, "--steps", "3"], capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    assert "resumed at step 2" in again.stdout and "step 3 validation" in again.stdout
    assert "text encoder" not in again.stdout  # it is taught once
