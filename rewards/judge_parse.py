"""From what a judge wrote to a number: one that is stated once and plainly, or none.

Released parsers read what cannot be read as 0, "10" as 1, or the first of two scores; a 0 is then a strong verdict that
nobody gave. Here all of these are a ValueError with the reason, and the score is missing. Parsers are rows of tables;
a template names one.
"""

from __future__ import annotations

import re
from collections.abc import Callable

Scale = tuple[float, float]  # lowest and highest score that a template asks for
Parser = Callable[[str, Scale], float]

NUMBER = re.compile(r"[+-]?(?:[0-9]+(?:\.[0-9]+)?|\.[0-9]+)")
DOCTOR_WEIGHTS = {"Semantic Alignment": 0.8, "Aesthetic": 0.1, "Plausibility": 0.1}
DOCTOR_LABELS = (*DOCTOR_WEIGHTS, "Overall Impression")


def parse_final_score(text: str, scale: Scale) -> float:
    """UnifiedReward's point score: the number after "Final Score:".

    Raises:
        ValueError: none, more than one, or outside of the scale.
    """
    return _labeled("Final Score", spoken(text), scale)


def parse_score(text: str, scale: Scale) -> float:
    """The number after "Score:", the answer that our own template asks for.

    Raises:
        ValueError: none, more than one, or outside of the scale.
    """
    return _labeled("Score", spoken(text), scale)


def parse_score_tag(text: str, scale: Scale) -> float:
    """The integer in <Score>4</Score>, as Flow-GRPO asks of Qwen2.5-VL, before it divides by 5.

    Raises:
        ValueError: none, more than one, no integer, or outside of the scale.
    """
    found = re.findall(r"<Score>(.*?)</Score>", spoken(text), flags=re.DOTALL)
    value = _only(found, "<Score>")
    if not re.fullmatch("[0-9]+", value):
        raise ValueError(f"expected an integer in <Score>, got {value[:40]!r}")
    return _within(float(value), scale)


def parse_imagedoctor(text: str, scale: Scale) -> float:
    """0.8 semantic alignment + 0.1 aesthetic + 0.1 plausibility, ImageDoctor's reward; see `imagedoctor_scores`.

    Raises:
        ValueError: as `imagedoctor_scores`.
    """
    scores = imagedoctor_scores(text, scale)
    return sum(weight * scores[label] for label, weight in DOCTOR_WEIGHTS.items())


def imagedoctor_scores(text: str, scale: Scale = (0.0, 1.0)) -> dict[str, float]:
    """The four scores of an ImageDoctor answer: label -> score.

    Raises:
        ValueError: one of them is not there, there twice, or outside of the scale; the released code takes 0, the first
            and the nearest bound.
    """
    said = spoken(text)
    return {label: _labeled(f"{label} score", said, scale) for label in DOCTOR_LABELS}


def parse_better(text: str, scale: Scale) -> float:
    """1 where picture 1 is better, 0 for picture 2, 0.5 for neither, after "Better:" as our own pair template asks.

    Raises:
        ValueError: none, more than one, or another number.
    """
    value = _labeled("Better", spoken(text), (0.0, 2.0))
    if value not in (0.0, 1.0, 2.0):
        raise ValueError(f"expected 0, 1 or 2 after 'Better:', got {value:g}")
    return {1.0: 1.0, 2.0: 0.0, 0.0: 0.5}[value]


def parse_image_is_better(text: str, scale: Scale) -> float:
    """1 for "Image 1 is better", 0 for "Image 2 is better", 0.5 for "Both images are equally good" (UnifiedReward).

    Raises:
        ValueError: none of the three, or more than one.
    """
    verdicts = {"Image 1 is better": 1.0, "Image 2 is better": 0.0, "Both images are equally good": 0.5}
    said = spoken(text)
    found = [verdict for verdict in verdicts for _ in range(said.count(verdict))]
    return verdicts[_only(found, "Image 1 is better")]


POINT_PARSERS: dict[str, Parser] = {
    "final score": parse_final_score,
    "imagedoctor": parse_imagedoctor,
    "score": parse_score,
    "score tag": parse_score_tag,
}
PAIR_PARSERS: dict[str, Parser] = {
    "better": parse_better,
    "image is better": parse_image_is_better,
}


def spoken(text: str) -> str:
    """What follows the thoughts of a model that thinks aloud, without bold type and <answer> around it.

    Raises:
        ValueError: thoughts that do not end: what stands in them is no verdict.
    """
    said = text.rpartition("</think>")[2]
    if "<think>" in said:
        raise ValueError("expected a verdict after <think>, but the thoughts do not end")
    return re.sub(r"\*\*|</?answer>", " ", said)  # blanks, so that nothing grows together


def _labeled(label: str, text: str, scale: Scale) -> float:
    """The number after "LABEL:"; what follows on its line may be words, but no further number."""
    rest = _only(re.findall(rf"\b{label}[ \t]*:([^\n]*)", text), f"{label}:").strip()
    first, _, others = rest.partition(" ")
    number = first.rstrip(".,;")
    if not NUMBER.fullmatch(number) or re.search(r"\d", others):
        raise ValueError(f"expected one number after '{label}:', got {rest[:40]!r}")
    return _within(float(number), scale)


def _only(found: list[str], what: str) -> str:
    if len(found) != 1:
        raise ValueError(f"expected {what!r} once, found it {len(found)} times")
    return found[0]


def _within(value: float, scale: Scale) -> float:
    if not scale[0] <= value <= scale[1]:
        raise ValueError(f"expected a score from {scale[0]:g} to {scale[1]:g}, got {value:g}")
    return value
