"""Configs: strict keys, overrides, and every packaged one."""

from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from diffalign.config import RunConfig, as_dict, dump, find_config, load_config, packaged_configs
from diffalign.strict_yaml import apply_override, read_yaml

SMALL = {"pretrained_model_name_or_path": "tiny-sd", "data": {"name": "jsonl", "path": "pairs"}}


def write(folder: Path, text: str) -> Path:
    file = folder / "mine.yaml"
    file.write_text(text)
    return file


def test_defaults_and_short_sections() -> None:
    config = load_config({**SMALL, "method": "sft", "reference": "none"})
    assert config.method == {"name": "sft"} and config.reference_name == "none"
    assert config.output_dir == "runs/run" and config.lora.rank == 16


def test_text_numbers_of_yaml_1_1(tmp_path: Path) -> None:
    file = write(tmp_path, "pretrained_model_name_or_path: tiny-sd\nlearning_rate: 1e-5\nmixed_precision: no\n")
    config = load_config(file)
    assert config.learning_rate == 1e-5 and config.mixed_precision == "no"
    assert config.output_dir == "runs/mine"


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("method.beta=2000", ("method", "beta"), 2000),
        ('rewards."hpsv2.1"=5', ("rewards", "hpsv2.1"), 5),
        ("rewards.clip.weight=0.5", ("rewards", "clip", "weight"), 0.5),
        ("lora.rank=4", ("lora", "rank"), 4),
        ("validation_prompts=[a red circle, two dots]", ("validation_prompts",), ["a red circle", "two dots"]),
        ("output_dir=runs/a=b", ("output_dir",), "runs/a=b"),
    ],
)
def test_overrides(override: str, path: tuple[str, ...], value: object) -> None:
    values: dict[str, object] = {"method": "dpo"}
    apply_override(values, override)
    found: object = values
    for part in path:
        assert isinstance(found, dict)
        found = found[part]
    assert found == value


def test_an_override_of_a_short_section_keeps_its_name_and_leaves_the_original_alone() -> None:
    original = {**SMALL, "method": {"name": "dpo", "beta": 5000}}
    config = load_config(original, ["method.beta=10", "data.path=else"])
    assert config.method == {"name": "dpo", "beta": 10}
    assert original["method"] == {"name": "dpo", "beta": 5000} and SMALL["data"] == {"name": "jsonl", "path": "pairs"}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["learning_rat=1"], r"unknown config key 'learning_rat', did you mean 'learning_rate'\?"),
        (["learning_rate=fast"], r"learning_rate: expected float, got 'fast'"),
        (["learning_rate=0"], r"learning_rate: expected a number above 0"),
        (["learning_rate=nan"], r"learning_rate: expected a number above 0"),
        (["train_batch_size=1.5"], r"train_batch_size: expected int, got 1.5"),
        (["mixed_precision=fp8"], r"mixed_precision: expected one of no, fp16, bf16, got 'fp8'"),
        (["ema_decay=2"], r"ema_decay: expected a number in \[0, 1\]"),
        (["seed=-1"], r"seed: expected a number from 0 to"),
        (["validation_seed=5000000000"], r"validation_seed: expected a number from 0 to"),
        (["validation_steps=0"], r"validation_steps: expected a number of at least 1"),
        (["lora.rnk=4"], r"unknown key of lora 'rnk', did you mean 'rank'\?"),
        (["lora.rank=0"], r"lora: expected a rank of at least 1"),
        (["lora=4"], r"lora: expected a section"),
        (["method.name=3"], r"method: expected a name or a mapping"),
        (["rewards=clip"], r"rewards: expected name: weight lines"),
        (["validation_prompts=one"], r"validation_prompts: expected a list"),
        (["seed.x=1"], r"seed is not a section but 3"),
        (["seed"], r"expected an override of the form key=value"),
        (["=1"], r"expected an override of the form key=value"),
        (["a..b=1"], r"expected an override of the form key=value"),
        (["seed=[1"], r"the value is not YAML"),
        (["lora={rank: 4, rank: 8}"], r"the key 'rank' is written twice"),
    ],
)
def test_bad_values_are_named(overrides: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_config({**SMALL, "seed": 3}, overrides)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("resolution: 64\n", r"no pretrained_model_name_or_path"),
        ("seed: 1\nseed: 2\n", r"mine.yaml: the key 'seed' is written twice"),
        ("lora: {rank: 1, rank: 2}\n", r"the key 'rank' is written twice"),
        ("- a\n- b\n", r"expected 'key: value' lines, got list"),
        ("", r"expected 'key: value' lines, got NoneType"),
        ("a: [1\n", r"mine.yaml: while parsing"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_config(write(tmp_path, text))


def test_a_file_that_is_not_text_is_named(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"mine.yaml"):
        read_yaml(file)


def test_an_unknown_config_lists_the_packaged_ones() -> None:
    with pytest.raises(ValueError, match=r"unknown config 'tiny-sd/dop', did you mean 'tiny-sd/dpo'\?"):
        find_config("tiny-sd/dop")


def test_dump_and_load_give_the_same_config(tmp_path: Path) -> None:
    config = load_config({**SMALL, "learning_rate": "3e-5", "rewards": {"hpsv2.1": 5.0}, "lora": {"targets": ["to_q"]}})
    dump(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config
    assert [file.name for file in tmp_path.iterdir()] == ["config.yaml"]
    written = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert list(written) == [field.name for field in fields(RunConfig)] == list(as_dict(config))


@pytest.mark.parametrize("name", packaged_configs())
def test_every_packaged_config_resolves_and_says_how_to_run_it(name: str) -> None:
    config = load_config(name)
    assert config.output_dir == "runs/" + name.replace("/", "-")
    assert load_config(find_config(name).resolve()).output_dir == config.output_dir
    assert find_config(name).read_text().startswith(f"# diffalign train {name}")


def test_there_are_packaged_configs() -> None:
    assert {"tiny-sd/dpo", "tiny-sd/sft"} <= set(packaged_configs())
