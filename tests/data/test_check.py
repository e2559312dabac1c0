"""The report on a data set: it counts what is there, names what is broken, and says whether any of it is of use."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import toy_pairs

from diffalign.data.check import NAMED, Report, check


def write(folder: Path, rows: list[dict[str, object]]) -> str:
    pq.write_table(pa.Table.from_pylist(rows), folder / "pairs.parquet")
    return str(folder / "pairs.parquet")


def ties(count: int) -> list[dict[str, object]]:
    return [{**row, "label_0": 0.5, "label_1": 0.5} for row in toy_pairs.pickapic_rows(count)]


@pytest.mark.parametrize("layout", toy_pairs.LAYOUTS)
def test_a_good_set_of_every_layout(layout: str, tmp_path: Path) -> None:
    section = toy_pairs.write(layout, tmp_path, 6)
    report = check(str(section["path"]))
    assert report.usable and report.schema == section["name"]
    assert (report.records, report.ties, report.broken, report.broken_rows) == (6, 0, 0, ())
    assert (report.prompts, report.duplicate_prompts) == (4, 2)
    assert report.images_per_record == {2: 6} and report.sizes == {"48x48": 6, "40x40": 6}
    assert report.render().splitlines()[-1].strip() == "usable"


def test_ties_and_broken_rows_are_counted_and_named(tmp_path: Path) -> None:
    rows = [*ties(2), *toy_pairs.pickapic_rows(3)]
    rows[3]["jpg_0"] = b"no picture"
    report = check(write(tmp_path, rows))
    assert (report.records, report.ties, report.broken) == (4, 2, 1) and report.usable
    [row] = report.broken_rows
    assert row.source == "pairs.parquet row 3" and report.reasons == {row.reason: 1}
    assert f"broken: {row.source}: {row.reason}" in report.render()
    assert "4 records, 2 ties, 1 broken rows" in report.render()


def test_ties_alone_are_of_no_use(tmp_path: Path) -> None:
    report = check(write(tmp_path, ties(3)))
    assert not report.usable and "NOT USABLE" in report.render()


def test_broken_rows_alone_are_of_no_use_and_not_all_are_printed(tmp_path: Path) -> None:
    report = check(write(tmp_path, [{**row, "caption": ""} for row in toy_pairs.pickapic_rows(NAMED + 3)]))
    assert not report.usable and report.records == 0 and report.broken == NAMED + 3
    assert len(report.broken_rows) == NAMED and report.render().count("broken: ") == NAMED
    assert "and 3 more broken rows" in report.render() and "picture sizes: none" in report.render()


@pytest.mark.parametrize("rows", [[], ties(2), toy_pairs.pickapic_rows(2)], ids=["empty", "ties", "good"])
def test_the_dictionary_is_json(rows: list[dict[str, object]], tmp_path: Path) -> None:
    path = write(tmp_path, rows) if rows else str(tmp_path / "metadata.jsonl")
    if not rows:
        Path(path).write_text("not json\n")
    report = check(path)
    read = json.loads(json.dumps(report.to_dict()))
    assert read["usable"] is report.usable and read["records"] == report.records
    assert set(read) == {*Report.__dataclass_fields__, "usable"}


def test_long_prompts_are_counted_with_the_length_that_is_given(tmp_path: Path) -> None:
    rows = toy_pairs.pickapic_rows(3)
    rows[1]["caption"] = "word " * 100
    path = write(tmp_path, rows)
    assert check(path).long_prompts == 1
    assert "1 prompts are longer" in check(path).render()
    assert check(path, count_tokens=lambda text: 78).long_prompts == 3
    assert check(path, count_tokens=lambda text: 77).long_prompts == 0


def test_max_rows_bounds_what_is_read(tmp_path: Path) -> None:
    path = write(tmp_path, toy_pairs.pickapic_rows(5))
    assert check(path, max_rows=2).records == 2


def test_an_unknown_layout_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="did you mean 'pickapic'"):
        check(write(tmp_path, toy_pairs.pickapic_rows(1)), name="pickapick")
