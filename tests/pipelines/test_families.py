"""Every model family against stock diffusers, on random miniatures of the true layouts."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from miniatures import FAMILIES, stable_diffusion, stable_diffusion_3, stable_diffusion_xl
from safetensors import safe_open

from diffalign.generation import generate
from diffalign.pipelines import load_pipeline
from diffalign.pipelines.lora import (
    WEIGHTS_NAME,
    adapters_disabled,
    attach_lora,
    load_lora,
    lora_state,
    save_lora,
    without_adapters,
)

PROMPTS = ["a red circle", "two blue squares", "a green cross above a red square"]


every_family = pytest.mark.parametrize("folder", [pytest.param(make, id=name) for name, make in FAMILIES.items()])
Make = Callable[[], Path]


def stock_pipeline(folder: Path) -> DiffusionPipeline:
    index = json.loads((folder / "model_index.json").read_text())
    absent = {name: None for name in ("text_encoder_3", "tokenizer_3") if index.get(name) == [None, None]}
    pipe = DiffusionPipeline.from_pretrained(folder, **absent)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def stock_pictures(folder: Path, lora: Path | None = None, guidance_scale: float = 7.5, steps: int = 5) -> torch.Tensor:
    pipe = stock_pipeline(folder)
    if hasattr(pipe, "unet"):
        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    if lora:
        pipe.load_lora_weights(lora)
    generators = [torch.Generator().manual_seed(seed) for seed in range(len(PROMPTS))]
    images = pipe(PROMPTS, num_inference_steps=steps, generator=generators, guidance_scale=guidance_scale,
                  output_type="pt").images  # fmt: skip
    return images


def trained(pipe, rank: int = 4, alpha: float | None = None):  # type: ignore[no-untyped-def]
    """A pipeline with an adapter that changes something: B is drawn instead of zero."""
    parameters = attach_lora(pipe, rank=rank, alpha=alpha)
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in parameters:
            parameter.copy_(torch.randn(parameter.shape, generator=g) * 0.3)
    return pipe


@every_family
def test_pictures_are_stock(folder: Make) -> None:
    ours = generate(load_pipeline(folder()), PROMPTS, seeds=range(3), steps=5)
    assert ours.std() > 0.05
    torch.testing.assert_close(ours, stock_pictures(folder()), rtol=0, atol=1e-4)


@pytest.mark.parametrize("scheduler", ["ddim", "pndm", "euler"])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("family", [stable_diffusion, stable_diffusion_xl])
def test_pictures_are_stock_whatever_the_folder_predicts(family: Callable[[str, str], Path], kind: str,
                                                         scheduler: str) -> None:  # fmt: skip
    folder = family(kind, scheduler)
    ours = generate(load_pipeline(folder), PROMPTS, seeds=range(3), steps=5)
    torch.testing.assert_close(ours, stock_pictures(folder), rtol=0, atol=1e-4)


def test_sdxl_without_guidance_and_with_a_negative_prompt_that_is_not_zeroed() -> None:
    for folder in (stable_diffusion_xl(), stable_diffusion_xl(zeros=False)):
        for scale in (1.0, 4.0):
            ours = generate(load_pipeline(folder), PROMPTS, seeds=range(3), steps=3, guidance_scale=scale)
            torch.testing.assert_close(ours, stock_pictures(folder, guidance_scale=scale, steps=3), rtol=0, atol=1e-4)
    kept, zeroed = (load_pipeline(stable_diffusion_xl(zeros=z)).encode_prompts(["", "a"]) for z in (False, True))
    for name, value in zeroed.items():
        assert value[0].count_nonzero() == 0 and kept[name][0].count_nonzero() > 0
        assert torch.equal(value[1], kept[name][1])


def test_sdxl_is_told_sizes_and_crops() -> None:
    pipe, stock = load_pipeline(stable_diffusion_xl()), stock_pipeline(stable_diffusion_xl())
    x, t = torch.randn(2, 4, 8, 16, generator=torch.Generator().manual_seed(0)), torch.tensor([10.0, 900.0])
    condition = pipe.encode_prompts(PROMPTS[:2])
    ids = stock._get_add_time_ids((32, 64), (0, 0), (32, 64), torch.float32, 24)
    plain = pipe.predict(x, t, condition)
    assert torch.equal(plain, pipe.predict(x, t, {**condition, "time_ids": ids.expand(2, 6)}))
    cropped = stock._get_add_time_ids((600, 400), (0, 8), (32, 64), torch.float32, 24)
    assert not torch.allclose(plain, pipe.predict(x, t, {**condition, "time_ids": cropped.expand(2, 6)}), atol=1e-4)


def test_sd3_times_are_the_shifted_stock_ones_and_process_inverts_them() -> None:
    pipe, stock = load_pipeline(stable_diffusion_3()), stock_pipeline(stable_diffusion_3())
    stock.scheduler.set_timesteps(7)
    assert torch.equal(pipe.times(7), stock.scheduler.sigmas)
    torch.testing.assert_close(pipe.process.network_time(pipe.times(7))[:-1], stock.scheduler.timesteps)
    assert pipe.process.shift == 3.0


def test_sd3_without_t5_reads_zeros_in_its_place() -> None:
    with_t5, without = (load_pipeline(stable_diffusion_3(t5=t5)).encode_prompts(PROMPTS) for t5 in (True, False))
    assert with_t5["prompt_embeds"].shape == without["prompt_embeds"].shape == (3, 77 + 256, 48)
    assert without["prompt_embeds"][:, 77:].count_nonzero() == 0 < with_t5["prompt_embeds"][:, 77:].count_nonzero()


def test_a_shorter_t5_is_that_of_the_stock_pipeline() -> None:
    stock, whole = stock_pipeline(stable_diffusion_3()), load_pipeline(stable_diffusion_3())
    pipe = load_pipeline(stable_diffusion_3(), max_sequence_length=20)
    with torch.no_grad():
        expected, _, pooled, _ = stock.encode_prompt(PROMPTS, None, None, do_classifier_free_guidance=False,
                                                     max_sequence_length=20)  # fmt: skip
    found = pipe.encode_prompts(PROMPTS)
    assert found["prompt_embeds"].shape == (3, 77 + 20, 48)
    assert torch.equal(found["prompt_embeds"], expected) and torch.equal(found["text_embeds"], pooled)
    assert pipe.fingerprint("text") != whole.fingerprint("text") and pipe.fingerprint("vae") == whole.fingerprint("vae")
    same = load_pipeline(stable_diffusion_3(), max_sequence_length=256)  # finds what earlier runs have cached
    assert same.fingerprint("text") == whole.fingerprint("text")


@pytest.mark.parametrize(
    ("folder", "length", "message"),
    [
        (stable_diffusion, 128, "max_sequence_length: expected a model with a T5 text encoder.*always have 77 tokens"),
        (stable_diffusion_xl, 77, "expected a model with a T5 text encoder, got .* of the family sdxl"),
        (stable_diffusion_3, 0, "max_sequence_length: expected 1 to 512 tokens of T5, got 0"),
        (stable_diffusion_3, 513, "expected 1 to 512 tokens of T5, got 513"),
    ],
)
def test_a_length_that_a_family_does_not_read_is_refused(folder: Make, length: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_pipeline(folder(), max_sequence_length=length)


@every_family
def test_a_picture_does_not_depend_on_the_batch(folder: Make) -> None:
    pipe = load_pipeline(folder())
    together = generate(pipe, PROMPTS, seeds=[5, 6, 7], steps=3, batch_size=3)
    alone = generate(pipe, PROMPTS, seeds=[5, 6, 7], steps=3, batch_size=1)
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)


@every_family
@pytest.mark.parametrize("alpha", [None, 8.0])
def test_stock_diffusers_reads_our_lora(folder: Make, tmp_path: Path, alpha: float | None) -> None:
    pipe = trained(load_pipeline(folder()), alpha=alpha)
    save_lora(pipe, tmp_path)
    ours = generate(pipe, PROMPTS, seeds=range(3), steps=5)
    plain = generate(load_pipeline(folder()), PROMPTS, seeds=range(3), steps=5)
    assert (ours - plain).abs().max() > 0.01  # the adapter does something
    torch.testing.assert_close(ours, stock_pictures(folder(), tmp_path), rtol=0, atol=1e-4)


@every_family
def test_lora_file_has_the_stock_keys(folder: Make, tmp_path: Path) -> None:
    file = save_lora(trained(load_pipeline(folder())), tmp_path)
    with safe_open(file, "pt") as stored:
        keys = list(stored.keys())
        assert all(stored.get_tensor(key).dtype == torch.float32 for key in keys)
        metadata = json.loads(stored.metadata()["lora_adapter_metadata"])
    prefix = load_pipeline(folder()).lora_prefix
    assert all(key.startswith(prefix + ".") and ".default." not in key for key in keys)
    assert {key.rsplit(".", 2)[1] for key in keys} == {"lora_A", "lora_B"}
    assert metadata[f"{prefix}.r"] == 4
    assert [f.name for f in tmp_path.iterdir()] == [WEIGHTS_NAME]


@pytest.mark.parametrize("folder", [FAMILIES["sd"], FAMILIES["sd3"]], ids=["unet", "transformer"])
def test_a_part_of_a_lora_is_that_with_its_second_factor_scaled(folder: Make, tmp_path: Path) -> None:
    save_lora(trained(load_pipeline(folder()), alpha=8.0), tmp_path)
    drawn = {}
    for scale in (0.0, 0.5, 1.0):
        pipe = load_pipeline(folder())
        load_lora(pipe, tmp_path, scale=scale)
        drawn[scale] = generate(pipe, PROMPTS[:1], seeds=[0], steps=2)
    with torch.no_grad():
        for name, parameter in pipe.network.named_parameters():
            if "lora_B" in name:
                parameter.mul_(0.5)
    torch.testing.assert_close(drawn[0.5], generate(pipe, PROMPTS[:1], seeds=[0], steps=2), rtol=0, atol=1e-5)
    plain = generate(load_pipeline(folder()), PROMPTS[:1], seeds=[0], steps=2)
    torch.testing.assert_close(drawn[0.0], plain, rtol=0, atol=1e-5)
    assert (drawn[1.0] - plain).abs().max() > 0.01
    with pytest.raises(ValueError, match="LoRA scale: expected a number of at least 0, got -1"):
        load_lora(load_pipeline(folder()), tmp_path, scale=-1)


@every_family
def test_lora_round_trip_is_exact(folder: Make, tmp_path: Path) -> None:
    pipe = trained(load_pipeline(folder()), alpha=8.0)
    save_lora(pipe, tmp_path)
    again = load_pipeline(folder())
    load_lora(again, tmp_path, trainable=True)
    assert {k: v.tolist() for k, v in lora_state(pipe).items()} == {k: v.tolist() for k, v in lora_state(again).items()}
    assert torch.equal(*[generate(p, PROMPTS[:1], seeds=[3], steps=2) for p in (pipe, again)])
    trainable = [n for n, p in again.network.named_parameters() if p.requires_grad]
    assert trainable and all("lora_" in name for name in trainable)


@every_family
def test_fresh_adapter_changes_nothing_and_alone_is_trainable(folder: Make) -> None:
    pipe = load_pipeline(folder())
    before = generate(pipe, PROMPTS[:1], seeds=[0], steps=2)
    parameters = attach_lora(pipe, rank=4)
    assert torch.equal(generate(pipe, PROMPTS[:1], seeds=[0], steps=2), before)
    assert {id(p) for p in pipe.network.parameters() if p.requires_grad} == {id(p) for p in parameters}
    assert all(p.dtype == torch.float32 for p in parameters)


def test_fresh_adapters_follow_their_seed_and_leave_the_global_generator_alone() -> None:
    path = stable_diffusion()  # the first that asks for it has it drawn from the global generator
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    states = []
    for seed in (0, 0, 1):
        pipe = load_pipeline(path)
        attach_lora(pipe, rank=2, seed=seed)
        states.append(torch.cat([v.flatten() for v in lora_state(pipe).values()]))
    assert torch.equal(states[0], states[1]) and not torch.equal(states[0], states[2])
    assert torch.equal(torch.rand(1), expected)


@every_family
def test_reference_is_the_base_and_adapters_come_back_after_an_exception(folder: Make) -> None:
    base, pipe = load_pipeline(folder()), trained(load_pipeline(folder()))
    x, t = torch.randn(2, *pipe.latent_shape(), generator=torch.Generator().manual_seed(0)), pipe.times(5)[1:3]
    condition = pipe.encode_prompts(PROMPTS[:2])
    with torch.no_grad():
        adapted = pipe.predict(x, t, condition)
        assert torch.equal(without_adapters(pipe)(x, t, condition), base.predict(x, t, condition))
        assert torch.equal(pipe.predict(x, t, condition), adapted)
        with pytest.raises(RuntimeError), adapters_disabled(pipe):
            raise RuntimeError
        assert torch.equal(pipe.predict(x, t, condition), adapted)


@every_family
def test_encode_and_decode_are_stock(folder: Make) -> None:
    pipe = load_pipeline(folder())
    stock = stock_pipeline(folder())
    pixels = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    mean, logvar = pipe.encode(pixels)
    scale = stock.vae.config.scaling_factor
    posterior = stock.vae.encode(pixels * 2 - 1).latent_dist
    shift = stock.vae.config.shift_factor or 0
    torch.testing.assert_close(mean, (posterior.mean - shift) * scale)
    torch.testing.assert_close((logvar / 2).exp(), posterior.std * scale)
    torch.testing.assert_close(pipe.decode(mean), stock.vae.decode(mean / scale + shift).sample / 2 + 0.5)
    latents = mean.clone().requires_grad_()
    pipe.decode(latents).sum().backward()
    assert latents.grad is not None and latents.grad.abs().sum() > 0


@every_family
def test_release_frees_and_says_so(folder: Make) -> None:
    pipe = load_pipeline(folder())
    pipe.release()
    with pytest.raises(ValueError, match="released"):
        pipe.encode_prompts(["a red circle"])


def test_fingerprint_changes_with_the_weights() -> None:
    pipe, same = (load_pipeline(stable_diffusion()) for _ in range(2))
    other = load_pipeline(stable_diffusion(seed=1))
    for part in ("vae", "text"):
        assert pipe.fingerprint(part) == same.fingerprint(part) != other.fingerprint(part)


def test_sizes_are_checked() -> None:
    pipe = load_pipeline(stable_diffusion())
    assert pipe.latent_shape() == (4, 8, 8) and pipe.latent_shape(64, 32) == (4, 16, 8)
    with pytest.raises(ValueError, match="multiples of 4"):
        pipe.latent_shape(33, 32)
    for family in FAMILIES.values():
        with pytest.raises(ValueError, match="1 to 1000 sampling steps"):
            load_pipeline(family()).times(0)
    flow = load_pipeline(stable_diffusion_3())
    assert flow.latent_shape(96, 40) == (16, 24, 10)
    for size in (36, 104):
        with pytest.raises(ValueError, match=f"multiples of 8, at most 96, got {size} x 32"):
            flow.latent_shape(size, 32)


def test_a_folder_that_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="model_index.json"):
        load_pipeline(tmp_path)
    (tmp_path / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    with pytest.raises(ValueError, match="expected a pipeline of StableDiffusionPipeline, .* got FluxPipeline"):
        load_pipeline(tmp_path)
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusionXLImg2ImgPipeline"}')
    with pytest.raises(ValueError, match=r"refiner, .* is not served; train the base .* method.time_high: 0.2"):
        load_pipeline(tmp_path)
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    with pytest.raises(ValueError, match="not complete"):
        load_pipeline(tmp_path)


def test_a_lora_that_is_none(tmp_path: Path) -> None:
    pipe = load_pipeline(stable_diffusion())
    with pytest.raises(ValueError, match=WEIGHTS_NAME):
        load_lora(pipe, tmp_path)
    (tmp_path / WEIGHTS_NAME).write_bytes(b"not a safetensors file")
    with pytest.raises(ValueError, match="not a LoRA"):
        load_lora(pipe, tmp_path)


def test_targets_that_match_nothing_are_named() -> None:
    with pytest.raises(ValueError, match=r"lora.targets \['to_x'\]"):
        attach_lora(load_pipeline(stable_diffusion()), targets=["to_x"])


def test_a_prompt_that_is_too_long_is_cut_and_said(caplog: pytest.LogCaptureFixture) -> None:
    pipe = load_pipeline(stable_diffusion())
    embeds = pipe.encode_prompts(["a red circle", "red " * 100])["prompt_embeds"]
    assert embeds.shape == (2, 77, 16)
    assert "1 of 2 prompts are longer than the text encoder reads (77 tokens)" in caplog.text
