"""What `diffalign label-segments` does: says of each stretch of two clips which is the better one there (DenseDPO).

Both clips are cut into as many stretches of equal length; a preference is asked of each pair of stretches, and the
whole is what most of them say (Wu et al. 2025, arXiv 2506.03517; its segments last a second).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffalign.answers import Unreached, in_order
from diffalign.console import Result, progress_bar
from diffalign.data.records import BrokenRow, MediaSource, PreferenceRecord, Row
from diffalign.rewards.pairwise import Preference
from diffalign.scoring.files import seen_from
from diffalign.writing import write_text

NAMED = 20  # broken rows that are named one by one

Key = tuple[str, tuple[str, str]]  # the caption, and the paths of both clips


@dataclass(frozen=True)
class Segmented:
    """One pair with a label of each stretch: 1 where the first is better, -1 where the second is, 0 for neither."""

    prompt: str
    clips: tuple[str, str]
    segments: tuple[int, ...]

    @property
    def key(self) -> Key:
        """What tells pairs apart."""
        return self.prompt, self.clips

    @property
    def scores(self) -> tuple[int, int]:
        """How many stretches each wins: the majority's vote."""
        return self.segments.count(1), self.segments.count(-1)


def label_segments(
    rows: Iterable[Row], preference: Preference, count: int, out: Path, settings: Mapping[str, Any]
) -> Result:
    """Labels of all pairs, as JSON lines that `densedpo` takes; `dpo` takes the same file as plain pairs.

    A pair in which a clip cannot be read, or no stretch has a verdict, is left out, named and counted. What a call that
    was cut off has labeled lies in OUT.part, and the next one goes on from there.

    Args:
        settings: what `preference` was made of, as JSON: labels of another one are not mixed with its own.

    Raises:
        Unreached: a judge that nobody can ask.
        ValueError: fewer stretches than one, another ending than .jsonl, OUT.part of other settings, or no pair that
            can be labeled.
    """
    if count < 1:
        raise ValueError(f"--segments: expected at least 1, got {count}")
    if out.suffix.lower() != ".jsonl":
        raise ValueError(f"--out {out}: expected a file that ends in .jsonl")
    everything, journal = list(rows), out.with_name(out.name + ".part")
    done = _begun(journal, {"segments": count, **settings})
    written: list[Segmented] = []
    broken: list[BrokenRow] = []
    with journal.open("a", encoding="utf-8") as file, progress_bar("labeling", len(everything)) as advance:
        for row in everything:
            labeled = _labeled(row, preference, count, done)
            advance(1)
            if isinstance(labeled, BrokenRow):
                broken.append(labeled)
                continue
            written.append(labeled)
            if labeled.key not in done:
                file.write(json.dumps(asdict(labeled), ensure_ascii=False) + "\n")
                file.flush()
    if not written:
        journal.unlink()
        first = f": {broken[0].source}: {broken[0].reason}" if broken else ""
        raise ValueError(f"no pair of clips could be labeled{first}")
    write_text(out, "".join(_line(labeled, out.parent) for labeled in written))
    journal.unlink()
    return _result(written, broken, out)


def stretches(clip: Tensor, count: int) -> list[Tensor]:
    """A clip [F, 3, H, W] in `count` parts, whose lengths differ by a frame at most.

    Raises:
        ValueError: fewer frames than parts.
    """
    if len(clip) < count:
        raise ValueError(f"{len(clip)} frames cannot be cut into {count} segments")
    return [clip[part[0] : part[-1] + 1] for part in np.array_split(np.arange(len(clip)), count)]


def _begun(journal: Path, settings: Mapping[str, Any]) -> dict[Key, Segmented]:
    """What an earlier call labeled; a new journal begins with the settings, on a line of its own."""
    header = json.dumps(settings, ensure_ascii=False) + "\n"
    text = journal.read_text(encoding="utf-8") if journal.is_file() else ""
    whole = text[: text.rfind("\n") + 1]  # of the last line a kill may have left a part
    first, *lines = whole.splitlines(keepends=True) or [header]
    if lines and first != header:
        raise ValueError(f"{journal}: an unfinished call left labels of other settings there; repeat that call, choose "
                         f"another --out, or delete the file")  # fmt: skip
    write_text(journal, header + "".join(lines))
    found = [json.loads(line) for line in lines]
    several = [Segmented(row["prompt"], tuple(row["clips"]), tuple(row["segments"])) for row in found]
    return {labeled.key: labeled for labeled in several}


def _labeled(row: Row, preference: Preference, count: int, done: Mapping[Key, Segmented]) -> Segmented | BrokenRow:
    if isinstance(row, BrokenRow):
        return row
    try:
        key = row.prompt, _paths(row)
        return done.get(key) or Segmented(*key, _verdicts(row, preference, count))
    except Unreached:  # no later pair would do better
        raise
    except ValueError as error:
        return BrokenRow(row.source, str(error))


def _paths(record: PreferenceRecord) -> tuple[str, str]:
    if len(record.images) != 2:
        raise ValueError(f"expected a pair of clips, got {len(record.images)}")
    first, second = (str(source.content) for source in record.images)
    return first, second


def _verdicts(record: PreferenceRecord, preference: Preference, count: int) -> tuple[int, ...]:
    first, second = (_clip(source, f"clip {place}") for place, source in enumerate(record.images))
    if len(first) != len(second):
        raise ValueError(f"the clips have {len(first)} and {len(second)} frames: expected as many, so that their "
                         f"segments are of the same time")  # fmt: skip
    pairs = list(zip(stretches(first, count), stretches(second, count), strict=True))
    wins = in_order(lambda pair: preference.prefer(pair[0], pair[1], record.prompt), pairs, preference.workers)
    if all(math.isnan(win) for win in wins):
        raise ValueError("no segment has a verdict")
    return tuple(_sign(win) for win in wins)


def _clip(source: MediaSource, name: str) -> Tensor:
    """uint8 [F, 3, H, W]."""
    pictures = [np.asarray(picture) for picture in source.clip(name, None, None)]
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)


def _sign(win: float) -> int:
    """Of a share of wins; without a verdict neither is better."""
    return 0 if math.isnan(win) else (win > 0.5) - (win < 0.5)


def _line(labeled: Segmented, folder: Path) -> str:
    videos = [seen_from(clip, folder) for clip in labeled.clips]
    row = {"prompt": labeled.prompt, "videos": videos, "scores": labeled.scores, "segments": labeled.segments}
    return json.dumps(row, ensure_ascii=False) + "\n"


def _result(written: Sequence[Segmented], broken: Sequence[BrokenRow], out: Path) -> Result:
    signs = [sign for labeled in written for sign in labeled.segments]
    both = sum({1, -1} <= set(labeled.segments) for labeled in written)
    untold = sum(not any(labeled.segments) for labeled in written)
    counts = {"pairs": len(written), "segments": len(signs), "ties": signs.count(0), "pairs_both_ways": both,
              "pairs_without_label": untold, "broken": len(broken)}  # fmt: skip
    text = (f"{len(written)} pairs in {out}: {both} with segments won by either, {untold} with none won; "
            f"{signs.count(0)} of {len(signs)} segments are ties; {len(broken)} rows left out")  # fmt: skip
    text += "".join(f"\n  {row.source}: {row.reason}" for row in broken[:NAMED])
    return Result({"file": str(out), **counts, "reasons": [row.reason for row in broken[:NAMED]]}, text)
