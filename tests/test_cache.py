"""The cache of latents and embeddings: nothing twice, nothing half, nothing lost, and exact."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import toy_pairs
from miniatures import stable_diffusion
from torch import Tensor

from diffalign import shards as shards_module
from diffalign.cache import Cache
from diffalign.data.examples import Example, load_examples
from diffalign.pipelines import load_pipeline
from diffalign.pipelines.base import LatentPipeline
from diffalign.shards import Shards

PROMPTS = ["", "a red circle above a blue square"]


@pytest.fixture(scope="module")
def pipe() -> LatentPipeline:
    return load_pipeline(str(stable_diffusion()))


@pytest.fixture
def pairs(tmp_path: Path) -> tuple[Example, ...]:
    (tmp_path / "data").mkdir()
    return load_examples({**toy_pairs.write("pickapic", tmp_path / "data", 4), "val_fraction": 0}, 32).train


@pytest.fixture
def counted(pipe: LatentPipeline, monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How many pictures and prompts went through the model."""
    counts = {"pictures": 0, "prompts": 0}
    encode, encode_prompts = pipe.encode, pipe.encode_prompts

    def encode_and_count(pixels: Tensor) -> tuple[Tensor, Tensor]:
        counts["pictures"] += len(pixels)
        return encode(pixels)

    def encode_prompts_and_count(prompts: Sequence[str]) -> dict[str, Tensor]:
        counts["prompts"] += len(prompts)
        return encode_prompts(prompts)

    monkeypatch.setattr(pipe, "encode", encode_and_count)
    monkeypatch.setattr(pipe, "encode_prompts", encode_prompts_and_count)
    return counts


def fill(root: Path, pipe: LatentPipeline, pairs: Sequence[Example]) -> Cache:
    cache = Cache(root, pipe)
    cache.fill(pipe, pairs, PROMPTS, 2, lambda *_: None)
    return cache


def same(a: Cache, b: Cache, pairs: Sequence[Example]) -> bool:
    for pair in pairs:
        for left, right in zip(a.moments(pair), b.moments(pair), strict=True):
            if not all(torch.equal(left[name], right[name]) for name in ("mean", "logvar")):
                return False
    left, right = (cache.condition([pair.prompt for pair in pairs]) for cache in (a, b))
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def shards(root: Path, kind: str = "latents", suffix: str = "safetensors") -> list[Path]:
    return sorted(root.glob(f"{kind}-*/*.{suffix}"))


def flip_a_byte(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-7])


def test_what_comes_out_is_what_the_model_gave(
    tmp_path: Path, pipe: LatentPipeline, pairs: tuple[Example, ...]
) -> None:
    cache = fill(tmp_path / "cache", pipe, pairs)
    for start in (0, 2):  # the batches of the cache, so that sums run in the same order
        some = pairs[start : start + 2]
        with torch.no_grad():
            mean, logvar = pipe.encode(torch.stack([p for pair in some for p in pair.pixels()]).float() / 255)
        entries = [entry for pair in some for entry in cache.moments(pair)]
        for i, entry in enumerate(entries):
            assert torch.equal(entry["mean"], mean[i]) and torch.equal(entry["logvar"], logvar[i])
            assert {value.dtype for value in entry.values()} == {torch.float32}
    for name, value in pipe.encode_prompts(PROMPTS).items():
        torch.testing.assert_close(cache.condition(PROMPTS)[name], value, atol=1e-6, rtol=1e-5)


def test_nothing_is_computed_twice(
    tmp_path: Path, pipe: LatentPipeline, pairs: tuple[Example, ...], counted: dict[str, int]
) -> None:
    fill(tmp_path / "cache", pipe, pairs)
    assert counted == {"pictures": 8, "prompts": 6}
    first = shards(tmp_path / "cache")
    fill(tmp_path / "cache", pipe, [*pairs, *pairs])
    assert counted == {"pictures": 8, "prompts": 6} and shards(tmp_path / "cache") == first


def test_another_view_is_computed_anew(
    tmp_path: Path, pipe: LatentPipeline, pairs: tuple[Example, ...], counted: dict[str, int]
) -> None:
    fill(tmp_path / "cache", pipe, pairs[:1])
    before = dict(counted)
    changes = ({"flip": True}, {"place": (0.0, 0.5)}, {"size": (16, 32)})
    others = [replace(pairs[0], crop=replace(pairs[0].crop, **change)) for change in changes]  # type: ignore[arg-type]
    cache = fill(tmp_path / "cache", pipe, others)
    assert counted == {"pictures": before["pictures"] + 6, "prompts": before["prompts"]}
    assert cache.moments(others[2])[0]["mean"].shape[-2:] == (4, 8)
    assert not torch.equal(cache.moments(others[0])[0]["mean"], cache.moments(pairs[0])[0]["mean"])


def test_another_model_has_its_own_files(tmp_path: Path, pipe: LatentPipeline, pairs: tuple[Example, ...]) -> None:
    fill(tmp_path / "cache", pipe, pairs)
    other = Cache(tmp_path / "cache", load_pipeline(str(stable_diffusion(seed=1))))
    with pytest.raises(ValueError, match="not in the cache"):
        other.moments(pairs[0])
    with pytest.raises(ValueError, match="'a red circle'.*not in the cache"):
        other.condition(["a red circle"])


