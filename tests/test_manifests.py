"""Manifests: the same four pictures in every form give the same entries; what is broken is named and dropped whole."""

from __future__ import annotations

import csv
import io
import json
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from diffalign.manifests import FORMS, BrokenRow, Entry, read_manifest, sniff

ROWS = [
    ("a.png", "a red circle", 1),
    ("b.png", "a red circle", 2),
    ("c.png", "一只红色的猫 🐈, “quoted”\nover two lines", 3),
    ("d.png", "", 4),
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "pictures").mkdir()
    for number, (name, _, _) in enumerate(ROWS):
        Image.new("RGB", (8, 6), (60 * number, 10, 20)).save(tmp_path / "pictures" / name)
    return tmp_path / "pictures"


def as_folder(folder: Path) -> Path:
    for name, prompt, _ in ROWS:
        (folder / name).with_suffix(".txt").write_text(prompt, encoding="utf-8")
    return folder


def as_jsonl(folder: Path) -> Path:
    file = folder / "list.jsonl"
    rows = [{"image": name, "prompt": prompt, "seed": seed} for name, prompt, seed in ROWS]
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return file


def as_csv(folder: Path) -> Path:
    with (folder / "list.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("path", "caption", "seed"), *ROWS])
    return folder / "list.csv"


def as_tsv(folder: Path) -> Path:
    with (folder / "list.tsv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, delimiter="\t").writerows([("file", "text", "seed"), *ROWS])
    return folder / "list.tsv"


def as_parquet_of_paths(folder: Path) -> Path:
    columns = {"file_name": [r[0] for r in ROWS], "text": [r[1] for r in ROWS], "seed": [r[2] for r in ROWS]}
    pq.write_table(pa.table(columns), folder / "paths.parquet", row_group_size=3)
    return folder / "paths.parquet"


def as_parquet_of_bytes(folder: Path) -> Path:
    columns = {
        "image": [{"bytes": (folder / name).read_bytes(), "path": name} for name, _, _ in ROWS],
        "prompt": [prompt for _, prompt, _ in ROWS],
        "seed": [seed for _, _, seed in ROWS],
        "thumbnail": [b"never read"] * 4,
    }
    pq.write_table(pa.table(columns), folder / "bytes.parquet", row_group_size=3)
    return folder / "bytes.parquet"


def as_shard(folder: Path, suffix: str = ".tar") -> Path:
    place = folder / f"shards{suffix}"
    with tarfile.open(place, "w:gz" if suffix.endswith("gz") else "w") as archive:
        for name, prompt, seed in ROWS:
            members = {"png": (folder / name).read_bytes(), "json": json.dumps({"seed": seed}).encode(),
                       "txt": prompt.encode()}  # fmt: skip
            for kind, data in members.items():
                info = tarfile.TarInfo(f"{Path(name).stem}.{kind}")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    return place


WRITERS = {
    "folder": as_folder,
    "jsonl": as_jsonl,
    "csv": as_csv,
    "tsv": as_tsv,
    "parquet": as_parquet_of_paths,
    "parquet bytes": as_parquet_of_bytes,
    "webdataset": as_shard,
    "webdataset gz": lambda folder: as_shard(folder, ".tar.gz"),
}


def entries(*places: Path | str, prompts: list[str] | None = None) -> list[Entry]:
    read = list(read_manifest(list(places), prompts or []))
    assert not [row for row in read if isinstance(row, BrokenRow)], read
    return [row for row in read if isinstance(row, Entry)]


@pytest.mark.parametrize("form", WRITERS)
def test_every_form_gives_the_same_pictures_prompts_and_columns(form: str, folder: Path) -> None:
    place = WRITERS[form](folder)
    found = pickle.loads(pickle.dumps(entries(place)))  # as it goes to another process
    assert sniff(place) in form.replace("tsv", "csv")
    assert [entry.prompt for entry in found] == [prompt for _, prompt, _ in ROWS]
    for number, entry in enumerate(found):
        picture = entry.open()
        assert picture.size == (8, 6) and picture.getpixel((0, 0)) == (60 * number, 10, 20)
    if form != "folder":
        assert [int(entry.extra["seed"]) for entry in found] == [1, 2, 3, 4]
        assert all(set(entry.extra) == {"seed"} for entry in found)
    assert len({entry.image for entry in found}) == 4


def test_every_row_of_the_table_has_a_case() -> None:
    assert {sniff(Path(name)) for name in ("a.jsonl", "a.csv", "a.parquet", "a.tar", "a.png")} | {"folder"} == set(
        FORMS
    )


def test_prompts_are_one_for_all_or_one_for_each(folder: Path) -> None:
    assert {entry.prompt for entry in entries(folder, prompts=["x"])} == {"x"}
    four = entries(folder / "*.png", prompts=["p", "q", "r", "s"])
    assert [(Path(entry.image).name, entry.prompt) for entry in four][::3] == [("a.png", "p"), ("d.png", "s")]
    for prompts in (["p", "q"], ["p"] * 5):
        with pytest.raises(ValueError, match=f"one for each of 4 pictures, got {len(prompts)}"):
            entries(folder, prompts=prompts)
    as_folder(folder)  # a prompt that is given goes before the caption beside the picture
    assert {entry.prompt for entry in entries(folder, prompts=["x"])} == {"x"}
    with pytest.raises(ValueError, match="every row of the manifest has its own"):
        entries(as_jsonl(folder), prompts=["x"])
    with pytest.raises(ValueError, match=r"write \['x'\]"):
        next(read_manifest([folder], "x"))


def test_a_folder_is_read_by_its_own_listing(folder: Path) -> None:
    as_jsonl(folder).rename(folder / "generations.jsonl")
    assert [entry.extra for entry in entries(folder)] == [{"seed": seed} for _, _, seed in ROWS]
    assert {entry.prompt for entry in entries(folder, prompts=["x"])} == {"x"}


def test_paths_are_relative_to_the_manifest_and_other_columns_are_kept(folder: Path) -> None:
    (folder.parent / "list.jsonl").write_text('{"image": "pictures/a.png", "caption": "x", "tags": ["y"], "path": 1}\n')
    [entry] = entries(folder.parent / "list.jsonl")
    assert entry.image == str(folder / "a.png") and entry.prompt == "x"
    assert entry.extra == {"tags": ["y"], "path": 1}


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "got no JSON"),
        ("[1]", "got [1]"),
        ('{"prompt": "x"}', "expected a column image, video, path, file or file_name, found prompt"),
        ('{"image": 7, "prompt": "x"}', "expected the path of a picture in image, got '7'"),
        ('{"image": "a.png", "prompt": ["x"]}', "expected the prompt as text in prompt"),
        ('{"image": "a.png"}', "has no prompt: give --prompt"),
    ],
)
def test_a_broken_line_is_dropped_whole_and_named(folder: Path, line: str, reason: str) -> None:
    (folder / "list.jsonl").write_text(f'{line}\n\n{{"image": "a.png", "prompt": "x"}}\n')
    broken, whole = read_manifest([folder / "list.jsonl"])
    assert isinstance(broken, BrokenRow) and reason in broken.reason and broken.source.endswith("list.jsonl, line 1")
    assert isinstance(whole, Entry) and whole.where.endswith("line 3")


