"""Official checkpoint files: found on the disk or on the hub, read without running code, loaded key by key."""

from __future__ import annotations

import hashlib
import pickle
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from diffalign.errors import first_line

# what torch and safetensors raise on files that are cut or no checkpoints; torch's unpickler trips over any of the last
UNREADABLE = (SafetensorError, RuntimeError, EOFError, OSError, LookupError, ValueError, TypeError, AttributeError,
              AssertionError, struct.error)  # fmt: skip

# what the hub had when these rewards were written; a repository that is overwritten later does not change a score
REVISIONS = {
    "yuvalkirstain/PickScore_v1": "a4e4367c6dfa7288a00c550414478f865b875800",
    "xswu/HPSv2": "697403c78157020a1ae59d23f111aa58ced35b0a",
    "THUDM/ImageReward": "5736be03b2652728fb87788c9797b0570450ab72",
    "openai/clip-vit-large-patch14": "32bd64288804d66eefd0ccbe215aa642df71cc41",
    "google/siglip-so400m-patch14-384": "9fdffc58afc957d1a03a25b10dba0329ab15c2a3",
}


def revision_of(repo: str) -> str:
    """The pinned commit of a hub repository, "main" for one that is not pinned."""
    return REVISIONS.get(repo, "main")


def download(repo: str, file: str = "") -> str:
    """The command that brings a repository, or one file of it, into the cache."""
    pinned = f"--revision {REVISIONS[repo]}" if repo in REVISIONS else ""
    return " ".join(part for part in ("hf download", repo, file, pinned) if part)


def is_hub_id(weights: str | Path) -> bool:
    """Whether it has the form owner/name; a path that exists is a path all the same."""
    return str(weights).count("/") == 1 and not Path(weights).is_absolute() and not Path(weights).exists()


@dataclass(frozen=True)
class HubFile:
    """One file of a hub repository, at its pinned revision; `sha256` where it is known, and then it is checked."""

    repo: str
    name: str
    sha256: str | None = None

    def locate(self, reward: str, weights: str | Path | None = None) -> Path:
        """The file on this machine.

        Args:
            reward: its name, for the message.
            weights: instead of the hub's: the file, a folder that holds it, or another hub id.

        Raises:
            ValueError: not to be had; the message says what to download and where to put it.
        """
        if weights is not None:
            path = Path(weights)
            if path.is_file() or (path / self.name).is_file():
                return path if path.is_file() else path / self.name
            if not is_hub_id(weights):
                raise ValueError(f"weights of {reward}: expected the file {self.name}, a folder that holds it, or a "
                                 f"hub id, found nothing at {weights}")  # fmt: skip
        return self._fetched(reward, self.repo if weights is None else str(weights))

    def _fetched(self, reward: str, repo: str) -> Path:
        try:
            path = Path(hf_hub_download(repo, self.name, revision=revision_of(repo)))
        except (LocalEntryNotFoundError, HfHubHTTPError, OSError, ValueError) as error:
            raise ValueError(
                f"{reward}: {self.name} of {repo} is not on this machine and not to be had from the hub "
                f"({first_line(error)}); with a network, run `{download(repo, self.name)}` once, or give a local "
                f"copy: weights=FILE, on the command line --weights {reward}=FILE"
            ) from error
        if repo == self.repo:
            check_sha256(path, self.sha256)
        return path


