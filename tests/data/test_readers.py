"""Every layout gives the same pairs; every kind of bad input is named, and shifts nothing."""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import toy_pairs
from miniatures import stable_diffusion
from PIL import Image

from diffalign.batches import Batches
from diffalign.cache import Cache
from diffalign.data import DATASETS
from diffalign.data import examples as pairs_module
from diffalign.data.check import sniff
from diffalign.data.examples import Examples, load_examples
from diffalign.data.records import BrokenRow, PreferenceRecord, Row
from diffalign.pipelines import load_pipeline
from diffalign.table import build

COUNT = 6


def load(folder: Path, layout: str, count: int = COUNT) -> Examples:
    folder.mkdir()
    return load_examples({**toy_pairs.write(layout, folder, count), "val_fraction": 0}, 32)


def read(name: str, path: Path, **keywords: Any) -> list[Row]:
    return list(build(DATASETS, {"name": name, "path": str(path), **keywords}, what="data"))


def usable(name: str, path: Path) -> Examples:
    return load_examples({"name": name, "path": str(path), "val_fraction": 0}, 32)


def gif() -> bytes:
    buffer = io.BytesIO()
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:])
    return buffer.getvalue()


@pytest.mark.parametrize("layout", toy_pairs.LAYOUTS)
def test_every_layout_gives_the_pairs_that_were_written(layout: str, tmp_path: Path) -> None:
    pairs = load(tmp_path / "data", layout)
    assert not pairs.broken and pairs.ties == 0
    assert [pair.prompt for pair in pairs.train] == [caption for caption, _, _ in toy_pairs.rows(COUNT)]
    reference = load(tmp_path / "reference", "jsonl")
    for pair, other in zip(pairs.train, reference.train, strict=True):
        assert pair.label == 1.0 and pair.cache_keys() == other.cache_keys()
        assert all(torch.equal(a, b) for a, b in zip(pair.pixels(), other.pixels(), strict=True))


def test_the_winner_is_the_picture_of_the_winner(tmp_path: Path) -> None:
    for pair, (_, winner, loser) in zip(load(tmp_path / "a", "folders").train, toy_pairs.rows(COUNT), strict=True):
        assert pair.record.winner_loser()[0].read() == winner
        assert pair.record.winner_loser()[1].read() == loser


def test_every_layout_gives_the_same_batches(tmp_path: Path) -> None:
    pipe = load_pipeline(str(stable_diffusion()))
    found = []
    for layout in toy_pairs.LAYOUTS:
        pairs = load(tmp_path / layout, layout, 4)
        cache = Cache(tmp_path / f"cache-{layout}", pipe)
        cache.fill(pipe, pairs.train, [""], 2, lambda *_: None)
        batches = Batches(cache, pairs.train, pairs.validation, 2, 2, seed=3, latent_shape=pipe.latent_shape)
        found.append(batches.batch(1, torch.Generator().manual_seed(0), 0.5, torch.device("cpu")))
    for batch in found[1:]:
        for name in ("winner", "loser", "label"):
            assert torch.equal(getattr(batch, name), getattr(found[0], name))
        assert batch.condition.keys() == found[0].condition.keys()
        assert all(torch.equal(value, found[0].condition[name]) for name, value in batch.condition.items())


@pytest.mark.parametrize("layout", toy_pairs.LAYOUTS)
def test_sniff_finds_each_layout(layout: str, tmp_path: Path) -> None:
    section = toy_pairs.write(layout, tmp_path, 2)
    assert sniff(str(section["path"])) == section["name"]


def test_sniff_finds_videoaligns_csv_and_a_folder_of_it(tmp_path: Path) -> None:
    (tmp_path / "pairs.csv").write_text("path_A,path_B,prompt,VQ,MQ,TA\n")
    assert sniff(str(tmp_path)) == sniff(str(tmp_path / "pairs.csv")) == "videoalign"


def test_sniff_of_nothing_it_knows(tmp_path: Path) -> None:
    (tmp_path / "notes.md").write_text("no data")
    for path in (tmp_path, tmp_path / "notes.md", tmp_path / "absent"):
        with pytest.raises(ValueError, match="--name"):
            sniff(str(path))


Damage = Callable[[Path], None]
BROKEN_PICTURES: dict[str, tuple[Damage, str]] = {
    "missing": (Path.unlink, "No such file"),
    "truncated": (lambda file: file.write_bytes(file.read_bytes()[:90]) and None, "truncated"),
    "animated": (lambda file: file.write_bytes(gif()) and None, "animated GIF"),
    "empty": (lambda file: file.write_bytes(b"") and None, ""),
    "text": (lambda file: file.write_text("<html>404</html>") and None, "not a readable image"),
}


