"""Captions that say something else than a given one: what TDPO and TKTO set a picture's own caption against.

`PERTURBERS` names who writes them: rules on words, a language model at an endpoint, or the data set itself.
"""

from __future__ import annotations

import contextlib
import functools
import json
import random
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

from diffalign import perturb_words as words
from diffalign.shapes.grammar import Scene, one_fact_changed, parse
from diffalign.table import Section, build

PERTURBERS: dict[str, str] = {
    "rules": "diffalign.perturb:Rules",
    "llm": "diffalign.perturb_llm:LanguageModel",
    "given": "diffalign.perturb:Given",
}


class Captioned(Protocol):
    """A record as far as perturbers look at it."""

    @property
    def prompt(self) -> str: ...

    @property
    def prompt_loser(self) -> str | None: ...


Perturber = Callable[[Captioned], str]


def perturber_of(section: Section) -> Perturber:
    """The perturber of a section, made once per process.

    Raises:
        ValueError: an unknown name or keyword, or a value that the perturber refuses.
    """
    return _built(json.dumps(section if isinstance(section, str) else dict(section), sort_keys=True))


@functools.lru_cache(maxsize=8)
def _built(section: str) -> Perturber:
    made: Perturber = build(PERTURBERS, json.loads(section), what="perturber")
    return made


@dataclass(frozen=True)
class Given:
    """The record's own prompt_loser."""

    def __call__(self, record: Captioned) -> str:
        """Raises ValueError for a record without one, or with its own prompt in its place."""
        if record.prompt_loser is None:
            raise ValueError("no perturbed caption: perturber given takes prompt_loser, which this row lacks")
        if same_text(record.prompt_loser, record.prompt):
            raise ValueError("prompt_loser says the same as the prompt: nothing is perturbed")
        return record.prompt_loser


@dataclass(frozen=True)
class Rules:
    """One fact of a caption exchanged for one that excludes it, by lists of everyday words; no model, no network.

    In a caption of the shapes world one color, shape, count or relation changes, or the two objects of a relation
    change places, so that a picture of the one caption is never one of the other. In any other English caption one
    kind of word that is there is drawn (color, count, relation, attribute, noun), and all places of one such word are
    exchanged; plurals, capitals and "a" or "an" are kept right. Words with a capital inside a sentence are left
    alone, since they may be names. What is drawn follows from the seed and the caption.

    Limits: words are looked up, not understood. "Two" of "two-seater", or the color of a thing that no picture could
    show in another, are exchanged as well; a caption of unknown words alone is refused.

    Args:
        seed: another one gives other captions.
    """

    seed: int = 0

    def __call__(self, record: Captioned) -> str:
        """The perturbed caption.

        Raises:
            ValueError: nothing in the caption that the lists know.
        """
        return perturb(record.prompt, random.Random(f"perturb/{self.seed}/{record.prompt}"))


def perturb(caption: str, rng: random.Random) -> str:
    """`caption` with one fact changed, see `Rules`.

    >>> perturb("a red apple", random.Random(3)) != "a red apple"
    True

    Raises:
        ValueError: nothing in the caption that the lists know.
    """
    if (scene := _scene(caption)) is not None:
        return str(one_fact_changed(scene, rng))
    found = {
        kind: places for kind, find in _FINDERS.items() if (places := [place for place in find(caption) if place[1]])
    }
    if not found:
        raise ValueError(f"the rules know no word of this caption to exchange ({', '.join(_FINDERS)}): {caption!r}; "
                         f"leave the row out, or take another perturber")  # fmt: skip
    word, choices = rng.choice(found[rng.choice(sorted(found))])
    return _exchanged(caption, word, rng.choice(choices))


def _scene(caption: str) -> Scene | None:
    """Of a caption of the shapes world."""
    with contextlib.suppress(ValueError):
        return parse(caption)
    return None


Found = tuple[str, tuple[str, ...]]  # a word or phrase as it stands in the caption, and what may take its place


def _colors(caption: str) -> Iterator[Found]:
    rest = re.sub("|".join(words.NO_COLORS), lambda phrase: "_" * len(phrase[0]), caption, flags=re.IGNORECASE)
    said = {word.casefold() for word in _plain_words(rest)}
    for color in (*words.COLORS, *words.MORE_COLORS):
        if color in said:
            # not one that the caption has elsewhere: "a red cube on a blue one" would become two blue ones
            yield color, tuple(other for other in words.COLORS if other not in said)


