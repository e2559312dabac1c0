from __future__ import annotations

import hashlib
import json
import os
import random
import subprocess
import sys
from collections import Counter
from itertools import product

import pytest

from diffalign.shapes import prompts
from diffalign.shapes.grammar import (
    CATEGORIES,
    COLORS,
    COUNTS,
    RELATIONS,
    SHAPES,
    SPLITS,
    Scene,
    Thing,
    combinations,
    inverse,
    one_fact_changed,
    parse,
    sample_scenes,
    scenes,
    split_combinations,
)

EVERY = {split: [scene for category in CATEGORIES for scene in scenes(split, category)] for split in SPLITS}
ALL = [scene for split in SPLITS for scene in EVERY[split]]

# of sample_scenes(split, 600, seed=0), one caption a line; the shipped models were trained and measured on these splits
GOLDEN = {
    "train": "b4f3bb9ae21f10a5dabcda0c916047ac5a3c2a0531b8fd6448d5aa6e7f7977e5",
    "validation": "c1eb78d12ad994d0be89c587746e2ef6203618a258f5a9e2d4de31532ee49839",
    "heldout": "7c4a10c52ee27336bc26af51eb7f6dbe1534f7f62eb83242107f09cf6581d428",
}


def meaning(scene: Scene) -> frozenset[Scene]:
    """Both ways to say the same picture."""
    return frozenset((scene, inverse(scene)))


def digest(split: str) -> str:
    return hashlib.sha256("\n".join(map(str, sample_scenes(split, 600, seed=0))).encode()).hexdigest()


def test_every_caption_reads_back_as_its_scene():
    assert all(parse(str(scene)) == scene for scene in ALL)


@pytest.mark.parametrize(
    ("caption", "scene"),
    [
        ("a red circle", Scene((Thing("red", "circle"),))),
        ("  A  Red CIRCLE. ", Scene((Thing("red", "circle"),))),
        ("four cyan crosses", Scene((Thing("cyan", "cross"),) * 4)),
        (
            "a blue square above a yellow triangle",
            Scene((Thing("blue", "square"), Thing("yellow", "triangle")), "above"),
        ),
    ],
)
def test_captions_read_as_expected(caption, scene):
    assert parse(caption) == scene


def test_the_size_of_the_world():
    objects = len(COLORS) * len(SHAPES)
    pairs = objects * (objects - 1) // 2
    sizes = {"single": objects, "two": pairs, "count": objects * len(COUNTS)}
    assert {category: len(combinations(category)) for category in CATEGORIES} == sizes
    assert len(ALL) == objects + 2 * len(RELATIONS) * pairs + objects * len(COUNTS)


def test_every_caption_is_in_exactly_one_split():
    captions = Counter(map(str, ALL))
    assert set(captions.values()) == {1}
    said = {str(Scene((a, b), relation)) for a, b in pairs_of_things() for relation in RELATIONS}
    said |= {str(Scene((thing,) * n)) for thing in {a for a, _ in pairs_of_things()} for n in (1, *COUNTS.values())}
    assert said == set(captions)


def pairs_of_things() -> list[tuple[Thing, Thing]]:
    things = [Thing(color, shape) for color, shape in product(COLORS, SHAPES)]
    return [(a, b) for a, b in product(things, things) if a != b]


@pytest.mark.parametrize("category", CATEGORIES)
def test_splits_are_disjoint_by_combination_and_large_enough(category):
    split_of = {split: set(split_combinations(split, category)) for split in SPLITS}
    everything = set(combinations(category))
    assert set.union(*split_of.values()) == everything
    assert sum(map(len, split_of.values())) == len(everything)
    assert all(len(split_of[split]) >= 0.2 * len(everything) for split in ("validation", "heldout"))
    assert all(scene.combination[1] in split_of[split] for split in SPLITS for scene in scenes(split, category))


def test_every_color_and_shape_is_trained_on():
    seen = {word for scene in scenes("train", "single") for word in (scene.things[0].color, scene.things[0].shape)}
    assert seen == {*COLORS, *SHAPES}


