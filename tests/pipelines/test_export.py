"""Every export, loaded back by diffusers' own loaders."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from miniatures import FAMILIES
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from diffalign.pipelines import load_pipeline
from diffalign.pipelines.export import export_lora, read_lora
from diffalign.pipelines.lora import WEIGHTS_NAME, attach_lora, save_lora

Make = Callable[[], Path]
every_family = pytest.mark.parametrize(
    "folder", [pytest.param(FAMILIES[name], id=name) for name in ("sd", "sdxl", "sd3")]
)


def predictions(network, pipe):
    x, t = torch.randn(2, *pipe.latent_shape(), generator=torch.Generator().manual_seed(0)), pipe.times(5)[1:3]
    condition = pipe.encode_prompts(["a red circle", "two blue squares"])
    own, pipe.network = pipe.network, network
    with torch.no_grad():
        y = pipe.predict(x, t, condition)
    pipe.network = own
    return y


@pytest.fixture(params=[None, 2.0], ids=["alpha=rank", "alpha=2"])
def saved(request, folder, tmp_path):
    """A pipeline with an adapter that does something, and its LoRA on disk."""
    pipe = load_pipeline(folder())
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in attach_lora(pipe, rank=4, alpha=request.param):
            parameter.copy_(torch.randn(parameter.shape, generator=g) * 0.3)
    save_lora(pipe, tmp_path / "run", facts={"base_model": "some/model", "method": {"name": "dpo", "beta": 2000}})
    return pipe, tmp_path / "run"


@every_family
@pytest.mark.parametrize("form", ["kohya", "diffusers"])
@pytest.mark.parametrize(("dtype", "tolerance"), [("fp32", 1e-5), ("fp16", 1e-2), ("bf16", 5e-2)])
def test_stock_diffusers_says_the_same_with_every_export(saved, folder, form, dtype, tolerance, tmp_path):
    pipe, run = saved
    file = export_lora(run, tmp_path / "out" / "lora.safetensors", form, dtype)
    stock = DiffusionPipeline.from_pretrained(folder())
    network = getattr(stock, pipe.lora_prefix)
    plain = predictions(network, pipe)
    stock.load_lora_weights(file)
    ours = predictions(pipe.network, pipe)
    assert (ours - plain).abs().max() > 0.02
    torch.testing.assert_close(predictions(network, pipe), ours, rtol=0, atol=tolerance)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["lora.safetensors"]


@every_family
def test_kohya_keys(saved, tmp_path):
    pipe, run = saved
    with safe_open(export_lora(run, tmp_path / "lora.safetensors"), "pt") as stored:
        keys, metadata = set(stored.keys()), stored.metadata()
        down = {key: stored.get_tensor(key) for key in keys}
    assert not any(".default" in key for key in keys)
    lora = read_lora(run)
    if pipe.family == "sd3":
        assert {key.rsplit(".", 2)[1] for key in keys} == {"lora_A", "lora_B"}
        assert "transformer.transformer_blocks.0.attn.to_q.lora_A.weight" in keys
        assert not any("alpha" in key for key in keys)
        config = json.loads(metadata["lora_adapter_metadata"])
        assert config["transformer.r"] == config["transformer.lora_alpha"] == 4
    else:
        stem = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q"
        assert {f"{stem}.lora_down.weight", f"{stem}.lora_up.weight", f"{stem}.alpha"} <= keys
        assert len(keys) == 3 * len(lora.modules)
        assert down[f"{stem}.alpha"].item() == lora.alpha
    assert metadata["ss_network_dim"] == "4" and metadata["ss_sd_model_name"] == "some/model"
    assert json.loads(metadata["diffalign"])["method"] == {"name": "dpo", "beta": 2000}


def test_what_is_not_a_lora_of_one_network_is_refused(tmp_path):
    with pytest.raises(ValueError, match="expected a LoRA file or a folder"):
        read_lora(tmp_path)
    (tmp_path / WEIGHTS_NAME).write_bytes(b"nothing")
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        read_lora(tmp_path)
    a, b = torch.zeros(4, 8), torch.zeros(8, 4)
    for state in (
        {},
        {"lora_unet_x.lora_down.weight": a},
        {"unet.x.lora_A.weight": a},
        {"unet.x.lora_A.weight": a, "text_encoder.x.lora_B.weight": b},
    ):
        save_file(state, tmp_path / WEIGHTS_NAME)
        with pytest.raises(ValueError, match="expected a LoRA in diffusers' format"):
            read_lora(tmp_path)
    ranks = {"unet.x.lora_A.weight": a, "unet.x.lora_B.weight": b,
             "unet.y.lora_A.weight": a[:2].clone(), "unet.y.lora_B.weight": b[:, :2].clone()}  # fmt: skip
    save_file(ranks, tmp_path / WEIGHTS_NAME)
    with pytest.raises(ValueError, match=r"one rank and one alpha for all layers, got ranks \[2, 4\]"):
        read_lora(tmp_path)
    with pytest.raises(ValueError, match="expected a format of kohya, diffusers and a dtype of fp32, fp16, bf16"):
        export_lora(tmp_path, tmp_path / "x", "comfy")


def test_alpha_is_the_rank_where_a_file_does_not_say(tmp_path):
    save_file({"unet.x.lora_A.weight": torch.ones(4, 8), "unet.x.lora_B.weight": torch.ones(8, 4)}, tmp_path / "f")
    assert read_lora(tmp_path / "f").alpha == 4
    assert load_file(export_lora(tmp_path / "f", tmp_path / "g"))["lora_unet_x.alpha"].item() == 4
