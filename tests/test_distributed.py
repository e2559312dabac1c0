"""What several processes share, without starting them: refusals, turns, pooled means, launch files."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file

from diffalign.config import RunConfig, find_config, packaged_configs
from diffalign.distributed import in_turns, own_rows, placed_optimizer, refuse_few_pairs, refuse_launch, whole
from diffalign.tracking import Averages

LAUNCHES = Path(__file__).resolve().parent.parent / "configs" / "accelerate"
DEEPSPEED = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}
FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_CPU_RAM_EFFICIENT_LOADING": "false"}


def rank(index: int, ranks: int) -> Any:
    return SimpleNamespace(process_index=index, num_processes=ranks)


def run(**keys: Any) -> RunConfig:
    return RunConfig("tiny-sd", **keys)


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_turns_count_every_item_once_and_are_equally_many_on_every_rank(ranks: int) -> None:
    items = list("abcde")
    turns = [list(in_turns(items, rank(index, ranks))) for index in range(ranks)]
    assert len({len(own) for own in turns}) == 1
    counted = sorted((number, item) for own in turns for number, item, counts in own if counts)
    assert counted == list(enumerate(items))
    assert all(items[number] == item for own in turns for number, item, _ in own)
    assert list(in_turns([], rank(0, ranks))) == []


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_rows_cover_all_prompts_and_no_rank_is_without_work(ranks: int) -> None:
    rows = [own_rows(5, rank(index, ranks)) for index in range(ranks)]
    assert {row for own in rows for row in own} == set(range(5)) and all(rows)


def test_pooled_means_are_those_of_all_samples_and_not_of_the_ranks() -> None:
    values = torch.tensor([1.0, 2.0, 6.0]), torch.tensor([11.0])
    times = torch.tensor([0.05, 0.05, 0.95]), torch.tensor([0.55])  # a bin that only one of the ranks has
    together, ranks = Averages(), (Averages(), Averages())
    together.add({"h": torch.cat(values)}, torch.cat(times))
    for averages, value, time in zip(ranks, values, times, strict=True):
        averages.add({"h": value}, time)
    second: list[Any] = []
    ranks[1].pop(lambda own: second.extend(own) or own)
    pooled = ranks[0].pop(lambda own: [*own, *second])
    assert pooled == pytest.approx(together.pop())
    assert pooled["h"] == 5.0 and pooled["h/bin5"] == 11.0
    assert ranks[0].pop() == {}


def test_without_shards_nothing_is_copied_on_its_way_to_a_checkpoint_or_back() -> None:
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([parameter])
    parameter.grad = torch.ones(3)
    optimizer.step()
    state = optimizer.state_dict()
    assert whole(state, keep=True)["state"][0]["exp_avg"] is state["state"][0]["exp_avg"]
    placed = placed_optimizer(state, [parameter])
    assert placed["param_groups"] == state["param_groups"]
    assert all(placed["state"][0][name] is value for name, value in state["state"][0].items())


@pytest.mark.parametrize(
    ("ranks", "batch", "pairs", "needed"), [(2, 1, 1, "2"), (2, 8, 9, "16"), (64, 1, 63, "64")]
)  # fmt: skip
def test_more_ranks_than_pairs_are_refused(ranks: int, batch: int, pairs: int, needed: str) -> None:
    with pytest.raises(ValueError, match=f"{ranks} processes .* take {needed} different pairs .* there are {pairs} "):
        refuse_few_pairs(run(train_batch_size=batch), pairs, ranks)


def test_enough_pairs_and_a_single_process_are_not_refused() -> None:
    refuse_few_pairs(run(train_batch_size=8), 16, 2)
    refuse_few_pairs(run(train_batch_size=8), 3, 1)  # one process repeats them within the batch


@pytest.mark.parametrize(
    ("environment", "keys", "message"),
    [
        ({"WORLD_SIZE": "4"}, {}, "4 processes were started, but they do not see each other"),
        (FSDP2, {}, "a LoRA is small enough"),
        (DEEPSPEED, {}, "a LoRA is small enough"),
        ({**FSDP2, "FSDP_VERSION": "1"}, {"train": "full"}, "set fsdp_version: 2"),
        ({**FSDP2, "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}, {"train": "full"}, "set it to false"),
        ({**DEEPSPEED, "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}, {"train": "full"}, "zero_stage: 2 only"),
        (DEEPSPEED, {"train": "full", "mixed_precision": "fp16"}, "no or bf16, got fp16"),
        (FSDP2, {"train": "full", "mixed_precision": "fp16"}, "no or bf16, got fp16"),
        (FSDP2, {"train": "full", "reference": {"name": "pool"}}, "reference 'pool' keeps whole weights"),
        (DEEPSPEED, {"train": "full", "reference": {"name": "ema"}}, "reference 'ema' keeps whole weights"),
    ],
)
def test_launches_that_would_do_something_else_are_refused(
    environment: dict[str, str], keys: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        refuse_launch(run(**keys), rank(0, 2))


@pytest.mark.parametrize("environment", [{}, {"WORLD_SIZE": "2"}, FSDP2, DEEPSPEED])
def test_launches_of_whole_networks_are_not_refused(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    refuse_launch(run(train="full"), rank(0, 2))


@pytest.mark.parametrize("kind", ["ddp", "fsdp2", "deepspeed_zero2"])
def test_a_launch_file_is_one_that_accelerate_reads_and_begins_with_its_command(kind: str) -> None:
    file = LAUNCHES / f"{kind}.yaml"
    first = file.read_text(encoding="utf-8").splitlines()[0]
    assert first.startswith(f"# accelerate launch --config_file configs/accelerate/{kind}.yaml ")
    assert "Has been run: " in file.read_text(encoding="utf-8")
    loaded = load_config_from_file(str(file))  # refuses a key that it does not know
    assert loaded.num_processes == yaml.safe_load(file.read_text(encoding="utf-8"))["num_processes"] == 2


def test_launch_files_are_no_run_configs() -> None:
    assert not [name for name in packaged_configs() if "accelerate" in name]
    with pytest.raises(ValueError, match="accelerate/ddp"):
        find_config("accelerate/ddp")