@pytest.mark.parametrize("split", SPLITS)
def test_a_caption_and_its_mirror_image_are_in_one_split(split):
    assert {inverse(scene) for scene in EVERY[split]} == set(EVERY[split])
    assert all(inverse(inverse(scene)) == scene for scene in EVERY[split])
    assert all((inverse(scene) == scene) == (scene.relation is None) for scene in EVERY[split])


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("count", [6, 60, 600, 6000])
def test_the_mix_is_a_third_a_half_and_a_sixth(split, count):
    drawn = sample_scenes(split, count, seed=1)
    expected = {"single": count // 3, "two": count // 2, "count": count // 6}
    assert Counter(scene.category for scene in drawn) == expected
    assert set(drawn) <= set(EVERY[split])


def test_combinations_repeat_only_when_used_up():
    drawn = Counter(scene for scene in sample_scenes("heldout", 600, seed=2) if scene.category == "single")
    assert max(drawn.values()) - min(drawn.values()) <= 1
    assert max(Counter(s for s in sample_scenes("heldout", 600, seed=2) if s.category == "two").values()) == 1


def test_another_seed_draws_other_scenes():
    assert sample_scenes("train", 60, seed=0) != sample_scenes("train", 60, seed=1)


@pytest.mark.parametrize("split", SPLITS)
def test_the_draw_never_changes(split):
    assert digest(split) == GOLDEN[split]


def test_the_draw_does_not_depend_on_the_hash_seed_of_the_process(root):
    program = "from diffalign.shapes.grammar import sample_scenes as s; print(*s('heldout', 30, 5), sep='\\n')"
    said = [
        subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(root)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.split("\n")[:-1]
        for seed in ("1", "2")
    ]
    assert said[0] == said[1] == [str(scene) for scene in sample_scenes("heldout", 30, 5)]


FACTS = {"single": ("color", "shape", "count"), "two": ("color", "shape", "relation", "order")}
FACTS["count"] = FACTS["single"]


def differences(one: Scene, other: Scene) -> list[str]:
    """What a reader would have to correct, one word for each correction."""
    found = ["relation"] if one.relation != other.relation else []
    if len(one.things) != len(other.things):
        return [*found, "count", *differences(Scene(one.things[:1]), Scene(other.things[:1]))]
    if one.relation and one.things == other.things[::-1]:
        return [*found, "order"]
    pairs = list(zip(one.things, other.things, strict=True))
    changed = {"color": [a.color != b.color for a, b in pairs], "shape": [a.shape != b.shape for a, b in pairs]}
    # equal things change together and count once
    return found + [key for key, flags in changed.items() for _ in range(sum(flags) if one.relation else any(flags))]


@pytest.mark.parametrize("category", CATEGORIES)
def test_exactly_the_named_fact_changes_and_the_meaning_with_it(category):
    rng = random.Random(3)
    for scene in (scene for split in SPLITS for scene in scenes(split, category)):
        for fact in FACTS[category]:
            changed = one_fact_changed(scene, rng, fact)
            assert differences(scene, changed) == [fact], (str(scene), str(changed))
            assert meaning(changed).isdisjoint(meaning(scene))
            assert parse(str(changed)) == changed
            assert changed.relation is None or changed.things[0] != changed.things[1]


@pytest.mark.parametrize("category", CATEGORIES)
def test_without_a_name_any_fact_that_applies_changes(category):
    rng = random.Random(4)
    scene = scenes("validation", category)[0]
    found = [differences(scene, one_fact_changed(scene, rng)) for _ in range(200)]
    assert {tuple(facts) for facts in found} == {(fact,) for fact in FACTS[category]}


@pytest.mark.parametrize(("caption", "fact"), [("a red circle", "relation"), ("two red circles", "order")])
def test_a_fact_that_does_not_apply_is_an_error(caption, fact):
    with pytest.raises(ValueError, match=f"expected a fact of color, shape, count .* got '{fact}'"):
        one_fact_changed(parse(caption), random.Random(0), fact)


@pytest.mark.parametrize(
    "caption",
    [
        "",
        "a cat",
        "red circle",
        "a red circles",
        "a crimson circle",
        "five red circles",
        "two red circle",
        "a red circle beside a blue square",
        "a red circle left of",
        "a red circle left of a blue square above a green cross",
        "two red circles left of a blue square",
        "a red circle left of a red circle",
        "a photo of a red circle",
    ],
)
def test_captions_outside_the_grammar_are_errors_that_name_what_is_known(caption):
    with pytest.raises(ValueError) as error:
        parse(caption)
    message = str(error.value)
    assert repr(caption) in message
    assert all(word in message for word in (*COLORS, *SHAPES, *RELATIONS, *COUNTS))


def test_unknown_splits_and_categories_are_errors():
    with pytest.raises(ValueError, match="split of train, validation, heldout, got 'test'"):
        scenes("test", "single")
    with pytest.raises(ValueError, match="category of single, two, count, got 'three'"):
        scenes("train", "three")


def test_the_shipped_prompts_are_what_the_script_writes(root, tmp_path, monkeypatch):
    shipped = root / "assets" / "prompts" / "shapes-heldout.jsonl"
    monkeypatch.setattr(sys, "argv", ["prompts", "--out", str(tmp_path / "new" / "prompts.jsonl")])
    prompts.main()
    assert (tmp_path / "new" / "prompts.jsonl").read_bytes() == shipped.read_bytes()
    lines = [json.loads(line) for line in shipped.read_text().splitlines()]
    heldout = {str(scene): scene.category for scene in EVERY["heldout"]}
    assert all(heldout[line["prompt"]] == line["category"] for line in lines)
    assert Counter(line["category"] for line in lines) == {"single": 200, "two": 300, "count": 100}
