"""How a method looks at a record: as pairs, winners, lists, thumbs, or one picture under two captions.

A view is a function from a record to the examples that a method trains on; `VIEWS` names them all. One record may give
several examples, or none (a tie that is dropped). What a view cannot use is a ValueError, and the row is then dropped
whole, counted and named.
"""

from __future__ import annotations

import functools
import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace

from diffalign.data.example import Crop, Example
from diffalign.data.images import bucket
from diffalign.data.options import DataOptions, Framing
from diffalign.data.records import MediaSource, PreferenceRecord
from diffalign.perturb import perturber_of
from diffalign.table import Section, split_section, unknown

View = Callable[[PreferenceRecord, DataOptions, Framing], list[Example]]


def pairs(record: PreferenceRecord, options: DataOptions, framing: Framing) -> list[Example]:
    """Winner and loser under the record's prompt: of a ranking the best and the worst, or all pairs (data.ranking)."""
    _several(record)
    return _made(record, options, framing, record.comparisons(options.ranking))


def user_pairs(record: PreferenceRecord, options: DataOptions, framing: Framing) -> list[Example]:
    """Pairs of somebody in particular (PPD)."""
    _several(record)
    if record.user is None:
        raise ValueError("the row does not say who preferred: give it a user (user_id in Pick-a-Pic's columns), or "
                         "train without users (dpo)")  # fmt: skip
    return pairs(record, options, framing)


def captioned_pairs(
    record: PreferenceRecord, options: DataOptions, framing: Framing, *, perturber: Section | None = None
) -> list[Example]:
    """Winner and loser, the loser under a caption of its own (DCPO), or under the prompt as `perturber` changes it."""
    if perturber is None and record.prompt_loser is None:
        raise ValueError("the loser has no caption of its own: give prompt_loser, or l/<stem>.txt beside w/<stem>.txt")
    made = pairs(record, options, framing)
    other = record.prompt_loser if perturber is None else perturber_of(perturber)(record) if made else None
    return [Example(e.record, e.crop, e.members, (record.prompt, str(other)), e.label) for e in made]


def winners(record: PreferenceRecord, options: DataOptions, framing: Framing) -> list[Example]:
    """The best picture alone; that of a tie too where ties are kept, with label 1/2."""
    _several(record, least=1)
    if len(record.images) == 1:
        return _thumb(record, framing, 0, 1.0, options) if record.scores[0] > 0 else []
    return [Example(e.record, e.crop, e.members[:1], e.prompts[:1], e.label)
            for e in _made(record, options, framing, record.comparisons("best_worst"))]  # fmt: skip


def lists(
    record: PreferenceRecord, options: DataOptions, framing: Framing, *, unit_scores: bool = False
) -> list[Example]:
    """All pictures of a prompt, best first; a list in which all are equal says nothing and gives none.

    unit_scores: the method takes the scores as shares, so they must lie in [0, 1].
    """
    _several(record)
    if unit_scores and not all(0 <= score <= 1 for score in record.scores):
        raise ValueError(f"expected scores in [0, 1], such as `diffalign label` writes with --aggregate rankdpo or "
                         f"capo, got {list(record.scores)}")  # fmt: skip
    if record.tie:
        return []
    order = tuple(sorted(range(len(record.scores)), key=lambda i: -record.scores[i]))
    content = "/".join([record.prompt, *(record.images[i].sha256 for i in order)])
    return [Example(record, _crop(record.images[order[0]], framing, options, content), order,
                    (record.prompt,) * len(order))]  # fmt: skip


def prompts_alone(record: PreferenceRecord, options: DataOptions, framing: Framing) -> list[Example]:
    """The prompt, for methods that draw their own pictures; what pictures the record has is not looked at."""
    return [Example(record, Crop(framing.size, frames=framing.frames, fps=framing.fps), (), (record.prompt,))]


def thumbs(record: PreferenceRecord, options: DataOptions, framing: Framing) -> list[Example]:
    """Each picture alone, liked (1) or disliked (0): above or below the middle of its group's scores.

    A single picture is liked if its score is above 0. One that lies in the middle gives nothing.
    """
    _several(record, least=1)
    if len(record.images) == 1:
        return _thumb(record, framing, 0, float(record.scores[0] > 0), options)
    middle = statistics.median(record.scores)
    found = []
    for index, score in enumerate(record.scores):
        if score != middle:
            found += _thumb(record, framing, index, float(score > middle), options)
    return found


def perturbed(
    record: PreferenceRecord, options: DataOptions, framing: Framing, *, perturber: Section = "rules"
) -> list[Example]:
    """The best picture twice: under its own prompt, and under one that says something else (TDPO, TKTO).

    A picture that is not liked, and the first of a tie that is dropped, give none. `perturber` is a row of
    `diffalign.perturb.PERTURBERS`; `given` takes the record's prompt_loser.
    """
    made = []
    for example in winners(record, options, framing):
        wrong = perturber_of(perturber)(record)
        made.append(replace(example, members=example.members * 2, prompts=(record.prompt, wrong), label=1.0))
    return made


