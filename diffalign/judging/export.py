"""Choices as preferences to train on."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from statistics import fmean

from diffalign.judging.groups import Group
from diffalign.judging.store import CHOSEN, SKIP, TIE, Choice
from diffalign.labeling.files import Labeled

Scores = dict[str, float]  # sha256 of a picture -> 0 to 1


def scores(choice: Choice, group: Group) -> Scores:
    """What a choice says of each picture: 1 for the best and 0 for all others, of which nothing is said among them.

    An order of all pictures goes from 1 to 0 in even steps; in a tie all are 0.5.
    """
    assert choice.verdict in (CHOSEN, TIE)
    if choice.verdict == TIE:
        return dict.fromkeys(group.pictures, 0.5)
    if len(choice.picks) == 1:
        return {picture: float(picture == choice.picks[0]) for picture in group.pictures}
    last = len(choice.picks) - 1
    return {picture: (last - place) / last for place, picture in enumerate(choice.picks)}


def preferences(choices: Iterable[Choice], groups: Sequence[Group], merge: bool) -> Iterator[Labeled]:
    """One record per judge and group, or with `merge` one per group; in the order of the groups.

    What was skipped gives none, nor does a choice of a group that is not there.
    """
    said: dict[str, dict[str, Scores]] = defaultdict(dict)
    known: Mapping[str, Group] = {group.key: group for group in groups}
    for choice in choices:
        if choice.verdict != SKIP and choice.group in known:
            said[choice.group][choice.judge] = scores(choice, known[choice.group])
    for key, group in known.items():
        if merge and key in said:
            yield labeled(group, mean(said[key].values()), None)
        elif key in said:
            yield from (labeled(group, found, judge) for judge, found in sorted(said[key].items()))


def mean(said: Iterable[Scores]) -> Scores:
    """Of several judges: of best pictures the share of votes.

    >>> mean([{"a": 1.0, "b": 0.0}, {"a": 0.5, "b": 0.5}])
    {'a': 0.75, 'b': 0.25}
    """
    several = list(said)
    return {picture: fmean(one[picture] for one in several) for picture in several[0]}


def labeled(group: Group, found: Scores, user: str | None) -> Labeled:
    """A record, its best picture first."""
    order = sorted(group.pictures, key=lambda picture: -found[picture])
    return Labeled(group.prompt, tuple(group.pictures[picture] for picture in order),
                   tuple(found[picture] for picture in order), user=user)  # fmt: skip
