"""Packed files of tensors: written whole or not at all, by several processes, on full disks and on rotten ones."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from diffalign import shards as shards_module
from diffalign.shards import Shards

ENTRY = {"x": torch.arange(6.0).reshape(2, 3), "n": torch.tensor([1, 2])}


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


def test_every_dtype_and_shape_comes_back_to_the_bit(tmp_path: Path) -> None:
    entry = {"half": torch.randn(3, 0, 2).half(), "brain": torch.randn(4).bfloat16(), "scalar": torch.tensor(2.5),
             "view": torch.arange(12).reshape(3, 4).T, "flag": torch.tensor([True, False])}  # fmt: skip
    Shards(tmp_path).put({"key": entry, "other": ENTRY})
    read = Shards(tmp_path)
    assert equal(read.get("key"), entry) and equal(read.get("other"), ENTRY)
    assert read.missing(["other", "absent", "key", "absent"]) == ["absent"]
    with pytest.raises(KeyError):
        read.get("absent")


def test_what_is_there_is_not_written_again(tmp_path: Path) -> None:
    one, two = Shards(tmp_path), Shards(tmp_path)
    one.put({"a": ENTRY})
    two.put({"a": {"x": torch.zeros(1)}, "b": ENTRY})  # did not know of the first one's yet
    for shards in (one, two, Shards(tmp_path)):
        shards.refresh()
        assert equal(shards.get("a"), ENTRY) and equal(shards.get("b"), ENTRY)
    two.put({"a": ENTRY})
    assert len(list(tmp_path.iterdir())) == 2


def test_of_two_copies_the_older_counts(tmp_path: Path) -> None:
    """Two processes that computed a key at the same moment, each without knowledge of the other."""
    for folder, value in ((tmp_path / "a", 1.0), (tmp_path / "b", 2.0)):
        Shards(folder).put({"key": {"x": torch.tensor(value)}})
    for file in (*(tmp_path / "b").iterdir(), *(tmp_path / "a").iterdir()):
        (tmp_path / "both").mkdir(exist_ok=True)
        file.rename(tmp_path / "both" / file.name)
    assert Shards(tmp_path / "both").get("key")["x"] == 1.0


def test_a_writer_gathers_and_flushes_by_size_by_time_and_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def files(folder: Path) -> int:
        return len(list(folder.glob("*.safetensors")))

    gathering = Shards(tmp_path / "gathering", flush_seconds=1e9)
    with gathering.writer() as put:
        for i in range(10):
            put({str(i): ENTRY})
        assert files(gathering.folder) == 0
    assert files(gathering.folder) == 1 and not gathering.missing(map(str, range(10)))
    hasty = Shards(tmp_path / "hasty", flush_seconds=0)
    with hasty.writer() as put:
        for i in range(3):
            put({str(i): ENTRY})
    assert files(hasty.folder) == 3
    monkeypatch.setattr(shards_module, "FLUSH_BYTES", 100)
    small = Shards(tmp_path / "small", flush_seconds=1e9)
    with small.writer() as put:
        for i in range(9):
            put({str(i): ENTRY})  # 40 bytes each
    assert files(small.folder) == 3
    with Shards(tmp_path / "idle").writer():
        pass
    assert files(tmp_path / "idle") == 0


def test_more_shards_than_may_be_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards_module, "OPEN_FILES", 2)
    shards = Shards(tmp_path)
    for i in range(6):
        shards.put({str(i): {"x": torch.tensor(i)}})
    kept = [shards.get(str(i))["x"] for i in (*range(6), *range(6))]
    assert [int(value) for value in kept] == [*range(6), *range(6)]


@pytest.mark.parametrize("content", [b"", b"not at all", b"\x08\0\0\0\0\0\0\0{}      "])
def test_a_foreign_or_empty_file_is_set_aside(content: bytes, tmp_path: Path) -> None:
    Shards(tmp_path).put({"a": ENTRY})
    (tmp_path / "0.safetensors").write_bytes(content)
    shards = Shards(tmp_path)
    assert equal(shards.get("a"), ENTRY)
    assert not (tmp_path / "0.safetensors").exists() and (tmp_path / "0.damaged").exists()


def test_a_cut_at_any_length_is_noticed(tmp_path: Path) -> None:
    Shards(tmp_path).put({"a": ENTRY})
    [file] = tmp_path.iterdir()
    whole = file.read_bytes()
    for length in range(0, len(whole), 9):
        file.write_bytes(whole[:length])
        shards = Shards(tmp_path)
        assert shards.missing(["a"]) == ["a"]
        file.with_suffix(".damaged").unlink()
    file.write_bytes(whole)
    assert equal(Shards(tmp_path).get("a"), ENTRY)


def test_any_flipped_bit_of_the_data_is_noticed(tmp_path: Path) -> None:
    Shards(tmp_path).put({"a": ENTRY})
    [file] = tmp_path.iterdir()
    whole = file.read_bytes()
    size = sum(tensor.nbytes for tensor in ENTRY.values())
    for place in range(len(whole) - size, len(whole)):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 16]) + whole[place + 1 :])
        shards = Shards(tmp_path)
        with pytest.raises(ValueError, match="damaged: a is not what was written; start again"):
            shards.get("a")
        shards.verify(["a", "absent"])
        assert shards.missing(["a"]) == ["a"]
        file.with_suffix(".damaged").unlink()


def test_a_file_that_is_removed_under_a_run_is_named(tmp_path: Path) -> None:
    Shards(tmp_path).put({"a": ENTRY})
    shards = Shards(tmp_path)
    [file] = tmp_path.iterdir()
    file.unlink()
    with pytest.raises(ValueError, match=f"{file.name} cannot be read any more"):
        shards.get("a")


def test_what_a_killed_process_left_is_removed_after_a_day(tmp_path: Path) -> None:
    old, fresh = tmp_path / "old.partial", tmp_path / "fresh.partial"
    for file in (old, fresh):
        file.write_bytes(b"half")
    os.utime(old, (time.time() - 2 * 24 * 3600,) * 2)
    shards = Shards(tmp_path)
    assert not old.exists() and fresh.exists() and not list(shards.missing([]))


FULL = """
import resource, signal, sys
import torch
from pathlib import Path
from diffalign.shards import Shards
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
shards = Shards(Path(sys.argv[1]))
shards.put({"small": {"x": torch.zeros(10)}})
try:
    shards.put({"large": {"x": torch.zeros(100_000)}})
