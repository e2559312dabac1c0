"""Folders of results that a later call goes on with: it must have been asked for the same."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffalign.writing import write_json

SETTINGS = "settings.json"


def claim_results(out: Path, settings: Mapping[str, Any], made: bool) -> None:
    """A new or empty folder becomes this call's; one of an earlier call must have had the same settings.

    Args:
        made: whether there are results in it; the settings of a call that made none count for nothing.

    Raises:
        ValueError: it holds something else, or results of other settings.
    """
    file, own = out / SETTINGS, json.loads(json.dumps(settings))
    taken = out.is_file() or (out.is_dir() and any(out.iterdir()))
    if taken and not file.exists():
        raise ValueError(f"{out}: expected a new or empty folder, or one of an earlier call; choose another --out")
    if not made:
        write_json(file, own, indent=1)
        return
    try:
        before = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{file}: cannot be read ({error}); choose another --out") from error
    if before != own:
        keys = [key for key in own if before.get(key) != own[key]]
        raise ValueError(f"{out}: its results were made with another {', '.join(keys)}; choose another --out")
