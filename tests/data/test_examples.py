"""Which pairs a run trains on: ties, splits, rankings, views and orders, each from a seed and the content alone."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import toy_pairs
from PIL import Image

from diffalign.data import examples as pairs_module
from diffalign.data.examples import Example, epoch_order, held_out_prompts, iterate_examples, load_examples
from diffalign.data.options import Framing
from diffalign.data.records import BrokenRow, MediaSource, PreferenceRecord


def jsonl(folder: Path, ranked: list[dict[str, Any]]) -> dict[str, Any]:
    for row in ranked:
        for i, name in enumerate(row["images"]):
            if not (folder / name).exists():
                (folder / name).write_bytes(toy_pairs.png("a red circle", i, 32))
    (folder / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in ranked))
    return {"name": "jsonl", "path": str(folder), "val_fraction": 0}


def with_ties(folder: Path, count: int = 40) -> dict[str, Any]:
    return jsonl(folder, [{"prompt": f"prompt {i}", "images": [f"{i}a.png", f"{i}b.png"],
                           "scores": [1, 1] if i % 2 else [0, 1]} for i in range(count)])  # fmt: skip


def test_ties_are_dropped_kept_as_half_or_broken_by_a_coin(tmp_path: Path) -> None:
    section = with_ties(tmp_path)
    dropped, half, coin, again, other = (
        load_examples({**section, **options}, 32)
        for options in ({}, {"tie": "half"}, {"tie": "random"}, {"tie": "random"}, {"tie": "random", "split_seed": 1})
    )
    assert [pairs.ties for pairs in (dropped, half, coin)] == [20, 20, 20]
    assert [p.prompt for p in dropped.train] == [f"prompt {i}" for i in range(0, 40, 2)]
    assert [p.label for p in half.train] == [1.0, 0.5] * 20
    assert {p.label for p in coin.train} == {1.0} and len(coin.train) == 40
    tossed = [p.winner for p in coin.train if p.record.tie]
    assert 3 < sum(tossed) < 17
    assert tossed == [p.winner for p in again.train if p.record.tie]
    assert tossed != [p.winner for p in other.train if p.record.tie]
    assert all(p.winner == 1 for p in coin.train if not p.record.tie)
    for pairs, words in ((dropped, "20 ties dropped"), (half, "kept with label 1/2"), (coin, "broken at random")):
        assert words in pairs.summary()


def test_only_ties_is_nothing_to_train_on(tmp_path: Path) -> None:
    section = jsonl(tmp_path, [{"prompt": "a", "images": ["a.png", "b.png"], "scores": [1, 1]}])
    with pytest.raises(ValueError, match=r"no usable training example; 1 readable records, 1 ties \(drop\)"):
        load_examples(section, 32)


def test_rankings_become_best_against_worst_or_all_pairs(tmp_path: Path) -> None:
    section = jsonl(tmp_path, [{"prompt": "a", "images": ["a.png", "b.png", "c.png"], "scores": [1, 3, 1]}])
    assert [(p.winner, p.loser) for p in load_examples(section, 32).train] == [(1, 2)]
    everything = load_examples({**section, "ranking": "all"}, 32).train
    assert [(p.winner, p.loser) for p in everything] == [(1, 0), (1, 2)]
    half = load_examples({**section, "ranking": "all", "tie": "half"}, 32).train
    assert [(p.winner, p.loser, p.label) for p in half] == [(1, 0, 1.0), (1, 2, 1.0), (0, 2, 0.5)]


def test_the_split_is_by_prompt(tmp_path: Path) -> None:
    rows = [{"prompt": ("Prompt  %d" if i % 2 else "prompt %d ") % (i % 10), "images": [f"{i}a.png", f"{i}b.png"],
             "scores": [1, 0]} for i in range(40)]  # fmt: skip
    section = {**jsonl(tmp_path, rows), "val_fraction": 0.3}
    pairs = load_examples(section, 32)
    assert len(pairs.train) + len(pairs.validation) == 40
    train, validation = ({" ".join(p.prompt.lower().split()) for p in part} for part in (pairs.train, pairs.validation))
    assert len(validation) == 3 and not train & validation
    assert load_examples(section, 32).validation == pairs.validation
    assert {p.prompt for p in load_examples({**section, "split_seed": 1}, 32).validation} != {
        p.prompt for p in pairs.validation
    }


def test_the_split_does_not_depend_on_the_order_and_leaves_something_to_train_on() -> None:
    prompts = [f"prompt {i}" for i in range(50)]
    assert held_out_prompts(prompts, 0.2, 0) == held_out_prompts(prompts[::-1], 0.2, 0)
    assert len(held_out_prompts(prompts, 0.2, 0)) == 10
    assert held_out_prompts(prompts, 0.0, 0) == frozenset()
    assert held_out_prompts(["one"] * 5, 0.9, 0) == frozenset()


def test_more_data_moves_few_prompts_to_the_other_side() -> None:
    prompts = [f"prompt {i}" for i in range(1000)]
    before, after = held_out_prompts(prompts[:900], 0.1, 0), held_out_prompts(prompts, 0.1, 0)
    assert len(before - after) < 20


def test_max_pairs_stops_reading(tmp_path: Path) -> None:
    section = with_ties(tmp_path)
    assert len(load_examples({**section, "max_pairs": 7}, 32).train) == 7
    assert len(load_examples({**section, "max_pairs": 7, "tie": "half"}, 32).train) == 7
    assert len(list(iterate_examples({**section, "max_pairs": 7}, Framing(32)))) == 7


def test_iterating_gives_the_same_pairs_and_the_broken_rows(tmp_path: Path) -> None:
    section = with_ties(tmp_path)
    (tmp_path / "4a.png").unlink()
    found = list(iterate_examples(section, Framing(32)))
    assert tuple(p for p in found if isinstance(p, Example)) == load_examples(section, 32).train
    assert [row.source for row in found if isinstance(row, BrokenRow)] == ["metadata.jsonl line 5"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tie": "drpo"}, "data.tie: expected one of drop, half, random, got 'drpo'"),
        ({"ranking": "best"}, "data.ranking: expected one of best_worst, all"),
        ({"val_fraction": 1.0}, "val_fraction: expected at least 0 and less than 1"),
        ({"val_fraction": "a lot"}, "data.val_fraction: expected float, got 'a lot'"),
        ({"max_pairs": 0}, "max_pairs: expected at least 1"),
        ({"val_fracton": 0.1}, "did you mean 'val_fraction'"),
        ({"pth": "x"}, "did you mean 'path'"),
        ({"name": "pikapic"}, "did you mean 'pickapic'"),
    ],
)
def test_bad_keys_are_one_sentence(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_examples({"name": "jsonl", "path": "absent", **options}, 32)


def test_both_members_share_one_view_and_every_layout_draws_the_same(tmp_path: Path) -> None:
    found = []
    for layout in toy_pairs.LAYOUTS:
        (tmp_path / layout).mkdir()
        section = {**toy_pairs.write(layout, tmp_path / layout, 10), "val_fraction": 0}
        found.append(load_examples(section, Framing(24, random_crop=True, random_flip=True, seed=5)).train)
    views = [pair.crop for pair in found[0]]
    assert len({view.place for view in views}) == 10 and {view.flip for view in views} == {True, False}
    for other in found[1:]:
        assert [pair.crop for pair in other] == views
        assert [pair.cache_keys() for pair in other] == [pair.cache_keys() for pair in found[0]]
    section = {**section, "name": "webdataset"}
    reseeded = load_examples(section, Framing(24, random_crop=True, random_flip=True, seed=6)).train
    assert all(a.crop.place != b.crop.place for a, b in zip(reseeded, found[0], strict=True))
    assert {pair.crop.place for pair in load_examples(section, 24).train} == {(0.5, 0.5)}


def test_everything_that_changes_the_pixels_changes_the_key(tmp_path: Path) -> None:
    section = {**toy_pairs.write("jsonl", tmp_path, 1), "val_fraction": 0}
    options: list[dict[str, Any]] = [{}, {"random_crop": True}, {"random_crop": True, "seed": 1}]
    options += [{"random_flip": True, "seed": seed} for seed in range(8)]
    made = [load_examples(section, Framing(24, **more)).train[0] for more in options]
    made.append(load_examples(section, 32).train[0])
    by_key: dict[str, set[bytes]] = {}
    for pair in made:
        for key, pixels in zip(pair.cache_keys(), pair.pixels(), strict=True):
            by_key.setdefault(key, set()).add(bytes(pixels.numpy().tobytes()))
    assert all(len(pixels) == 1 for pixels in by_key.values())
    assert len(by_key) == 2 * 5  # center, two crops, a flip, another resolution


def picture(width: int, height: int) -> MediaSource:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), "red").save(buffer, "PNG")
    return MediaSource(buffer.getvalue())


def test_both_members_of_a_pair_are_in_the_bucket_of_the_winner(monkeypatch: pytest.MonkeyPatch) -> None:
    wide, tall = picture(256, 128), picture(100, 120)
    rows = [
        PreferenceRecord("a", (wide, tall), (1.0, 0.0), "row 0"),
        PreferenceRecord("b", (wide, tall), (0.0, 1.0), "row 1"),
    ]
    monkeypatch.setattr(pairs_module, "build", lambda *args, **keywords: iter(rows))
    section = {"name": "jsonl", "path": "none", "val_fraction": 0, "buckets": 16}
    first, second = load_examples(section, 64).train
    assert first.crop.size == (48, 96) and second.crop.size == (64, 64)
    for pair in (first, second):
        assert {tuple(pixels.shape[1:]) for pixels in pair.pixels()} == {pair.crop.size}
    assert load_examples({**section, "buckets": True}, 256).train[0].crop.size == (192, 384)


def test_orders_follow_from_seed_and_epoch_alone() -> None:
    orders = {(seed, epoch): tuple(epoch_order(50, seed, epoch)) for seed in (0, 1) for epoch in (0, 1, 2)}
    assert len(set(orders.values())) == 6
    assert all(sorted(order) == list(range(50)) for order in orders.values())
    torch.manual_seed(9)
    assert all(tuple(epoch_order(50, *key)) == order for key, order in orders.items())


def test_files_are_not_kept_in_memory_and_not_read_again_for_keys(tmp_path: Path) -> None:
    for layout in ("jsonl", "pickapic", "saved-dataset", "folders", "hpdv2", "webdataset"):
        (tmp_path / layout).mkdir()
        pairs = load_examples({**toy_pairs.write(layout, tmp_path / layout, 4), "val_fraction": 0}, 32)
        assert not any(isinstance(image.content, bytes) for p in pairs.train for image in p.record.images), layout
        for file in (f for f in (tmp_path / layout).rglob("*") if f.is_file()):
            file.unlink()
        assert len({key for pair in pairs.train for key in pair.cache_keys()}) == 8


def test_a_stream_too_large_for_the_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def endless() -> Iterator[PreferenceRecord]:
        while True:
            yield PreferenceRecord("a", (picture(64, 64), picture(32, 32)), (1.0, 0.0), "row")

    monkeypatch.setattr(pairs_module, "build", lambda *args, **keywords: endless())
    monkeypatch.setattr(pairs_module, "MEMORY", 20_000)
    with pytest.raises(ValueError, match="set data.max_pairs"):
        load_examples({"name": "pickapic", "path": "some/where"}, 32)
    assert len(load_examples({"name": "pickapic", "path": "some/where", "max_pairs": 3}, 32).train) == 3


def test_broken_rows_are_logged_by_name(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    section = with_ties(tmp_path, 60)
    for i in range(0, 50, 2):
        (tmp_path / f"{i}a.png").write_bytes(b"no picture")
    pairs = load_examples(section, 32)
    assert len(pairs.broken) == 25 and len(pairs.train) == 5
    assert "dropped metadata.jsonl line 1: image 0: not a readable image" in caplog.text
    assert "... and 5 more broken rows" in caplog.text


def test_a_picture_that_goes_missing_later_is_named(tmp_path: Path) -> None:
    pairs = load_examples(with_ties(tmp_path, 2), 32)
    (tmp_path / "0b.png").unlink()
    with pytest.raises(ValueError, match="0b.png cannot be read"):
        pairs.train[0].pixels()


def test_a_reader_of_ones_own_is_named_by_its_path(tmp_path: Path) -> None:
    section = with_ties(tmp_path)
    named = load_examples({**section, "name": "diffalign.data.readers:read_jsonl"}, 32)
    assert named.train == load_examples(section, 32).train