except OSError as error:
    print("SAID", error)
"""


@pytest.mark.slow
def test_a_write_that_the_system_refuses_leaves_no_half_file(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", FULL, str(tmp_path)], capture_output=True, text=True, timeout=300)
    assert "SAID" in done.stdout and "free some space, or set cache_dir to another disk" in done.stdout, done.stderr
    assert [file.suffix for file in tmp_path.iterdir()] == [".safetensors"]
    assert Shards(tmp_path).missing(["small", "large"]) == ["large"]


WORKER = """
import sys, torch
from pathlib import Path
from diffalign.shards import Shards
shards = Shards(Path(sys.argv[1]), flush_seconds=0)
with shards.writer() as put:
    for i in range(150):
        i = (i * int(sys.argv[2])) % 151
        if shards.missing([str(i)]):
            put({str(i): {"x": torch.full((50,), float(i))}})
        shards.get(str(i))
"""


@pytest.mark.slow
def test_several_processes_at_once(tmp_path: Path) -> None:
    workers = [subprocess.Popen([sys.executable, "-c", WORKER, str(tmp_path), step]) for step in ("1", "2", "77")]
    assert [worker.wait(timeout=500) for worker in workers] == [0, 0, 0]
    shards = Shards(tmp_path)
    assert not list(tmp_path.glob("*.partial")) and not list(tmp_path.glob("*.damaged"))
    for i in range(150):
        assert torch.equal(shards.get(str(i))["x"], torch.full((50,), float(i)))


def test_files_of_another_version_are_left_alone_and_computed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(shards_module, "VERSION", "2")
    for key in ("a", "b"):
        Shards(tmp_path).put({key: {"other": torch.zeros(2)}})
    monkeypatch.undo()
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}
    ours = Shards(tmp_path)
    assert ours.missing(["a", "b"]) == ["a", "b"]
    assert caplog.text.count("written by another version of diffalign (its format is 2, this one reads 1)") == 1
    ours.put({"a": ENTRY})
    assert equal(Shards(tmp_path).get("a"), ENTRY)
    assert all(file.read_bytes() == content for file, content in before.items())


def test_a_shard_without_a_version_is_of_the_first(tmp_path: Path) -> None:
    """What was written before shards had a number."""
    Shards(tmp_path).put({"a": ENTRY})
    [file] = tmp_path.iterdir()
    data = file.read_bytes()
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
        state = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    assert metadata.pop("version") == "1"
    save_file(state, file, metadata)
    assert file.read_bytes() != data and equal(Shards(tmp_path).get("a"), ENTRY)


def test_a_folder_that_cannot_be_made_is_named_with_its_key(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(ValueError, match=r"taken.x cannot be made \(Not a directory\): expected a cache_dir that is a"):
        Shards(tmp_path / "taken" / "x")
