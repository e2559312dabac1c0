"""The same few preference pairs in every layout that is read."""

from __future__ import annotations

import io
import json
import random
import tarfile
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from diffalign.shapes.grammar import parse
from diffalign.shapes.render import render

CAPTIONS = ["a red circle", "two blue squares", "a green cross above a red square", "three purple triangles"]
LAYOUTS = ("jsonl", "jsonl-ranking", "pickapic", "pickapic-folder", "saved-dataset", "folders", "hpdv2", "webdataset")


def png(caption: str, seed: int, size: int = 48) -> bytes:
    buffer = io.BytesIO()
    render(parse(caption), random.Random(seed), size).save(buffer, "PNG")
    return buffer.getvalue()


def rows(count: int = 4) -> list[tuple[str, bytes, bytes]]:
    """(caption, winner, loser): the winner shows the caption, the loser the next one."""
    return [
        (CAPTIONS[i % 4], png(CAPTIONS[i % 4], 2 * i), png(CAPTIONS[(i + 1) % 4], 2 * i + 1, size=40))
        for i in range(count)
    ]


def write(layout: str, folder: Path, count: int = 4) -> dict[str, object]:
    """Writes the pairs and returns the `data` section that reads them. Every other pair is stored loser first."""
    return {
        "name": layout.split("-")[0] if layout != "saved-dataset" else "pickapic",
        **_WRITERS[layout](folder, count),
    }


def _jsonl(folder: Path, count: int) -> dict[str, object]:
    lines = []
    for i, (caption, winner, loser) in enumerate(rows(count)):
        (folder / f"{i}w.png").write_bytes(winner)
        (folder / f"{i}l.png").write_bytes(loser)
        if i % 2:
            lines.append({"prompt": caption, "image_0": f"{i}l.png", "image_1": f"{i}w.png", "label_0": 0})
        else:
            lines.append({"caption": caption, "chosen": f"{i}w.png", "rejected": f"{i}l.png"})
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return {"path": str(folder)}


def _ranking(folder: Path, count: int) -> dict[str, object]:
    lines = []
    for i, (caption, winner, loser) in enumerate(rows(count)):
        (folder / f"{i}w.png").write_bytes(winner)
        (folder / f"{i}l.png").write_bytes(loser)
        lines.append({"prompt": caption, "images": [f"{i}l.png", f"{i}w.png"], "scores": [0.2, 0.9]})
    (folder / "ranked.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return {"path": str(folder / "ranked.jsonl")}


def pickapic_rows(count: int) -> list[dict[str, object]]:
    return [
        {"caption": caption, "jpg_0": loser, "jpg_1": winner, "label_0": 0.0, "label_1": 1.0, "user_id": 7}
        if i % 2
        else {"caption": caption, "jpg_0": winner, "jpg_1": loser, "label_0": 1.0, "label_1": 0.0, "user_id": 7}
        for i, (caption, winner, loser) in enumerate(rows(count))
    ]


def _pickapic(folder: Path, count: int) -> dict[str, object]:
    pq.write_table(pa.Table.from_pylist(pickapic_rows(count)), folder / "pairs.parquet")
    return {"path": str(folder / "pairs.parquet")}


def _pickapic_folder(folder: Path, count: int) -> dict[str, object]:
    everything = pickapic_rows(count)
    (folder / "data").mkdir()
    pq.write_table(pa.Table.from_pylist(everything[: count // 2]), folder / "data" / "train-0.parquet")
    pq.write_table(pa.Table.from_pylist(everything[count // 2 :]), folder / "data" / "train-1.parquet")
    return {"path": str(folder)}


def _saved(folder: Path, count: int) -> dict[str, object]:
    datasets.Dataset.from_list(pickapic_rows(count)).save_to_disk(str(folder / "saved"))
    return {"path": str(folder / "saved")}


def _folders(folder: Path, count: int) -> dict[str, object]:
    home = folder / "1_shapes"
    for side in ("w", "l"):
        (home / side).mkdir(parents=True)
    for i, (caption, winner, loser) in enumerate(rows(count)):
        (home / "w" / f"{i}.png").write_bytes(winner)
        (home / "l" / f"{i}.png").write_bytes(loser)
        (home / "w" / f"{i}.txt").write_text(caption)
    return {"path": str(folder)}


def _hpdv2(folder: Path, count: int) -> dict[str, object]:
    (folder / "train").mkdir()
    lines = []
    for i, (caption, winner, loser) in enumerate(rows(count)):
        (folder / "train" / f"{i}w.png").write_bytes(winner)
        (folder / "train" / f"{i}l.png").write_bytes(loser)
        lines.append({"prompt": caption, "file_path": [f"{i}l.png", f"{i}w.png"], "human_preference": [0, 1]})
    (folder / "train.json").write_text(json.dumps(lines))
    return {"path": str(folder / "train.json")}


def _webdataset(folder: Path, count: int) -> dict[str, object]:
    with tarfile.open(folder / "shard-0.tar", "w") as archive:
        for i, (caption, winner, loser) in enumerate(rows(count)):
            parts = {"caption.txt": caption.encode(), "jpg_0.png": winner, "jpg_1.png": loser, "label_0.txt": b"1"}
            for name, data in parts.items():
                info = tarfile.TarInfo(f"{i:04d}.{name}")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    return {"path": str(folder)}


_WRITERS = {
    "jsonl": _jsonl,
    "jsonl-ranking": _ranking,
    "pickapic": _pickapic,
    "pickapic-folder": _pickapic_folder,
    "saved-dataset": _saved,
    "folders": _folders,
    "hpdv2": _hpdv2,
    "webdataset": _webdataset,
}
