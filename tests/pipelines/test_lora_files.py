"""A LoRA of another network, layout or part is refused, and the message says what it was made for."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from miniatures import stable_diffusion, stable_diffusion_3, stable_diffusion_xl
from safetensors.torch import load_file, save_file

from diffalign.pipelines import load_pipeline
from diffalign.pipelines.architectures import attach_meta_lora, meta_network, network_config
from diffalign.pipelines.export import export_lora
from diffalign.pipelines.lora import attach_lora, check_lora, load_lora, save_lora
from diffalign.pipelines.lora_files import made_for, read_header

Make = Callable[[], Path]
MAKERS: dict[str, Make] = {"sd": stable_diffusion, "sdxl": stable_diffusion_xl, "sd3": stable_diffusion_3}
TITLES = {"sd": "Stable Diffusion 1.x or 2.x", "sdxl": "SDXL", "sd3": "SD3 or SD3.5"}


def written(file: Path, shapes: dict[str, tuple[int, ...]], metadata: dict[str, str] | None = None) -> Path:
    save_file({key: torch.zeros(shape) for key, shape in shapes.items()}, file, metadata)
    return file


def lora_of(family: str, folder: Path, form: str) -> Path:
    """A LoRA that this toolkit wrote for a miniature, in a layout."""
    pipe = load_pipeline(MAKERS[family]())
    attach_lora(pipe, rank=2)
    save_lora(pipe, folder, facts={"base_model": f"some/{family}"})
    return export_lora(folder, folder / "out.safetensors", form)


@pytest.mark.parametrize("form", ["diffusers", "kohya"])
@pytest.mark.parametrize(("made", "loaded"), [(a, b) for a in MAKERS for b in MAKERS if a != b])
def test_a_lora_of_another_family_is_refused_with_both_names(made: str, loaded: str, form: str, tmp_path: Path) -> None:
    file, pipe = lora_of(made, tmp_path, form), load_pipeline(MAKERS[loaded]())
    with pytest.raises(ValueError) as refused:
        load_lora(pipe, file)
    text = str(refused.value)
    assert text.startswith(f"{file}: expected a LoRA in diffusers' layout for the {pipe.lora_prefix} of {pipe.name} "
                           f"({TITLES[loaded]}")  # fmt: skip
    assert f"got one for {TITLES[made]} (" in text and f"trained on some/{made}" in text
    assert text.endswith("load it onto the model that it was made for") and len(text) < 800
    assert not getattr(pipe.network, "peft_config", {})  # nothing was attached


# the published networks of these families, by the names that other trainers give their layers
SD15 = {"unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.lora_A.weight": (4, 768)}
SD15_OLD = {"unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.processor.to_k_lora.down.weight": (4, 768)}
SD15_KOHYA = {"lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k.lora_down.weight": (4, 768)}
SD21_KOHYA = {"lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k.lora_down.weight": (4, 1024)}
SDXL = {"unet.mid_block.attentions.0.transformer_blocks.3.attn2.to_k.lora_A.weight": (8, 2048)}
SDXL_KOHYA = {
    "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q.lora_down.weight": (8, 640),
    "lora_te2_text_model_encoder_layers_0_self_attn_k_proj.lora_down.weight": (8, 1280),
}
SD3 = {"transformer.transformer_blocks.0.attn.to_q.lora_A.weight": (4, 1536)}
SD35_LARGE = {"transformer.transformer_blocks.0.attn.add_k_proj.lora_A.weight": (4, 2432)}
SD3_KOHYA = {"lora_unet_joint_blocks_0_x_block_attn_qkv.lora_down.weight": (4, 1536)}
OTHER = {"x.lora_A.weight": (1, 1)}
FLUX = {"transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight": (4, 3072)}


@pytest.mark.parametrize(
    ("shapes", "metadata", "found"),
    [
        (SD15, {}, "Stable Diffusion 1.x (cross-attention width 768)"),
        (SD15_OLD, {}, "Stable Diffusion 1.x (cross-attention width 768)"),
        (SD15_KOHYA, {}, "Stable Diffusion 1.x (cross-attention width 768)"),
        (SD21_KOHYA, {}, "Stable Diffusion 2.x (cross-attention width 1024)"),
        (SDXL, {}, "SDXL (cross-attention width 2048)"),
        (SDXL_KOHYA, {}, "SDXL"),
        (SDXL_KOHYA, {"ss_base_model_version": "sdxl_base_v1-0"}, "SDXL (its metadata says sdxl_base_v1-0)"),
        (SD3, {}, "SD3 or SD3.5 medium (blocks of width 1536)"),
        (SD35_LARGE, {}, "SD3.5 large (blocks of width 2432)"),
        (SD3_KOHYA, {}, "SD3 or SD3.5"),
        (FLUX, {}, "FLUX"),
        (OTHER, {"modelspec.architecture": "a/lora"}, "an unknown network (its metadata says a/lora)"),
        (OTHER, {"diffalign": "{not json"}, "an unknown network"),
    ],
)  # fmt: skip
def test_what_a_file_was_made_for_is_told_from_keys_shapes_and_metadata(
    shapes: dict[str, tuple[int, ...]], metadata: dict[str, str], found: str, tmp_path: Path
) -> None:
    assert made_for(read_header(written(tmp_path / "f.safetensors", shapes, metadata))) == found


@pytest.mark.parametrize(
    ("architecture", "found"),
    [("sd15", "Stable Diffusion 1.x"), ("sd21", "Stable Diffusion 2.x"), ("sdxl", "SDXL"),
     ("sd3-medium", "SD3 or SD3.5 medium"), ("sd3.5-medium", "SD3 or SD3.5 medium"), ("sd3.5-large", "SD3.5 large")],
)  # fmt: skip
def test_the_true_shapes_of_every_published_network_are_told(architecture: str, found: str, tmp_path: Path) -> None:
    network = meta_network(network_config(architecture), torch.float32)
    attach_meta_lora(network, 1, None)
    prefix = "transformer" if "3" in architecture else "unet"
    shapes = {f"{prefix}.{name.replace('.default', '')}": tuple(parameter.shape)
              for name, parameter in network.named_parameters() if "lora_" in name}  # fmt: skip
    file = written(tmp_path / "f.safetensors", shapes)
    assert made_for(read_header(file)).startswith(f"{found} (")


def test_a_lora_that_fits_in_part_is_refused_and_one_that_fits_is_not(tmp_path: Path) -> None:
    """SDXL has modules of the names and shapes of SD1.5 in its self-attention, and loaders pass over the rest."""
    file = lora_of("sd", tmp_path, "diffusers")
    pipe = load_pipeline(stable_diffusion())
    assert check_lora(pipe, file) == file
    fitting = load_file(file)
    a, b = (next(key for key in fitting if key.endswith(f"to_q.lora_{side}.weight")) for side in "AB")
    module = a.removeprefix("unet.").removesuffix(".lora_A.weight")
    one = {a: fitting[a], b: fitting[b]}
    far = {key.replace("blocks.1", "blocks.7"): value.clone() for key, value in one.items()}
    for changes, message in (
        ({**one, **far}, rf"there is no module {module.replace('blocks.1', 'blocks.7')} \(2 of 4 weights\)"),
        ({a: one[a][:, :-1].contiguous(), b: one[b]}, rf"{module} has 16 inputs, the file's 15 \(1 of 2 weights\)"),
        ({a: one[a], b: one[b][:-3].contiguous()}, rf"{module} has 16 outputs, the file's 13 \(1 of 2 weights\)"),
    ):
        save_file(changes, tmp_path / "part.safetensors")
        with pytest.raises(ValueError, match=message):
            check_lora(pipe, tmp_path / "part.safetensors")
    old = {a.replace(".to_q.lora_A", ".processor.to_q_lora.down"): one[a],
           b.replace(".to_q.lora_B", ".processor.to_q_lora.up"): one[b]}  # fmt: skip
    save_file(old, tmp_path / "part.safetensors")
    assert check_lora(pipe, tmp_path / "part.safetensors")


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ("text_encoder.text_model.encoder.layers.0.q_proj.lora_A.weight", "expected weights of the unet alone, got 1 "
         "of 9 for text encoders, such as text_encoder.text_model.* neither trained nor changed here"),
        ("text_encoder_2.text_model.encoder.layers.0.fc1.lora_A.weight", "for text encoders, such as text_encoder_2"),
        ("unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q.alpha", "1 keys like unet.down.*passed over"),
    ],
)  # fmt: skip
def test_what_would_be_passed_over_in_silence_is_refused(extra: str, message: str, tmp_path: Path) -> None:
    pipe = load_pipeline(stable_diffusion())
    attach_lora(pipe, rank=2, targets=["attn1.to_q", "attn1.to_k"])
    state = load_file(save_lora(pipe, tmp_path))
    state = dict(sorted(state.items())[:8])
    save_file({**state, extra: torch.zeros(2, 16)}, tmp_path / "more.safetensors")
    with pytest.raises(ValueError, match=message):
        load_lora(load_pipeline(stable_diffusion()), tmp_path / "more.safetensors")


def test_a_file_of_this_very_network_in_kohyas_layout_says_how_to_convert_it(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"in kohya's layout, .*save it in diffusers' layout, with save_lora_weights"):
        load_lora(load_pipeline(stable_diffusion_xl()), lora_of("sdxl", tmp_path, "kohya"))


def test_files_that_are_no_lora(tmp_path: Path) -> None:
    pipe = load_pipeline(stable_diffusion())
    with pytest.raises(ValueError, match=r"not a LoRA: none of its 1 keys names one, they are like 'conv_in.weight'"):
        load_lora(pipe, written(tmp_path / "f.safetensors", {"conv_in.weight": (2, 2)}))
    file = lora_of("sd", tmp_path, "diffusers")
    file.write_bytes(file.read_bytes()[:-50])
    with pytest.raises(ValueError, match="not a LoRA: expected a whole safetensors file"):
        load_lora(pipe, file)


def test_a_second_adapter_is_checked_against_the_network_below_the_first(tmp_path: Path) -> None:
    file = lora_of("sd", tmp_path, "diffusers")
    pipe = load_pipeline(stable_diffusion())
    for adapter in ("one", "two"):
        load_lora(pipe, file, adapter=adapter)
    network: Any = pipe.network
    assert set(network.peft_config) == {"one", "two"}
    assert json.loads(read_header(file).metadata["diffalign"])["family"] == "sd"