@dataclass(frozen=True)
class UrlFile:
    """One file of a web page that is no hub repository, kept where torch keeps its downloads."""

    url: str
    name: str
    sha256: str | None = None

    def locate(self, reward: str, weights: str | Path | None = None) -> Path:
        """The file on this machine.

        Args:
            reward: its name, for the message.
            weights: instead of a download: the file, a folder that holds it, or a hub id with it.

        Raises:
            ValueError: not to be had, or another file than the one that is expected.
        """
        if weights is not None:
            return HubFile(self.url, self.name).locate(reward, weights)
        path = Path(torch.hub.get_dir()) / "checkpoints" / self.name
        if not path.is_file():
            self._download(reward, path)
        check_sha256(path, self.sha256)
        return path

    def _download(self, reward: str, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(self.url, str(path), hash_prefix=self.sha256, progress=False)
        except (OSError, RuntimeError) as error:
            raise ValueError(
                f"{reward}: {self.name} is not on this machine and could not be downloaded ({first_line(error)}); "
                f"get it from {self.url} and put it at {path}, or give it as weights=FILE, on the command line "
                f"--weights {reward}=FILE"
            ) from error


def fetch_folder(reward: str, repo: str, weights: str | Path | None, names: Sequence[str]) -> Path:
    """The folder of a hub repository on this machine, with those of its files that `names` match.

    Args:
        reward: its name, for the message.
        weights: instead of `repo`: a folder, or another hub id.
        names: file names, with * for any part.

    Raises:
        ValueError: not to be had; the message says what to download and where to put it.
    """
    if weights is not None and Path(weights).is_dir():
        return Path(weights)
    if weights is not None and (str(weights).count("/") != 1 or Path(weights).is_absolute() or Path(weights).exists()):
        raise ValueError(f"weights of {reward}: expected a folder like {repo}, or a hub id, found none at {weights}")
    wanted = repo if weights is None else str(weights)
    try:
        return Path(snapshot_download(wanted, allow_patterns=list(names)))
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError, ValueError) as error:
        raise ValueError(
            f"{reward}: {wanted} is not on this machine and not to be had from the hub ({first_line(error)}); with a "
            f"network, run `hf download {wanted}` once, or give a local copy: weights=FOLDER, on the command line "
            f"--weights {reward}=FOLDER"
        ) from error


def check_sha256(path: Path, expected: str | None) -> None:
    """
    Raises:
        ValueError: the file is not the one that is expected; None expects nothing.
    """
    if expected is None:
        return
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != expected:
        raise ValueError(f"{path}: expected the file with sha256 {expected}, got {found}: download it again, or give "
                         f"your own as weights=FILE")  # fmt: skip


def read_state(path: Path) -> dict[str, Any]:
    """What a .safetensors, .pt, .pth or .bin file holds, on the CPU; tensors only, no code is run.

    Raises:
        ValueError: damaged, or a pickle that would need to run code.
    """
    try:
        if path.suffix == ".safetensors":
            return dict(load_file(path))
        # saved on a GPU by some authors: without map_location that fails on a machine that has none
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path}: expected tensors by name, got a pickle that runs code when it is read ({first_line(error)}); "
            f"convert it to a state dict where you trust it"
        ) from error
    except UNREADABLE as error:
        raise ValueError(f"{path}: expected a checkpoint, could not read it ({first_line(error)}); it may be "
                         f"incomplete: download it again") from error  # fmt: skip
    if not isinstance(state, Mapping):
        raise ValueError(f"{path}: expected tensors by name, got {type(state).__name__}")
    return dict(state)


def load_strictly(module: nn.Module, state: Mapping[str, Tensor], where: Path, ignored: Iterable[str] = ()) -> None:
    """Loads every key; `ignored` are prefixes of what the official file holds and the score does not use.

    Raises:
        ValueError: a missing or surplus key, or another shape.
    """
    kept = {key: value for key, value in state.items() if not key.startswith(tuple(ignored))}
    check_keys({key: value.shape for key, value in module.state_dict().items()}, kept, where, type(module).__name__)
    module.load_state_dict(kept)


def check_keys(wanted: Mapping[str, Sequence[int]], state: Mapping[str, Tensor], where: Path, what: str) -> None:
    """Compares names and shapes; `wanted` is shapes by name.

    Raises:
        ValueError: a missing or surplus key, or another shape.
    """
    missing, surplus = sorted(wanted.keys() - state.keys()), sorted(state.keys() - wanted.keys())
    shapes = [f"{key} {list(state[key].shape)} for {list(wanted[key])}"
              for key in sorted(wanted.keys() & state.keys()) if state[key].shape != wanted[key]]  # fmt: skip
    found = {"lacks": missing, "has also": surplus, "has other shapes:": shapes}
    if wrong := [f"{fault} {', '.join(keys[:3])}{' ...' * (len(keys) > 3)}" for fault, keys in found.items() if keys]:
        raise ValueError(f"{where}: expected the official checkpoint of {what}; it {'; it '.join(wrong)}")
