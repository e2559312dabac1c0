"""What each view makes of a record: which pictures, under which prompts, with which labels, and what it refuses."""

from __future__ import annotations

import dataclasses
import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import toy_pairs
from PIL import Image

from diffalign.batches import Batches
from diffalign.data.example import Example
from diffalign.data.examples import contradictions, load_examples
from diffalign.data.images import framed_regions, resize_and_crop
from diffalign.data.options import DataOptions, Framing
from diffalign.data.records import MediaSource, PreferenceRecord
from diffalign.data.views import VIEWS, view_of

CAPTION = "a red circle"
PICTURES = tuple(MediaSource(toy_pairs.png(CAPTION, seed, 32)) for seed in range(4))
PLAIN, FRAMING = DataOptions(), Framing(32)


def record(*scores: float, **changes: Any) -> PreferenceRecord:
    return replace(PreferenceRecord(CAPTION, PICTURES[: len(scores)], scores, "row 1"), **changes)


def seen(view: Any, row: PreferenceRecord, **options: Any) -> list[tuple[tuple[int, ...], float]]:
    return [(e.members, e.label) for e in view_of(view)(row, replace(PLAIN, **options), FRAMING)]


@pytest.mark.parametrize(
    ("view", "expected"),
    [
        ("pairs", [((1, 3), 1.0)]),
        ("winners", [((1,), 1.0)]),
        ("lists", [((1, 0, 2, 3), 1.0)]),  # of equal ones the earlier stays first
        ("thumbs", [((1,), 1.0), ((3,), 0.0)]),  # those in the middle give nothing
        ("prompts", [((), 1.0)]),
        ("perturbed", [((1, 1), 1.0)]),
    ],
)
def test_one_ranking_under_each_view(view: str, expected: list[Any]) -> None:
    assert seen(view, record(2.0, 3.0, 2.0, 1.0)) == expected


@pytest.mark.parametrize(
    ("view", "drop", "half"),
    [
        ("pairs", [], [((0, 1), 0.5)]),
        ("winners", [], [((0,), 0.5)]),
        ("lists", [], []),
        ("thumbs", [], []),
        ("perturbed", [], [((0, 0), 1.0)]),  # which of two equal pictures stands under its caption does not matter
    ],
)
def test_a_tie_under_each_view(view: str, drop: list[Any], half: list[Any]) -> None:
    assert seen(view, record(1.0, 1.0)) == drop
    assert seen(view, record(1.0, 1.0), tie="half") == half


def test_single_thumbs_are_liked_or_not() -> None:
    assert seen("thumbs", record(1.0)) == [((0,), 1.0)]
    assert seen("thumbs", record(0.0)) == [((0,), 0.0)]
    assert seen("winners", record(1.0)) == [((0,), 1.0)] and seen("winners", record(0.0)) == []
    assert seen("perturbed", record(1.0)) == [((0, 0), 1.0)] and seen("perturbed", record(0.0)) == []
    assert seen("prompts", record(0.0)) == [((), 1.0)]


@pytest.mark.parametrize("view", [name for name in VIEWS if name != "prompts"])
def test_prompts_alone_are_for_methods_that_draw(view: str) -> None:
    row = PreferenceRecord(CAPTION, (), (), "row 1", prompt_loser="a cat")
    with pytest.raises(ValueError, match="a prompt alone: expected pictures of it"):
        seen(view, row)
    assert seen("prompts", row) == [((), 1.0)]


@pytest.mark.parametrize("view", ["pairs", "lists", "captioned_pairs", "labeled_parts"])
def test_rankings_of_one_picture_are_refused(view: str) -> None:
    with pytest.raises(ValueError, match="one picture cannot be ranked"):
        seen(view, record(1.0, prompt_loser="a cat", regions=((1,),)))


def test_buckets_reach_single_pictures() -> None:
    wide = MediaSource(_png(Image.new("RGB", (128, 64))))
    row = PreferenceRecord(CAPTION, (wide,), (1.0,), "row 1")
    for view in ("winners", "thumbs", "perturbed"):
        [example] = view_of(view)(row, replace(PLAIN, buckets=16), Framing(64))
        assert example.crop.size[1] > example.crop.size[0], view


def test_captions_of_their_own() -> None:
    row = record(0.0, 1.0, prompt_loser="a blue square")
    [example] = view_of("captioned_pairs")(row, PLAIN, FRAMING)
    assert example.members == (1, 0) and example.prompts == (CAPTION, "a blue square") and example.prompt == CAPTION
    with pytest.raises(ValueError, match="the loser has no caption of its own: give prompt_loser"):
        seen("captioned_pairs", record(0.0, 1.0))


