"""What a checkpoint's folder must hold: looked at before loading, because some gaps are filled in silence.

A tokenizer folder without a vocabulary, say, loads as a tokenizer that knows no word, and every prompt then means the
same. What only loading can find (weights that are cut off) is looked for once loading has failed, to name the file.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from diffalign.assets import FOLDER as ASSETS

REST_OF = "_rest_of"
KINDS = ("vae", "text_encoder", "tokenizer", "scheduler", "unet", "transformer")  # beginnings of the parts that count
VOCABULARIES = (("tokenizer.json",), ("vocab.json", "merges.txt"), ("spiece.model",))


def rest_of(folder: str, index: Mapping[str, Any]) -> str | None:
    """The folder with the parts that a folder lacks which holds some alone: `_rest_of` of its model_index.json.

    That is a folder beside it, or a model that ships.

    Raises:
        ValueError: there is no such folder.
    """
    if REST_OF not in index:
        return None
    name = str(index[REST_OF])
    beside = Path(folder).parent / name
    home = beside if beside.is_dir() else ASSETS / name
    if not (home / "model_index.json").is_file():
        raise ValueError(f"{folder}: holds some parts of a model, the others being those of {name!r}, and there is no "
                         f"such folder beside it and no such model that ships")  # fmt: skip
    return str(home)


def check_all_parts(folder: str, index: Mapping[str, Any], required: Sequence[str]) -> None:
    """`check_parts` of a folder, and of that which has the parts that it lacks.

    Raises:
        ValueError: names every part that is missing.
    """
    rest = rest_of(folder, index)
    if rest is None:
        return check_parts(folder, index, required)
    check_parts(folder, index, [part for part in required if part in index])
    others = json.loads((Path(rest) / "model_index.json").read_text(encoding="utf-8"))
    check_parts(rest, others, [part for part in required if part not in index])


def check_parts(folder: str, index: Mapping[str, Any], required: Sequence[str]) -> None:
    """Returns if model_index.json names all that is required and, of a folder, all that it names is there.

    Raises:
        ValueError: names every part that is missing.
    """
    named = [name for name, value in index.items() if isinstance(value, list | tuple) and value and value[0]]
    if unnamed := [part for part in required if part not in named]:
        raise ValueError(f"{folder}: the model folder is not complete: expected a model_index.json that names "
                         f"{', '.join(required)}, got none for {', '.join(unnamed)}; download or save it "
                         f"again")  # fmt: skip
    if not Path(folder).is_dir():  # a hub id: what is named is downloaded, or fails with its name
        return
    counted = [part for part in named if part.startswith(KINDS)]
    gaps = {part: gap for part in counted if (gap := _gap(Path(folder), part))}
    if gaps:
        optional = [part for part in counted if part not in required]
        spare = not any(part in required for part in gaps)
        without = f", or set {' and '.join(optional)} to [null, null] there to do without" if spare else ""
        raise ValueError(f"{folder}: the model folder is not complete: model_index.json names parts of which "
                         f"{'; '.join(gaps.values())}: download or save it again{without}")  # fmt: skip


def damaged_files(folder: str) -> Iterator[str]:
    """Each safetensors file of a folder that cannot be opened, with the reason; it may be cut off, or a link's text."""
    for file in sorted(Path(folder).glob("*/*.safetensors")):
        try:
            with safe_open(file, "pt"):
                pass
        except (SafetensorError, OSError) as error:
            yield f"{file.relative_to(folder)} is damaged or cut off ({file.stat().st_size:,} bytes: {error})"


def _gap(folder: Path, part: str) -> str:
    """What is missing of a part, or nothing."""
    home = folder / part
    if not home.is_dir():
        return f"the folder {part} is missing"
    if part.startswith("tokenizer"):
        whole = any(all((home / name).is_file() for name in names) for names in VOCABULARIES)
        return (
            "" if whole else f"{part} has no vocabulary (tokenizer.json, vocab.json with merges.txt, or spiece.model)"
        )
    config = "scheduler_config.json" if part == "scheduler" else "config.json"
    if not (home / config).is_file():
        return f"{part} has no {config}"
    weights = part == "scheduler" or any(file.suffix in (".safetensors", ".bin") for file in home.iterdir())
    return "" if weights else f"{part} has no weights (a .safetensors file)"
