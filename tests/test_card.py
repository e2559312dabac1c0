"""The card beside a LoRA says what the run was, and what an evaluation found."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from diffalign.card import add_evaluation, write_card
from diffalign.evaluation import evaluate
from diffalign.pipelines import load_pipeline
from diffalign.rewards import load_reward
from diffalign.trainer import train


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("card")
    overrides = [f"output_dir={folder / 'run'}", f"cache_dir={folder / 'cache'}", "max_train_steps=1",
                 "data.max_pairs=40", "validation_prompts=[]", "report_to=none"]  # fmt: skip
    return train("tiny-sd/dpo", overrides).folder


def test_a_run_leaves_a_card_that_claims_nothing_it_did_not_measure(run: Path):
    text = (run / "README.md").read_text()
    front = yaml.safe_load(text.split("---")[1])
    assert front["base_model"] == "tiny-sd" and {"lora", "template:sd-lora", "dpo"} <= set(front["tags"])
    assert "| method | dpo, beta 100, time_low 0.5, timestep_weight x0 |" in text
    assert "| steps | 1 of 32 pairs on each device |" in text
    assert "Not measured." in text and "win rate |" not in text
    assert re.search(r"38 training pairs, sha256 [0-9a-f]{16} ", text)


def test_its_snippet_runs(run: Path):
    code = re.search(r"```python\n(.*?)```", write_card(run).read_text(), re.S)[1]
    names: dict = {}
    exec(code.replace("pipe(", "pipe(num_inference_steps=2, prompt="), names)
    assert names["image"].size == (64, 64)


def test_an_evaluation_comes_onto_the_card(run: Path):
    prompts = ["a red circle", "a blue square"]
    report = evaluate(load_pipeline("tiny-sd"), prompts, load_reward("shapes"), lora=run, steps=2)
    add_evaluation(run, report)
    text = (run / "README.md").read_text()
    assert "2 prompts, 1 seeds each from 0, 2 sampling steps, guidance 7.5" in text
    row = report["rewards"]["shapes"]
    assert f"| shapes | {row['base']:.3f} [" in text and f"{row['win_rate']:.3f} [" in text
    assert "Not measured" not in text and "Nothing is known" not in text
    (run / "evaluation.json").unlink()
