"""Where official files come from, and what is refused before a weight is read."""

from __future__ import annotations

import hashlib
import urllib.error
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import save_file

from diffalign.rewards.checkpoints import HubFile, UrlFile, check_sha256, load_strictly, read_state

FILE = HubFile("owner/model", "weights.pt")


class Runs:
    """Unpickling it would call a function."""

    def __reduce__(self):
        return (print, ("ran",))


def test_a_hub_file_is_found_where_weights_says(tmp_path: Path):
    path = tmp_path / "weights.pt"
    path.touch()
    assert FILE.locate("name", path) == FILE.locate("name", tmp_path) == FILE.locate("name", str(tmp_path)) == path
    for absent in (tmp_path / "none.pt", "none.pt", "a/b/c"):
        with pytest.raises(ValueError, match="weights of name: expected the file weights.pt, a folder .*found nothing"):
            FILE.locate("name", absent)


def test_a_hub_file_not_to_be_had_says_what_to_download(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for weights, repo in ((None, "owner/model"), ("other/copy", "other/copy")):
        with pytest.raises(ValueError, match=rf"`hf download {repo} weights.pt` once.*--weights name=FILE"):
            FILE.locate("name", weights)


def test_a_file_of_a_page_is_downloaded_once_and_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    file, asked = UrlFile("https://example.org/head.pth", "head.pth", hashlib.sha256(b"right").hexdigest()), []

    def download(url: str, path: str, hash_prefix: str | None = None, progress: bool = True) -> None:
        asked.append(url)
        Path(path).write_bytes(b"right")

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    assert file.locate("name") == file.locate("name") == tmp_path / "checkpoints" / "head.pth"
    assert asked == ["https://example.org/head.pth"]
    (tmp_path / "checkpoints" / "head.pth").write_bytes(b"wrong")
    with pytest.raises(ValueError, match="expected the file with sha256 .*weights=FILE"):
        file.locate("name")


def test_a_page_that_is_down_says_where_to_put_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def down(*_: object, **__: object) -> None:
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", down)
    with pytest.raises(ValueError, match=r"no route to host.*get it from https://example.org/head.pth and put it at"):
        UrlFile("https://example.org/head.pth", "head.pth").locate("name")
    with pytest.raises(ValueError, match="found nothing at nowhere"):
        UrlFile("https://example.org/head.pth", "head.pth").locate("name", "nowhere")


def test_a_hash_that_is_not_known_is_not_checked(tmp_path: Path):
    (tmp_path / "file").write_bytes(b"any")
    check_sha256(tmp_path / "file", None)


def test_pickles_that_run_code_and_damaged_files_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    torch.save({"a": Runs()}, tmp_path / "runs.pt")
    with pytest.raises(ValueError, match="got a pickle that runs code"):
        read_state(tmp_path / "runs.pt")
    assert "ran" not in capsys.readouterr().out
    torch.save({"a": torch.zeros(1000)}, tmp_path / "cut.pt")
    save_file({"a": torch.zeros(1000)}, tmp_path / "cut.safetensors")
    for name in ("cut.pt", "cut.safetensors"):
        path = tmp_path / name
        path.write_bytes(path.read_bytes()[:-500])
        with pytest.raises(ValueError, match=f"{name}: expected a checkpoint, could not read it"):
            read_state(path)
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(ValueError, match="expected tensors by name, got list"):
        read_state(tmp_path / "list.pt")


def test_every_key_is_wanted_and_no_other(tmp_path: Path):
    module = torch.nn.Linear(2, 1)
    whole = {"weight": torch.ones(1, 2), "bias": torch.zeros(1)}
    load_strictly(module, whole | {"queue.0": torch.zeros(1)}, tmp_path, ignored=("queue",))
    assert module.weight.tolist() == [[1, 1]]
    for state, message in (
        ({"weight": whole["weight"]}, "it lacks bias"),
        (whole | {"scale": torch.zeros(1)}, "it has also scale"),
        (whole | {"weight": torch.ones(2, 2)}, r"it has other shapes: weight \[2, 2\] for \[1, 2\]"),
    ):
        with pytest.raises(ValueError, match=message):
            load_strictly(module, state, tmp_path)