def test_a_perturber_may_write_the_losers_caption() -> None:
    [example] = view_of({"name": "captioned_pairs", "perturber": "rules"})(record(0.0, 1.0), PLAIN, FRAMING)
    assert example.members == (1, 0) and example.prompts[0] == CAPTION != example.prompts[1]
    assert seen({"name": "captioned_pairs", "perturber": "rules"}, record(1.0, 1.0)) == []


def test_data_without_second_captions_is_one_sentence(tmp_path: Path) -> None:
    section = toy_pairs.write("jsonl", tmp_path)
    with pytest.raises(ValueError, match=r"no usable training example; 4 readable .* no caption of its own") as refused:
        load_examples({**section, "val_fraction": 0}, 32, view_of("captioned_pairs"))
    assert "\n" not in str(refused.value)


def test_lists_of_shares_are_checked_where_a_method_takes_them_as_such() -> None:
    shares = {"name": "lists", "unit_scores": True}
    assert seen(shares, record(0.0, 1.0, 0.5)) == [((1, 2, 0), 1.0)]
    with pytest.raises(ValueError, match=r"expected scores in \[0, 1\], such as `diffalign label`"):
        seen(shares, record(21.3, 20.9))


# -- perturbed captions ------------------------------------------------------------------------------------------------


def test_one_picture_stands_under_two_prompts() -> None:
    [example] = view_of("perturbed")(record(0.0, 1.0), PLAIN, FRAMING)
    right, wrong = example.prompts
    assert right == CAPTION != wrong and example.cache_keys()[0] == example.cache_keys()[1]
    assert len(set(example.sources)) == 1
    again = view_of({"name": "perturbed", "perturber": {"name": "rules", "seed": 0}})(record(0.0, 1.0), PLAIN, FRAMING)
    assert again[0].prompts == example.prompts
    others = {view_of({"name": "perturbed", "perturber": {"name": "rules", "seed": s}})(record(1.0), PLAIN, FRAMING)[0]
              .prompts[1] for s in range(12)}  # fmt: skip
    assert len(others) > 3 and CAPTION not in others


def test_given_captions_are_the_rows_own() -> None:
    view = view_of({"name": "perturbed", "perturber": "given"})
    [example] = view(record(0.0, 1.0, prompt_loser="a blue square"), PLAIN, FRAMING)
    assert example.prompts == (CAPTION, "a blue square")
    with pytest.raises(ValueError, match="prompt_loser, which this row lacks"):
        view(record(0.0, 1.0), PLAIN, FRAMING)
    with pytest.raises(ValueError, match="says the same as the prompt"):
        view(record(0.0, 1.0, prompt_loser="A red  circle."), PLAIN, FRAMING)


