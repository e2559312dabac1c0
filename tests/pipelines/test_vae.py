"""The VAE in 16 bits: SDXL's own overflows in fp16, a repaired one does not; training's autocast changes neither."""

from __future__ import annotations

import functools
import json
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
import toy_pairs
from diffusers import AutoencoderKL
from miniatures import stable_diffusion_xl
from safetensors.torch import load_file, save_file

from diffalign.cache import Cache
from diffalign.data.examples import load_examples
from diffalign.pipelines import load_pipeline

PIXELS = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@functools.cache
def overflowing(force_upcast: bool) -> Path:
    """An SDXL whose VAE has activations of about 1e5, behind which a norm makes them ordinary: fine but for fp16."""
    folder = Path(tempfile.mkdtemp(prefix="diffalign-overflow-")) / "model"
    shutil.copytree(stable_diffusion_xl(), folder)
    weights = folder / "vae" / "diffusion_pytorch_model.safetensors"
    state = load_file(weights)
    for part in ("encoder", "decoder"):
        state[f"{part}.conv_in.weight"] *= 3e5
    save_file(state, weights, {"format": "pt"})
    config = json.loads((folder / "vae" / "config.json").read_text())
    (folder / "vae" / "config.json").write_text(json.dumps(config | {"force_upcast": force_upcast}))
    return folder


@torch.no_grad()
def round_trip(folder: Path, dtype: torch.dtype) -> torch.Tensor:
    pipe = load_pipeline(folder, dtype=dtype)
    mean, logvar = pipe.encode(PIXELS)
    assert mean.dtype == logvar.dtype == torch.float32
    return pipe.decode(mean)


def test_the_miniature_overflows_in_fp16_and_only_there() -> None:
    vae = AutoencoderKL.from_pretrained(overflowing(True), subfolder="vae", torch_dtype=torch.float16)
    with torch.no_grad():
        assert not vae.encode(PIXELS.half()).latent_dist.mean.isfinite().all()
        assert vae.to(torch.bfloat16).encode(PIXELS.bfloat16()).latent_dist.mean.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_latents_and_pictures_are_finite_in_every_dtype(dtype: torch.dtype) -> None:
    found, exact = round_trip(overflowing(True), dtype), round_trip(overflowing(True), torch.float32)
    assert found.dtype == torch.float32
    # fp16 weights are rounded, and then computed with in fp32; bf16 has 8 bits
    torch.testing.assert_close(found, exact, rtol=0, atol=0.3 if dtype == torch.bfloat16 else 5e-3)


@pytest.mark.parametrize(
    ("force_upcast", "dtype", "kept", "said"),
    [
        (True, torch.float16, torch.float32, "works in fp32, because its config says force_upcast: true"),
        (False, torch.float16, torch.float16, "works in fp16, because its config says force_upcast: false"),
        (True, torch.bfloat16, torch.bfloat16, ""),
        (True, torch.float32, torch.float32, ""),
    ],
)
def test_what_was_decided_is_in_the_log(
    force_upcast: bool, dtype: torch.dtype, kept: torch.dtype, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", logger="diffalign"):
        stock = load_pipeline(overflowing(force_upcast), dtype=dtype).stock
    assert (stock.vae.dtype, stock.unet.dtype) == (kept, dtype)
    assert said in caplog.text and bool(said) == ("the VAE works in" in caplog.text)


@pytest.mark.parametrize("amp", [torch.float16, torch.bfloat16])
def test_autocast_around_it_does_not_reach_into_the_vae(amp: torch.dtype) -> None:
    """Validation pictures are drawn inside the trainer's autocast."""
    pipe = load_pipeline(overflowing(True), dtype=torch.float16)
    with torch.no_grad():
        mean, logvar = pipe.encode(PIXELS)
        picture, decode = pipe.decode(mean), pipe.decoder()
        with torch.autocast("cpu", dtype=amp):
            assert all(map(torch.equal, pipe.encode(PIXELS), (mean, logvar)))
            assert torch.equal(pipe.decode(mean), picture) and torch.equal(decode(mean), picture)
    assert picture.isfinite().all()


def test_a_latent_that_is_not_finite_never_enters_the_cache(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    pairs = load_examples({**toy_pairs.write("pickapic", tmp_path / "data", 4), "val_fraction": 0}, 32).train
    pipe = load_pipeline(overflowing(False), dtype=torch.float16)
    cache = Cache(tmp_path / "cache", pipe)
    with pytest.raises(ValueError, match=r"latents that are not finite .* set mixed_precision: bf16"):
        cache.fill(pipe, pairs, [""], 2, lambda *_: None)
    assert not list((tmp_path / "cache").glob("latents-*/*.safetensors"))
