"""Compiled blocks say what eager ones say, and switching adapters does not compile them again."""

from pathlib import Path

import pytest
import torch
from miniatures import FAMILIES, cogvideox, wan
from test_trainer import config, metrics

from diffalign.pipelines import load_pipeline
from diffalign.pipelines.compiling import compile_blocks, compiled
from diffalign.pipelines.lora import attach_lora, without_adapters
from diffalign.reference import frozen_copy
from diffalign.trainer import train

CLIPS = {"wan": wan, "cogvideox": cogvideox}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "attention"),
    [(name, attention) for name in ("sdxl", "sd3") for attention in ("auto", "math")]
    + [(name, "auto") for name in CLIPS],
)
def test_policy_and_reference_are_compiled_once_each(name: str, attention: str) -> None:
    torch._dynamo.reset()
    pipe = load_pipeline((FAMILIES | CLIPS)[name](), attention=attention)
    parameters = attach_lora(pipe, rank=2)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)) * 0.1)
    shape = pipe.latent_shape(32, 32, 5 if pipe.clips else None)
    x = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    t, condition = pipe.times(5)[1:3], pipe.encode_prompts(["a red circle", "two blue squares"])
    reference = without_adapters(pipe)

    def step() -> tuple[torch.Tensor, ...]:
        for parameter in parameters:
            parameter.grad = None
        with torch.no_grad():
            theirs = reference(x, t, condition)
        ours = pipe.predict(x, t, condition)
        (ours - theirs).square().mean().backward()
        return theirs, ours.detach(), *(p.grad for p in parameters)

    eager = step()
    assert not compiled(pipe.network) and compile_blocks(pipe.network) > 0 and compiled(pipe.network)
    torch.testing.assert_close(step(), eager, rtol=1e-4, atol=1e-5)
    torch._dynamo.config.error_on_recompile = True
    try:
        torch.testing.assert_close(step(), eager, rtol=1e-4, atol=1e-5)
    finally:
        torch._dynamo.config.error_on_recompile = False
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.slow
def test_a_compiled_run_starts_at_the_identity_and_trains(tmp_path: Path) -> None:
    torch._dynamo.reset()
    values = config(tmp_path, pretrained_model_name_or_path=str(FAMILIES["sdxl"]()), max_train_steps=2, compile=True,
                    method={"name": "dpo", "beta": 5000})  # fmt: skip
    rows = [row for row in metrics(train(values).folder) if "loss" in row]
    assert rows[0]["loss"] == pytest.approx(0.6931472, abs=1e-3) and rows[0]["h_abs"] < 0.05


def test_a_frozen_copy_of_a_compiled_network_is_compiled_too() -> None:
    pipe = load_pipeline(FAMILIES["sd"]())
    compile_blocks(pipe.network)
    assert compiled(frozen_copy()(pipe).network)


def test_a_network_without_known_blocks_is_refused() -> None:
    with pytest.raises(ValueError, match="blocks of kind BasicTransformerBlock, .*, got Linear"):
        compile_blocks(torch.nn.Linear(1, 1))