def test_captions_that_the_rules_do_not_know_are_dropped_and_named(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(toy_pairs.png(CAPTION, 0, 32))
    rows = [{"prompt": p, "image": "a.png", "liked": True} for p in (CAPTION, "xyzzy", "two cats on a sofa")]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    section = {"name": "jsonl", "path": str(tmp_path), "val_fraction": 0}
    found = load_examples(section, 32, view_of("perturbed"))
    assert [e.prompt for e in found.train] == [CAPTION, "two cats on a sofa"]
    [broken] = found.broken
    assert broken.source == "metadata.jsonl line 2" and "know no word of this caption" in broken.reason


# -- labels of parts ---------------------------------------------------------------------------------------------------


def test_labeled_parts_keep_the_records_order_and_do_not_ask_for_a_winner() -> None:
    for scores in ((0.0, 1.0), (1.0, 0.0), (1.0, 1.0)):
        [example] = view_of("labeled_parts")(record(*scores, regions=((1, -1),)), PLAIN, FRAMING)
        assert example.members == (0, 1) and example.label == 1.0
        assert example.signs == ((1, 1, -1, -1),) * 4


def test_pairs_turn_labels_of_parts_with_their_order() -> None:
    [example] = view_of("pairs")(record(0.0, 1.0, regions=((1, -1),)), PLAIN, FRAMING)
    assert example.members == (1, 0) and example.signs == ((-1, -1, 1, 1),) * 4
    [example] = view_of("pairs")(record(0.0, 1.0, segments=(1, 0, -1)), PLAIN, FRAMING)
    assert example.signs == (-1, 0, 1)


def test_rows_whose_parts_are_all_ties_are_skipped() -> None:
    assert seen("labeled_parts", record(0.0, 1.0, regions=((0, 0), (0, 0)))) == []
    assert seen("labeled_parts", record(0.0, 1.0, segments=(0,))) == []
    [example] = view_of("labeled_parts")(record(0.0, 1.0, segments=(-1,)), PLAIN, FRAMING)
    assert example.signs == ((-1,) * 4,) * 4  # one segment of a still picture is one region


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (record(0.0, 1.0), "no labels of parts: give segments .* or regions"),
        (record(0.0, 1.0, segments=(1, 0, -1)), "3 segment labels do not match the frame count, which is 1"),
        (record(0.0, 1.0, 2.0, regions=((1,),)), "labels of parts are of two pictures or clips, got 3"),
    ],
)
def test_labels_that_do_not_fit_are_refused_when_the_data_are_read(row: PreferenceRecord, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        seen("labeled_parts", row)


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("place", [(0.0, 0.0), (0.5, 1.0), (1.0, 0.3)])
def test_regions_are_framed_as_their_picture_is(place: tuple[float, float], flip: bool) -> None:
    """A picture painted with its own map: after resize, crop and flip each place shows the label it has."""
    rng = random.Random(0)
    regions = [[rng.choice((-1, 0, 1)) for _ in range(6)] for _ in range(3)]
    picture = Image.new("RGB", (6 * 32, 3 * 32))
    for y, row in enumerate(regions):
        for x, sign in enumerate(row):
            picture.paste(((sign + 1) * 127,) * 3, (32 * x, 32 * y, 32 * x + 32, 32 * y + 32))
    pixels = resize_and_crop(picture, (64, 64), place, flip).float().mean(0)
    framed = framed_regions(regions, (96, 192), (64, 64), place, flip)
    shown = pixels.view(8, 8, 8, 8).permute(0, 2, 1, 3)
    clear = (shown.flatten(2).amax(2) - shown.flatten(2).amin(2)) < 1  # places that lie inside one region
    assert clear.sum() > 20
    found = (shown.flatten(2).mean(2) / 127 - 1).round()
    assert torch.equal(found[clear], torch.tensor(framed, dtype=torch.float32)[clear])


def test_a_batch_holds_labels_of_one_shape_and_the_fingerprint_knows_them() -> None:
    rows = [record(1.0, 0.0, segments=s) for s in ((1, 0), (0, 1), (1, 0, 1))]
    examples = [example for row in rows for example in VIEWS["pairs"](row, PLAIN, FRAMING)]
    plain = VIEWS["pairs"](record(1.0, 0.0), PLAIN, FRAMING)
    batches = Batches(None, [*examples, *plain], [], 2, 2, 0, lambda h, w: (4, h, w))  # type: ignore[arg-type]
    assert [kind[3:] for kind in batches.kinds] == [(2,), (2,), (3,), ()]
    other = dataclasses.replace(batches, train=[*examples[1:], *plain, examples[1]])
    assert batches.fingerprint() != other.fingerprint()


# -- contradictions ----------------------------------------------------------------------------------------------------


def test_contradicting_labels_are_counted_once_per_pair_of_pictures(tmp_path: Path) -> None:
    def examples(*rows: PreferenceRecord, view: str = "lists") -> list[Example]:
        return [example for row in rows for example in VIEWS[view](row, PLAIN, FRAMING)]

    turned = record(0.0, 1.0)
    assert contradictions(examples(record(1.0, 0.0), turned)) == 1
    assert contradictions(examples(record(1.0, 0.0), turned, turned, view="pairs")) == 1
    assert contradictions(examples(record(1.0, 0.0), record(2.0, 1.0))) == 0
    assert contradictions(examples(record(1.0, 0.0), replace(turned, prompt="a cat"))) == 0
    assert contradictions(examples(record(3.0, 2.0, 1.0), record(1.0, 2.0, 3.0))) == 3
    assert contradictions(examples(record(3.0, 2.0, 1.0), record(1.0, 2.0, 2.0))) == 2
    assert contradictions(examples(record(1.0), record(0.0), view="thumbs")) == 0

    for i in range(2):
        (tmp_path / f"{i}.png").write_bytes(PICTURES[i].read())
    rows = [{"prompt": CAPTION, "images": ["0.png", "1.png"], "scores": s} for s in ([1, 0], [0, 1])]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = load_examples({"name": "jsonl", "path": str(tmp_path), "val_fraction": 0}, 32)
    assert found.contradicted == 1 and "1 pairs of pictures are labeled both ways" in found.summary()


def test_unknown_views_are_named() -> None:
    with pytest.raises(ValueError, match="unknown view 'list', did you mean 'lists'"):
        view_of("list")


def _png(picture: Image.Image) -> bytes:
    import io

    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()
