"""The pages of docs/ say what the code says."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from diffalign.config import RunConfig, load_config, packaged_configs
from diffalign.data.options import DataOptions
from diffalign.methods import METHODS
from diffalign.noise import NOISE_METHODS
from diffalign.rewards import REWARDS
from diffalign.table import resolve

ROOT = Path(__file__).resolve().parent.parent
TRAINING = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
README = (ROOT / "README.md").read_text(encoding="utf-8")


def rows(page: str, header: str) -> list[list[str]]:
    """The cells of the first table under a header line."""
    lines = page.partition(header)[2].splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("|"))
    last = next((i for i in range(first, len(lines)) if not lines[i].startswith("|")), len(lines))
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[first + 2 : last]]


def test_the_page_on_training_lists_every_key_of_a_run_and_no_other():
    keys = [key for cells in rows(TRAINING, "## Keys") for key in re.findall(r"`(\w+)`", cells[0])]
    assert sorted(keys) == sorted(field.name for field in dataclasses.fields(RunConfig))


def test_the_defaults_of_single_numbers_are_those_of_the_code():
    fields = {field.name: field.default for field in dataclasses.fields(RunConfig)}
    stated = {cells[0]: cells[1].split(", ") for cells in rows(TRAINING, "## Keys")}
    compared = 0
    for cell, values in stated.items():
        keys = re.findall(r"`(\w+)`", cell)
        for key, value in zip(keys, values, strict=False):
            if type(fields[key]) in (int, float):
                assert float(value) == fields[key], key
                compared += 1
    assert compared >= 20


def test_the_keys_of_every_data_layout_are_listed():
    keys = [cells[0].strip("`") for cells in rows(TRAINING, "Every data layout")]
    assert keys == [field.name for field in dataclasses.fields(DataOptions)]


def test_the_readme_has_a_row_for_each_method_with_files_that_exist():
    listed = rows(README, "## Methods")
    assert [cells[0].strip("`") for cells in listed] == list(METHODS)
    links = [link for cells in listed for link in re.findall(r"\]\(([^):]+)\)", " ".join(cells))]
    assert len(links) >= 2 * len(METHODS) and all((ROOT / link).is_file() for link in links)


def test_the_page_on_rewards_has_a_row_for_each_reward():
    page = (ROOT / "docs" / "rewards.md").read_text(encoding="utf-8")
    names = [name for cells in rows(page, "## Which there are") for name in re.findall(r"`([\w.-]+)`", cells[0])]
    assert sorted(names) == sorted(REWARDS)


def test_the_page_on_noise_lists_every_method_with_all_its_keywords():
    page = (ROOT / "docs" / "noise.md").read_text(encoding="utf-8")
    listed = {cells[0].strip("`"): set(re.findall(r"`(\w+)`", cells[3])) for cells in rows(page, "## Methods")}
    assert list(listed) == list(NOISE_METHODS)
    for name, said in listed.items():
        keywords = {field.name for field in dataclasses.fields(resolve(NOISE_METHODS, name, "method"))}
        assert keywords - {"steps"} <= said, name


@pytest.mark.parametrize("name", packaged_configs())
def test_a_config_loads_and_begins_with_the_command_that_runs_it(name):
    text = (ROOT / "configs" / f"{name}.yaml").read_text(encoding="utf-8")
    command = re.fullmatch(rf"# diffalign train {re.escape(name)}((?: \S+=\S+)*)", text.splitlines()[0])
    assert command, f"{name}: {text.splitlines()[0]}"
    config = load_config(name, command[1].split())
    assert config.method_name in METHODS
    assert config.output_dir == f"runs/{name.replace('/', '-')}"