def labeled_parts(record: PreferenceRecord, options: DataOptions, framing: Framing) -> list[Example]:
    """A pair in the record's order with labels of its parts (DenseDPO); one in which all parts are ties gives none.

    The record's own scores are not looked at: a pair that is a tie as a whole may have parts that are not.
    """
    _several(record)
    if len(record.images) != 2:
        raise ValueError(f"labels of parts are of two pictures or clips, got {len(record.images)}")
    seen = _in_segments(record, framing.frames) if framing.frames else _in_regions(record)
    if not any(sign for row in (seen.segments or (), *(seen.regions or ())) for sign in row):
        return []
    content = "/".join([record.prompt, *(image.sha256 for image in record.images)])
    return [Example(seen, _crop(record.images[0], framing, options, content), (0, 1), (record.prompt,) * 2)]


def _in_segments(record: PreferenceRecord, frames: int) -> PreferenceRecord:
    """Of clips, with labels over time alone."""
    if record.segments is None:
        raise ValueError("no labels of segments: give segments, rows of 1 where the first clip is better, -1 or 0")
    if len(record.segments) > frames:
        raise ValueError(f"{len(record.segments)} segment labels do not match the clip, which has {frames} frames: "
                         f"expected at most as many labels")  # fmt: skip
    return replace(record, regions=None)


def _in_regions(record: PreferenceRecord) -> PreferenceRecord:
    """Of pictures, with labels over the plane alone; one segment of a still picture is one region."""
    if record.segments is None and record.regions is None:
        raise ValueError("no labels of parts: give segments (clips) or regions (pictures), 1 where the first is better")
    if record.segments is not None and len(record.segments) > 1:
        raise ValueError(f"{len(record.segments)} segment labels do not match the frame count, which is 1 for still "
                         f"pictures: give regions, rows of labels over the picture, or set num_frames for "
                         f"clips")  # fmt: skip
    return replace(record, segments=None, regions=record.regions or (record.segments or (),))


VIEWS: dict[str, View] = {
    "pairs": pairs,
    "user_pairs": user_pairs,
    "captioned_pairs": captioned_pairs,
    "perturbed": perturbed,
    "labeled_parts": labeled_parts,
    "winners": winners,
    "lists": lists,
    "thumbs": thumbs,
    "prompts": prompts_alone,
}


def view_of(section: Section) -> View:
    """The view that a method asks for, by name or as a section with keywords.

    Raises:
        ValueError: an unknown name.
    """
    name, keywords = split_section(section, "view")
    if name not in VIEWS:
        raise unknown("view", name, VIEWS)
    return functools.partial(VIEWS[name], **keywords) if keywords else VIEWS[name]


def _several(record: PreferenceRecord, least: int = 2) -> None:
    if not record.images:
        raise ValueError("a prompt alone: expected pictures of it (prompts alone are for methods that draw their own)")
    if len(record.images) < least:
        raise ValueError("one picture cannot be ranked: expected two or more of a prompt (a single liked or disliked "
                         "picture is for kto, tkto, and for sft if it is liked)")  # fmt: skip


def _thumb(
    record: PreferenceRecord, framing: Framing, index: int, label: float, options: DataOptions | None = None
) -> list[Example]:
    image = record.images[index]
    crop = _crop(image, framing, options or DataOptions(), f"{record.prompt}/{image.sha256}")
    return [Example(record, crop, (index,), (record.prompt,), label)]


def _made(
    record: PreferenceRecord, options: DataOptions, framing: Framing, comparisons: Sequence[tuple[int, int]]
) -> list[Example]:
    made = []
    for winner, loser in comparisons:
        tie = record.scores[winner] == record.scores[loser]
        if tie and options.tie == "drop":
            continue
        # draws follow from the content, not from the place in a file: every layout of the same pairs gives the same
        content = f"{record.prompt}/{record.images[winner].sha256}/{record.images[loser].sha256}"
        if tie and options.tie == "random" and random.Random(f"tie/{options.split_seed}/{content}").random() < 0.5:
            winner, loser = loser, winner
        label = 0.5 if tie and options.tie == "half" else 1.0
        crop = _crop(record.images[winner], framing, options, content)
        made.append(Example(record, crop, (winner, loser), (record.prompt,) * 2, label))
    return made


def _crop(first: MediaSource, framing: Framing, options: DataOptions, content: str) -> Crop:
    """One for all members; with buckets the size is that of the first."""
    size = framing.size
    if step := options.bucket_step:
        height, width = first.size
        size = bucket(width, height, framing.resolution, step)
    rng = random.Random(f"view/{framing.seed}/{content}")
    place, flip = (rng.random(), rng.random()), rng.random() < 0.5
    return Crop(size, place if framing.random_crop else (0.5, 0.5), framing.random_flip and flip, framing.frames,
                framing.fps)  # fmt: skip