def test_what_no_file_of_scores_could_hold_is_a_broken_row(folder: Path) -> None:
    (folder / "list.jsonl").write_text(
        '{"image": "a.png", "prompt": "half \\ud83d"}\n{"image": "a.png", "prompt": "x"}\n'
    )
    half, whole = read_manifest([folder / "list.jsonl"])
    assert isinstance(half, BrokenRow) and half.reason == "the prompt is not valid Unicode: half \\ud83d"
    assert isinstance(whole, Entry)
    try:
        (folder / "a.png").rename(folder / b"\xff.png".decode(errors="surrogateescape"))
    except (OSError, ValueError):
        return  # a file system that has no such names
    named = [row for row in read_manifest([folder], ["x"]) if isinstance(row, BrokenRow)]
    assert [row.reason[:30] for row in named] == ["the path is not valid Unicode:"]
    print(named)  # can be printed


def test_broken_rows_of_the_other_forms(folder: Path) -> None:
    (folder / "list.csv").write_text("image,prompt\na.png,one, two\nb.png\nc.png,three\n")
    rows = list(read_manifest([folder / "list.csv"]))
    assert [type(row) for row in rows] == [BrokenRow, BrokenRow, Entry]
    columns = {"image": [b"", None, (folder / "a.png").read_bytes()], "prompt": ["x", "y", None]}
    pq.write_table(pa.table(columns), folder / "x.parquet")
    empty, none, unprompted = read_manifest([folder / "x.parquet"])
    assert isinstance(empty, Entry) and isinstance(none, Entry) and isinstance(unprompted, BrokenRow)
    with pytest.raises(ValueError, match=r"x.parquet:0: expected a whole picture"):
        empty.open()
    with pytest.raises(ValueError, match="row 1 of row group 0 has no picture in image"):
        none.open()
    shard = as_shard(folder)
    shard.write_bytes(shard.read_bytes()[:4000])
    cut = list(read_manifest([shard]))
    assert isinstance(cut[0], Entry) and isinstance(cut[-1], BrokenRow)
    (folder / "a.txt").write_bytes(b"\xff\xfe\xff")
    rows = list(read_manifest([folder]))
    assert isinstance(rows[0], BrokenRow) and "a.txt cannot be read as text" in rows[0].reason


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("nothing.png", None, "no picture or clip there"),
        ("*.webp", None, "no picture or clip there"),
        ("x.csv", "a,b\n1,2\n", "expected a column image, video, path, file or file_name, found a, b"),
        ("x.csv", b"image,prompt\n\xff,x\n", "cannot be read as csv in UTF-8"),
        ("x.parquet", "no table", "not a readable parquet file"),
        ("x.json", "[]", "expected a picture or a manifest"),
    ],
)
def test_a_form_that_is_not_what_it_says_is_one_error(tmp_path: Path, name: str, content: object, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else str(content).encode())
    with pytest.raises(ValueError, match=message):
        list(read_manifest([tmp_path / name]))