def _counts(caption: str) -> Iterator[Found]:
    said = {word.casefold() for word in _plain_words(caption)}
    for number in words.NUMBERS:  # without "one", which is often no count ("one of the")
        if number in said:
            yield number, tuple(other for other in words.NUMBERS if other != number)
    for digit in re.findall(r"(?<![\w.:/,-])([2-9])(?= [a-z])", caption):
        yield digit, tuple(n for n in "23456789" if n != digit)


def _relations(caption: str) -> Iterator[Found]:
    pairs = [*words.RELATIONS, *((b, a) for a, b in words.RELATIONS if b != "far away from"), *words.ONE_WAY]
    taken = caption
    for phrase, other in sorted(pairs, key=lambda pair: -len(pair[0])):  # "to the left of" before "left of"
        if _matches(taken, phrase):
            taken = _pattern(phrase).sub(lambda match: "_" * len(match[0]), taken)
            yield phrase, (other,)


def _attributes(caption: str) -> Iterator[Found]:
    said = {word.casefold() for word in _plain_words(caption)}
    for one, other in words.ATTRIBUTES:
        if one in said and other not in said:
            yield one, (other,)
        if other in said and one not in said:
            yield other, (one,)


def _nouns(caption: str) -> Iterator[Found]:
    said = {word.casefold() for word in _plain_words(caption)}
    for group in words.NOUNS:
        for noun in group:
            for form in dict.fromkeys((noun, plural(noun))):
                others = (other for other in group if other not in said and plural(other) not in said)
                if form in said:
                    yield form, tuple(other if form == noun else plural(other) for other in others)


_FINDERS: Mapping[str, Callable[[str], Iterator[Found]]] = {
    "color": _colors, "count": _counts, "relation": _relations, "attribute": _attributes, "noun": _nouns,
}  # fmt: skip


def plural(noun: str) -> str:
    """Of a noun of the lists.

    >>> plural("cherry"), plural("bus"), plural("woman")
    ('cherries', 'buses', 'women')
    """
    if noun in words.IRREGULAR:
        return words.IRREGULAR[noun]
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return noun[:-1] + "ies"
    return noun + ("es" if noun.endswith(("s", "x", "ch", "sh")) else "s")


def same_text(a: str, b: str) -> bool:
    """Whether two captions differ in case, spaces and a final full stop at most."""
    one, other = (" ".join(text.casefold().rstrip(". ").split()) for text in (a, b))
    return one == other


def _plain_words(caption: str) -> list[str]:
    """Words that are no names: lower case, or at the start of a sentence, or all in a caption of capitals."""
    shouted = caption.isupper()
    return [
        match[0]
        for match in re.finditer(r"[A-Za-z]+(?:-[a-z]+)*", caption)
        if match[0].islower() or shouted or _starts_sentence(caption, match.start())
    ]


def _starts_sentence(caption: str, place: int) -> bool:
    before = caption[:place].rstrip(" \"'(")
    return not before or before[-1] in ".!?:"


def _pattern(word: str) -> re.Pattern[str]:
    return re.compile(rf"(?<![\w-]){re.escape(word)}(?![\w-])", re.IGNORECASE)


def _matches(caption: str, word: str) -> list[re.Match[str]]:
    """Where it stands, but for names."""
    shouted = caption.isupper()
    return [match for match in _pattern(word).finditer(caption)
            if match[0][0].islower() or shouted or not match[0][0].isalpha()
            or _starts_sentence(caption, match.start())]  # fmt: skip


def _exchanged(caption: str, word: str, other: str) -> str:
    """All places of `word` taken by `other`, with an article before it that fits."""
    for match in reversed(_matches(caption, word)):
        as_there = other.upper() if len(match[0]) > 1 and match[0].isupper() else other
        if match[0][0].isupper() and not as_there.isupper():
            as_there = as_there[0].upper() + as_there[1:]
        head = re.sub(r"\b(a)(n?) $", functools.partial(_article, other), caption[: match.start()], flags=re.IGNORECASE)
        caption = head + as_there + caption[match.end() :]
    return caption


def _article(following: str, article: re.Match[str]) -> str:
    n = "n" if following[0].lower() in "aeiou" and not following.startswith("uni") else ""
    return article[1] + (n.upper() if article[0].strip().isupper() and len(article[0].strip()) > 1 else n) + " "