@pytest.mark.parametrize("kind", BROKEN_PICTURES)
@pytest.mark.parametrize("side", ["w", "l"])
def test_a_row_with_a_broken_picture_is_dropped_whole_and_named(kind: str, side: str, tmp_path: Path) -> None:
    damage, reason = BROKEN_PICTURES[kind]
    section = toy_pairs.write("jsonl", tmp_path, 4)
    damage(tmp_path / f"1{side}.png")
    pairs = load_examples({**section, "val_fraction": 0}, 32)
    [row] = pairs.broken
    assert row.source == "metadata.jsonl line 2" and reason in row.reason
    assert "1 broken rows dropped, the first metadata.jsonl line 2" in pairs.summary()
    for pair, index in zip(pairs.train, (0, 2, 3), strict=True):
        caption, winner, loser = toy_pairs.rows(4)[index]
        assert (pair.prompt, *(s.read() for s in pair.record.winner_loser())) == (caption, winner, loser)


def test_a_broken_picture_in_parquet_shifts_nothing(tmp_path: Path) -> None:
    rows = toy_pairs.pickapic_rows(4)
    rows[2]["jpg_1"] = rows[2]["jpg_1"][:60]  # type: ignore[index]
    rows[0]["jpg_0"] = None
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "pairs.parquet")
    pairs = usable("pickapic", tmp_path / "pairs.parquet")
    assert [row.source for row in pairs.broken] == ["pairs.parquet row 0", "pairs.parquet row 2"]
    for pair, index in zip(pairs.train, (1, 3), strict=True):
        caption, winner, loser = toy_pairs.rows(4)[index]
        assert (pair.prompt, *(s.read() for s in pair.record.winner_loser())) == (caption, winner, loser)


def test_a_parquet_file_that_is_written_again_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, opened, open_file = tmp_path / "pairs.parquet", [], pq.ParquetFile
    rows = toy_pairs.pickapic_rows(2)
    pq.write_table(pa.Table.from_pylist(rows), file)
    _, record = read("pickapic", file)
    assert isinstance(record, PreferenceRecord)
    before = [picture.read() for picture in record.images]
    monkeypatch.setattr(pq, "ParquetFile", lambda path: opened.append(path) or open_file(path))
    assert [picture.read() for picture in record.images] == before and not opened, "kept while the file stays"

    swapped = [row | {"jpg_0": row["jpg_1"], "jpg_1": row["jpg_0"]} for row in rows]
    size, earlier = file.stat().st_size, file.stat()
    pq.write_table(pa.Table.from_pylist(swapped), file)
    os.utime(file, ns=(earlier.st_atime_ns, earlier.st_mtime_ns + 1))
    assert file.stat().st_size == size, "only the time tells"
    assert [picture.read() for picture in record.images] == before[::-1] and len(opened) == 1

    for fewer in (rows[:1], [{"caption": "a"}] * 2):
        pq.write_table(pa.Table.from_pylist(fewer), file)
        with pytest.raises(ValueError, match="has changed: row 1 of group 0 has no jpg_0 now"):
            record.images[0].read()
    file.unlink()
    with pytest.raises(ValueError, match="is gone"):
        record.images[0].read()


BAD_LINES: dict[str, tuple[str, str]] = {
    "not JSON": ('{"prompt": "a', "not JSON"),
    "a list": ("[1, 2]", "expected an object, got list"),
    "no pictures": ('{"prompt": "a", "image_0": "a.png"}', "expected chosen and rejected"),
    "liked by half": ('{"prompt": "a", "image": "0a.png", "liked": 0.5}', "liked to be true or false"),
    "empty caption": ('{"prompt": " ", "chosen": "0w.png", "rejected": "0l.png"}', "caption is empty"),
    "no caption": ('{"chosen": "0w.png", "rejected": "0l.png"}', "caption"),
    "caption of a number": ('{"prompt": 3, "chosen": "0w.png", "rejected": "0l.png"}', "caption as text"),
    "label of text": ('{"prompt": "a", "image_0": "0w.png", "image_1": "0l.png", "label_0": "1"}', "label_0"),
    "label of 2": ('{"prompt": "a", "image_0": "0w.png", "image_1": "0l.png", "label_0": 2}', "label_0"),
    "path of null": ('{"prompt": "a", "chosen": null, "rejected": "0l.png"}', "paths as text"),
    "fewer scores": ('{"prompt": "a", "images": ["0w.png", "0l.png"], "scores": [1]}', "with a score each"),
    "score of NaN": ('{"prompt": "a", "images": ["0w.png", "0l.png"], "scores": [1, NaN]}', "finite"),
    "scores of text": ('{"prompt": "a", "images": ["0w.png", "0l.png"], "scores": ["a", "b"]}', "scores as numbers"),
}


@pytest.mark.parametrize("kind", BAD_LINES)
def test_a_bad_line_is_named_and_its_neighbors_are_read(kind: str, tmp_path: Path) -> None:
    line, reason = BAD_LINES[kind]
    section = toy_pairs.write("jsonl", tmp_path, 2)
    file = tmp_path / "metadata.jsonl"
    first, second = file.read_text().splitlines()
    file.write_text("\n".join((first, line, second)))
    found = read("jsonl", Path(str(section["path"])))
    assert [type(row) for row in found] == [PreferenceRecord, BrokenRow, PreferenceRecord]
    assert isinstance(found[1], BrokenRow) and found[1].source == "metadata.jsonl line 2"
    assert reason in found[1].reason


