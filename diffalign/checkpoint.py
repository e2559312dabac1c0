"""Checkpoints that are whole or not there: written to a temporary folder, sealed by a manifest, renamed.

checkpoint-200/
    manifest.json        written last: step, counters, and the size of every file
    trainable.safetensors, optimizer.pt, ema.safetensors (if averaged weights are kept)
    pytorch_lora_weights.safetensors (for a LoRA: what diffusers reads)
"""

from __future__ import annotations

import json
import re
import shutil
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffalign.writing import replacing_folder, write_json

MANIFEST = "manifest.json"
_NAME = re.compile(r"checkpoint-(\d+)$")


def save_checkpoint(
    folder: Path,
    step: int,
    *,
    tensors: Mapping[str, Mapping[str, Tensor]],
    optimizer: Mapping[str, Any],
    counters: Mapping[str, Any],
    extra: Callable[[Path], object] | None = None,
) -> Path:
    """Writes folder/checkpoint-{step} in one piece and returns it.

    Args:
        tensors: file stem -> named tensors, each a safetensors file.
        extra: called with the temporary folder, to add files of its own.

    Raises:
        OSError: with what to do, when the disk is full; nothing half-written is left.
    """
    target = folder / f"checkpoint-{step}"
    try:
        with replacing_folder(target) as partial:
            for stem, named in tensors.items():
                save_file({k: v.detach().cpu().contiguous() for k, v in named.items()}, partial / f"{stem}.safetensors")
            torch.save(dict(optimizer), partial / "optimizer.pt")
            if extra:
                extra(partial)
            files = {str(f.relative_to(partial)): f.stat().st_size for f in sorted(partial.rglob("*")) if f.is_file()}
            write_json(partial / MANIFEST, {"step": step, "counters": dict(counters), "files": files}, indent=1)
    except OSError as error:
        raise OSError(
            f"checkpoint-{step} could not be written to {folder} ({error.strerror or error}); the last complete "
            f"checkpoint is untouched: free some space and continue with resume_from_checkpoint=latest"
        ) from error
    return target


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """The manifest of a complete checkpoint.

    Raises:
        ValueError: no manifest, or a file of another size than it says: the checkpoint is not complete.
    """
    try:
        manifest: dict[str, Any] = json.loads((checkpoint / MANIFEST).read_text())
        wrong = [n for n, size in manifest["files"].items() if _size(checkpoint / n) != size]
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{checkpoint}: not a complete checkpoint, {MANIFEST} is missing or not readable") from error
    if wrong:
        raise ValueError(f"{checkpoint}: not a complete checkpoint, these files are missing or cut: {', '.join(wrong)}")
    return manifest


def complete_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first; half-written ones are passed over."""
    found = [(int(match[1]), path) for path in folder.glob("checkpoint-*") if (match := _NAME.match(path.name))]
    return [path for _, path in sorted(found) if _is_complete(path)]


def find_checkpoint(folder: Path, wanted: str | None) -> Path | None:
    """None for None; for "latest" the newest complete checkpoint of the run, or None when there is none; else a path.

    Raises:
        ValueError: a named checkpoint that is missing or not complete.
    """
    if wanted is None:
        return None
    if wanted == "latest":
        return next(iter(reversed(complete_checkpoints(folder))), None)
    path = Path(wanted) if Path(wanted).is_dir() else folder / wanted
    read_manifest(path)
    return path


def load_tensors(checkpoint: Path, stem: str) -> dict[str, Tensor]:
    """Named tensors of one file, on the CPU."""
    return load_file(checkpoint / f"{stem}.safetensors")


def load_optimizer(checkpoint: Path) -> dict[str, Any]:
    """The optimizer's state, on the CPU."""
    state: dict[str, Any] = torch.load(checkpoint / "optimizer.pt", map_location="cpu", weights_only=True)
    return state


def prune(folder: Path, keep: int | None) -> None:
    """Removes the oldest complete checkpoints beyond `keep`; None keeps all."""
    if keep is not None:
        for old in complete_checkpoints(folder)[: -keep or None]:
            shutil.rmtree(old, ignore_errors=True)


def _is_complete(path: Path) -> bool:
    try:
        read_manifest(path)
    except ValueError:
        return False
    return True


def _size(file: Path) -> int:
    return file.stat().st_size if file.is_file() else -1


@contextmanager
def until_sigterm() -> Iterator[list[int]]:
    """A list that is empty until a SIGTERM arrives; the old handler comes back at the end."""
    received: list[int] = []
    previous = signal.signal(signal.SIGTERM, lambda number, _: received.append(number))
    try:
        yield received
    finally:
        signal.signal(signal.SIGTERM, previous)
