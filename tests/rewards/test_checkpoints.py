"""Where official files come from, and what is refused before a weight is read."""

from __future__ import annotations

import hashlib
import random
import re
import shutil
import urllib.error
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import save_file

from diffalign.rewards import REWARDS, checkpoints, load_reward
from diffalign.rewards.checkpoints import REVISIONS, HubFile, UrlFile, check_sha256, load_strictly, read_state
from diffalign.rewards.hps import HPSv21
from diffalign.table import resolve

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


def test_official_files_are_asked_for_at_their_pinned_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    asked = {}

    def fetch(repo: str, name: str, revision: str) -> str:
        asked[repo, name] = revision
        (tmp_path / name).write_bytes(b"another file")
        return str(tmp_path / name)

    monkeypatch.setattr(checkpoints, "hf_hub_download", fetch)
    for name in ("hpsv2", "imagereward"):
        with pytest.raises(ValueError, match="could not read it|runs code"):
            load_reward(name)
    with pytest.raises(ValueError, match=f"expected the file with sha256 {HPSv21.sha256}"):
        load_reward("hpsv2.1")
    with pytest.raises(ValueError, match="could not read it|runs code"):  # somebody's copy: no revision, no hash
        load_reward("hpsv2.1", weights="some/body")
    assert asked == {
        ("xswu/HPSv2", "HPS_v2_compressed.pt"): REVISIONS["xswu/HPSv2"],
        ("THUDM/ImageReward", "ImageReward.pt"): REVISIONS["THUDM/ImageReward"],
        ("xswu/HPSv2", "HPS_v2.1_compressed.pt"): REVISIONS["xswu/HPSv2"],
        ("some/body", "HPS_v2.1_compressed.pt"): "main",
    }


def cached(cache: Path, repo: str, files: Path) -> None:
    """A snapshot of the pinned revision, as `hf download` leaves it."""
    place = cache / f"models--{repo.replace('/', '--')}" / "snapshots" / REVISIONS[repo]
    shutil.copytree(files, place)


@pytest.mark.parametrize(
    ("name", "repo", "folder"),
    [
        ("clip", "openai/clip-vit-large-patch14", "clip_folder"),
        ("pickscore", "yuvalkirstain/PickScore_v1", "clip_folder"),
        ("siglip", "google/siglip-so400m-patch14-384", "siglip_folder"),
    ],
)
def test_a_cached_checkpoint_serves_offline(name, repo, folder, tmp_path, monkeypatch, request, photographs):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match=rf"`hf download {repo} --revision {REVISIONS[repo]}` once.*--weights {name}="):
        load_reward(name)
    cached(tmp_path, repo, request.getfixturevalue(folder))
    local = load_reward(name, weights=request.getfixturevalue(folder))
    for reward in (load_reward(name), load_reward(name, weights=repo)):
        assert torch.equal(reward(photographs[:2], ["a cat", "tea"]), local(photographs[:2], ["a cat", "tea"]))


def test_pinned_revisions_are_commits_of_repositories_that_cards_name():
    sources = " ".join(resolve(REWARDS, name, "reward").card.source for name in REWARDS)
    for repo, commit in REVISIONS.items():
        assert re.fullmatch("[0-9a-f]{40}", commit) and repo in sources


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
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="`hf download some/body head.pth` once"):
        UrlFile("https://example.org/head.pth", "head.pth").locate("name", "some/body")


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


@pytest.mark.parametrize("seed", range(40))
def test_bytes_that_are_no_checkpoint_are_refused_not_a_traceback(tmp_path: Path, seed: int):
    path = tmp_path / "noise.pt"
    path.write_bytes(random.Random(seed).randbytes(seed * 7) if seed else b"another file")
    with pytest.raises(ValueError, match="noise.pt: expected"):
        read_state(path)


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


def test_a_file_that_was_saved_on_a_gpu_is_read_without_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """ImageReward's and HPSv2's authors saved theirs so; its tensors name the device that they were on."""
    path = tmp_path / "gpu.pt"
    with monkeypatch.context() as on_gpu:
        on_gpu.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
        torch.save({"weight": torch.arange(3.0)}, path)
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="CUDA"):
            torch.load(path, weights_only=True)
    assert read_state(path)["weight"].tolist() == [0, 1, 2]