def test_an_empty_folder_says_what_would_be_read(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no picture or clip there; expected .*for folders inside it"):
        list(read_manifest([tmp_path]))
    with pytest.raises(ValueError, match="at least one picture"):
        list(read_manifest([]))


def saved(picture: Image.Image, form: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, form, **options)
    return buffer.getvalue()


NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8))
READ = {  # what is opened as it is stored: mode and first pixel
    "cmyk.jpg": (saved(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG"), "CMYK"),
    "rgba.png": (saved(Image.new("RGBA", (8, 8), (255, 0, 0, 0)), "PNG"), "RGBA"),
    "palette.png": (saved(Image.new("RGBA", (8, 8), (255, 0, 0, 9)).quantize(4), "PNG"), "P"),
    "gray16.png": (saved(Image.fromarray(np.full((8, 8), 40000, np.uint16)), "PNG"), "I;16"),
    "moving.gif": (saved(Image.new("P", (8, 8), 0), "GIF", save_all=True,
                         append_images=[Image.new("RGB", (8, 8), "white")]), "P"),
}  # fmt: skip


@pytest.mark.parametrize("name", READ)
def test_pictures_of_every_kind_open_in_their_own_mode(tmp_path: Path, name: str) -> None:
    data, mode = READ[name]
    (tmp_path / name).write_bytes(data)
    [entry] = entries(tmp_path / name, prompts=["x"])
    picture = entry.open()
    assert (picture.mode, picture.size) == (mode, (8, 8))
    if name == "moving.gif":  # the first frame, not the white one
        assert picture.convert("RGB").getpixel((0, 0)) != (255, 255, 255)


def test_what_is_no_whole_picture_is_named(tmp_path: Path) -> None:
    bomb = saved(Image.new("1", (10_000, 10_000)), "PNG")
    assert len(bomb) < 20_000
    whole = saved(NOISE, "PNG")
    for name, data in {"cut.png": whole[:900], "text.png": b"no picture", "empty.png": b"", "bomb.png": bomb}.items():
        (tmp_path / name).write_bytes(data)
        [entry] = entries(tmp_path / name, prompts=["x"])
        expected = "10000 x 10000 pixels, more than" if name == "bomb.png" else f"{name}: expected a whole picture"
        with pytest.raises(ValueError, match=expected):
            entry.open()