def test_a_label_column_of_text_is_refused_with_the_values_that_were_expected(tmp_path: Path) -> None:
    rows = [{**row, "label_0": str(row["label_0"])} for row in toy_pairs.pickapic_rows(2)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "pairs.parquet")
    with pytest.raises(ValueError, match=r"label_0.*1 .*image 0 wins"):
        usable("pickapic", tmp_path / "pairs.parquet")


def test_missing_columns_are_named(tmp_path: Path) -> None:
    rows = [{"caption": row["caption"], "jpg_0": row["jpg_0"]} for row in toy_pairs.pickapic_rows(2)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "pairs.parquet")
    with pytest.raises(ValueError, match="jpg_1, label_0 missing; found caption, jpg_0"):
        read("pickapic", tmp_path / "pairs.parquet")


def test_a_pair_that_nobody_judged_is_named(tmp_path: Path) -> None:
    rows = [{**row, "has_label": i > 0} for i, row in enumerate(toy_pairs.pickapic_rows(2))]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "pairs.parquet")
    first, second = read("pickapic", tmp_path / "pairs.parquet")
    assert isinstance(first, BrokenRow) and "has_label" in first.reason
    assert isinstance(second, PreferenceRecord)


@pytest.mark.parametrize(
    ("name", "file"), [("pickapic", "pairs.parquet"), ("webdataset", "shard.tar"), ("hpdv2", "train.json")]
)
def test_a_file_that_is_not_what_it_says_gives_no_pair(name: str, file: str, tmp_path: Path) -> None:
    (tmp_path / file).write_bytes(b"not at all" * 200)
    with pytest.raises(ValueError, match=file if name == "hpdv2" else "not a readable"):
        usable(name, tmp_path / file)


@pytest.mark.parametrize("name", DATASETS)
def test_a_path_that_is_not_there_is_named(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="absent"):
        usable(name, tmp_path / "absent")


def test_a_folder_without_w_and_l(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="w/ and l/"):
        read("folders", tmp_path)


def test_stems_without_a_partner_are_named(tmp_path: Path) -> None:
    toy_pairs.write("folders", tmp_path, 3)
    home = tmp_path / "1_shapes"
    (home / "l" / "0.png").rename(home / "l" / "other.png")
    reasons = {row.source: row.reason for row in read("folders", tmp_path) if isinstance(row, BrokenRow)}
    assert reasons == {
        "1_shapes/{w,l}/0": "no image of this stem in l/",
        "1_shapes/{w,l}/other": "no image of this stem in w/",
    }


def test_a_sample_without_a_label_is_named(tmp_path: Path) -> None:
    toy_pairs.write("webdataset", tmp_path, 2)
    with tarfile.open(tmp_path / "shard-0.tar") as old, tarfile.open(tmp_path / "new.tar", "w") as new:
        for member in old:
            if member.name != "0000.label_0.txt":
                new.addfile(member, old.extractfile(member))
    first, second = read("webdataset", tmp_path / "new.tar")
    assert isinstance(first, BrokenRow) and "label_0.txt" in first.reason and "0000" in first.source
    assert isinstance(second, PreferenceRecord)


def test_a_truncated_tar_gives_what_stands_before_the_damage(tmp_path: Path) -> None:
    toy_pairs.write("webdataset", tmp_path, 4)
    file = tmp_path / "shard-0.tar"
    whole = usable("webdataset", file)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    part = usable("webdataset", file)
    assert 0 < len(part.train) < len(whole.train) and part.broken
    assert [p.cache_keys() for p in part.train] == [p.cache_keys() for p in whole.train[: len(part.train)]]


def test_hpdv2_ranks_are_better_when_lower(tmp_path: Path) -> None:
    for i, (_, winner, loser) in enumerate(toy_pairs.rows(1)):
        (tmp_path / f"{i}w.png").write_bytes(winner)
        (tmp_path / f"{i}l.png").write_bytes(loser)
    rows = [{"prompt": "a", "image_path": ["0l.png", "0w.png"], "rank": [2, 1]}, {"prompt": "a"}, "text"]
    (tmp_path / "test.json").write_text(json.dumps(rows))
    found = read("hpdv2", tmp_path, split="test")
    assert isinstance(found[0], PreferenceRecord) and found[0].winner_loser()[0].read() == toy_pairs.rows(1)[0][1]
    assert [row.source for row in found[1:]] == ["test.json row 1", "test.json row 2"]


def test_the_log_says_how_far_a_long_read_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(pairs_module, "PROGRESS", 2)
    with caplog.at_level("INFO", logger="diffalign"):
        load(tmp_path / "data", "jsonl", 5)
    assert [m for m in caplog.messages if "rows read" in m] == [
        f"data: {n} rows read, 0 of them broken" for n in (2, 4)
    ]
