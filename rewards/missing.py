"""Why scores are missing: reasons of the latest call, for rewards that may leave a picture without one (`Explains`)."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence

MISSING = float("nan")

log = logging.getLogger(__name__)


def of_clips(reasons: Sequence[str], clips: int) -> list[str]:
    """Of each clip the first reason that a frame of it has, "" if none has, as a clip's score is a mean over frames.

    Args:
        reasons: one per frame, "" where there is a score, clip after clip; a picture is a clip of one frame.
    """
    frames = len(reasons) // clips
    return [next(filter(None, reasons[start : start + frames]), "") for start in range(0, len(reasons), frames)]


def tell_missing(name: str, reasons: Sequence[str]) -> None:
    """One line in the log for all that is missing."""
    missing = Counter(reason for reason in reasons if reason)
    if missing:
        reason, times = missing.most_common(1)[0]
        log.warning("%s: %d of %d pictures have no score; %d times: %s",
                    name, missing.total(), len(reasons), times, reason)  # fmt: skip