@pytest.mark.parametrize("damage", [flip_a_byte, cut])
def test_a_damaged_shard_is_set_aside_and_computed_again(
    damage: object, tmp_path: Path, pipe: LatentPipeline, pairs: tuple[Example, ...]
) -> None:
    whole = fill(tmp_path / "whole", pipe, pairs)
    fill(tmp_path / "cache", pipe, pairs)
    [file] = shards(tmp_path / "cache")
    damage(file)  # type: ignore[operator]
    assert same(fill(tmp_path / "cache", pipe, pairs), whole, pairs)
    assert not file.exists() and shards(tmp_path / "cache", suffix="damaged") == [file.with_suffix(".damaged")]


def test_damage_after_the_fill_is_an_error_and_no_wrong_latent(
    tmp_path: Path, pipe: LatentPipeline, pairs: tuple[Example, ...]
) -> None:
    cache = fill(tmp_path / "cache", pipe, pairs)
    flip_a_byte(shards(tmp_path / "cache")[0])
    with pytest.raises(ValueError, match="damaged.*start again"):
        for pair in pairs:
            cache.moments(pair)


def test_a_full_disk_leaves_nothing_half_and_says_what_to_do(
    tmp_path: Path, pipe: LatentPipeline, pairs: tuple[Example, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = fill(tmp_path / "whole", pipe, pairs)
    fill(tmp_path / "cache", pipe, pairs[:2])

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(shards_module.os, "fsync", full)
        with pytest.raises(OSError, match="free some space, or set cache_dir") as caught:
            fill(tmp_path / "cache", pipe, pairs)
    assert caught.value.errno == errno.ENOSPC
    assert len(shards(tmp_path / "cache")) == 1 and not shards(tmp_path / "cache", suffix="partial")
    assert same(fill(tmp_path / "cache", pipe, pairs), whole, pairs)


def test_an_interrupt_keeps_what_was_computed(
    tmp_path: Path, pipe: LatentPipeline, pairs: tuple[Example, ...], counted: dict[str, int]
) -> None:
    def stop(what: str, done: int, total: int) -> None:
        if what == "pairs":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Cache(tmp_path / "cache", pipe).fill(pipe, pairs, PROMPTS, 2, stop)
    assert counted["pictures"] == 4
    fill(tmp_path / "cache", pipe, pairs)
    assert counted == {"pictures": 8, "prompts": 6}


def test_two_writers_at_once_agree_and_harm_nothing(tmp_path: Path) -> None:
    entries = {f"{i:03d}": {"x": torch.full((4,), float(i)), "y": torch.arange(i + 1)} for i in range(40)}
    errors: list[BaseException] = []

    def write(offset: int) -> None:
        try:
            own = Shards(tmp_path)
            for i in range(40):
                key = f"{(i + offset) % 40:03d}"
                own.put({key: entries[key]})
        except BaseException as error:  # a thread's exception would be lost
            errors.append(error)

    threads = [threading.Thread(target=write, args=(offset,)) for offset in (0, 20, 0)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    read = Shards(tmp_path)
    assert read.missing(entries) == [] and not list(tmp_path.glob("*.partial"))
    for key, entry in entries.items():
        assert read.get(key).keys() == entry.keys()
        assert all(torch.equal(read.get(key)[name], value) for name, value in entry.items())


KILLED = """
import sys, time
from pathlib import Path
from diffalign.cache import Cache
from diffalign.data.examples import load_examples
from diffalign.pipelines import load_pipeline
model, data, root = sys.argv[1:]
pairs = load_examples({"name": "pickapic", "path": data, "val_fraction": 0}, 32).train
pipe = load_pipeline(model)
cache = Cache(Path(root), pipe, flush_seconds=0)
cache.fill(pipe, pairs, [""], 1, lambda *_: time.sleep(0.2))
"""


@pytest.mark.slow
def test_a_kill_midway_costs_only_what_was_not_written(
    tmp_path: Path, pipe: LatentPipeline, counted: dict[str, int]
) -> None:
    toy_pairs.write("pickapic", tmp_path, 24)
    data, root = tmp_path / "pairs.parquet", tmp_path / "cache"
    pairs = load_examples({"name": "pickapic", "path": str(data), "val_fraction": 0}, 32).train
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(stable_diffusion()), str(data), str(root)])
    try:
        deadline = time.monotonic() + 240
        while len(shards(root)) < 3:
            assert process.poll() is None, "it ended before it could be killed"
            assert time.monotonic() < deadline, "waited too long"
            time.sleep(0.02)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    kept = {file: file.read_bytes() for file in shards(root)}
    again = Cache(root, pipe)
    again.fill(pipe, pairs, [""], 1, lambda *_: None)
    assert 0 < counted["pictures"] <= 48 - 2 * 3
    assert {file: file.read_bytes() for file in kept} == kept
    fresh = Cache(tmp_path / "fresh", pipe)
    fresh.fill(pipe, pairs, [""], 1, lambda *_: None)
    assert same(again, fresh, pairs)
