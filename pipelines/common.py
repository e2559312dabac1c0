"""Steps that several families share: loading, VAE moments, DDIM times, hashes. Functions that know no family."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import CogVideoXDDIMScheduler, DDIMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.utils import logging as diffusers_logging
from safetensors import SafetensorError
from torch import Tensor

from diffalign.pipelines.parts import damaged_files, rest_of
from diffalign.process import CLEAN, VariancePreserving

log = logging.getLogger("diffalign")

CLIP_TOKENS = 77  # what CLIP's text encoders are given, whatever the prompt
T5_TOKENS = 256  # what Stable Diffusion 3's is given unless `max_sequence_length` says otherwise; the stock default

# what diffusers and transformers raise on files that are cut off, or weights that are not those of the config
UNREADABLE = (OSError, ValueError, TypeError, RuntimeError, AttributeError, KeyError, SafetensorError)


def load_stock(kind: Any, folder: str, **options: Any) -> Any:
    """`kind.from_pretrained`, whose many ways to fail become one.

    A folder may hold some parts alone, see `diffalign.pipelines.parts.rest_of`.

    Raises:
        ValueError: the folder is not complete or not readable.
    """
    try:
        rest, own = _parts_of_its_own(folder, options.get("dtype"))
        stock = kind.from_pretrained(rest, **own, **options)
    except UNREADABLE as error:
        why = "; ".join(damaged_files(folder)) or " ".join(str(error).split())[:300]
        raise ValueError(f"{folder}: the model folder is not complete or not readable: {why}; download or save it "
                         f"again") from error  # fmt: skip
    for part, module in stock.components.items():  # what a file lacks stays without a value
        empty = [n for n, p in module.named_parameters() if p.is_meta] if isinstance(module, torch.nn.Module) else []
        if empty:
            raise ValueError(f"{folder}: the model folder is not complete: the file of {part} lacks {len(empty)} "
                             f"weights, such as {empty[0]}; download or save it again")  # fmt: skip
    return stock


def _parts_of_its_own(folder: str, dtype: torch.dtype | None) -> tuple[str, dict[str, Any]]:
    """(the folder of the rest, parts by name); of an ordinary folder or a hub id itself and none."""
    file = Path(folder) / "model_index.json"
    index = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if (rest := rest_of(folder, index)) is None:
        return folder, {}
    classes = {name: getattr(diffusers, value[1]) for name, value in index.items() if isinstance(value, list)}
    typed = {"dtype": dtype} if dtype else {}
    own = {name: part.from_pretrained(folder, subfolder=name, **({} if name == "scheduler" else typed))
           for name, part in classes.items()}  # fmt: skip
    return rest, own


def vae_moments(vae: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """(mean, log-variance) of the scaled latents: z = (code - shift) * scale."""
    x = pixels.to(vae.device, vae.dtype) * 2 - 1
    with own_dtype(vae):
        posterior = vae.encode(x).latent_dist
    scale, shift = vae.config.scaling_factor, vae.config.get("shift_factor") or 0.0
    mean = (posterior.mean.float() - shift) * scale
    logvar = posterior.logvar.float() + 2 * torch.tensor(float(scale)).log().item()
    return mean, logvar


def vae_decode(vae: Any, latents: Tensor) -> Tensor:
    """Pixels around [0, 1], fp32, differentiable."""
    scale, shift = vae.config.scaling_factor, vae.config.get("shift_factor") or 0.0
    code = latents.float() / scale + shift
    with own_dtype(vae):
        return vae.decode(code.to(vae.dtype)).sample.float() / 2 + 0.5


def own_dtype(vae: Any) -> torch.autocast:
    """Training may autocast to fp16 around it, in which a VAE that is held in fp32 for its range would overflow."""
    return torch.autocast(vae.device.type, enabled=False)


def variance_preserving(config: dict[str, Any]) -> tuple[VariancePreserving, DDIMScheduler]:
    """The process and the stock DDIM scheduler of a checkpoint, whatever scheduler its folder names (PNDM, Euler ...).

    set_alpha_to_one=False and steps_offset come from the folder; a folder without them gets diffusers' defaults.
    """
    scheduler = DDIMScheduler.from_config(config, clip_sample=False)
    alphas = scheduler.alphas_cumprod.float()
    return VariancePreserving(alphas, float(scheduler.final_alpha_cumprod)), scheduler


def ddim_times(scheduler: DDIMScheduler | CogVideoXDDIMScheduler, steps: int) -> Tensor:
    """[steps + 1]: the stock scheduler's own times, then `CLEAN`.

    Raises:
        ValueError: more steps than the model has training times, or fewer than one.
    """
    _set_timesteps(scheduler, steps)
    return torch.cat([scheduler.timesteps.float(), torch.tensor([CLEAN])])


def _set_timesteps(scheduler: Any, steps: int) -> None:
    total = scheduler.config.num_train_timesteps
    if not 1 <= steps <= total:
        raise ValueError(f"expected 1 to {total} sampling steps, got {steps}")
    scheduler.set_timesteps(steps)


def flow_times(scheduler: FlowMatchEulerDiscreteScheduler, steps: int) -> Tensor:
    """[steps + 1]: the stock scheduler's own sigmas, the last one 0.

    Raises:
        ValueError: more steps than the model has training times, or fewer than one.
    """
    _set_timesteps(scheduler, steps)
    return scheduler.sigmas.float().cpu()


def warn_of_long_prompts(tokenizer: Any, prompts: Sequence[str], limit: int) -> None:
    """One line for all prompts that the text encoder does not read to their end."""
    tokens = tokenizer(list(prompts), truncation=False, add_special_tokens=True, verbose=False).input_ids
    if long := [text for text, ids in zip(prompts, tokens, strict=True) if len(ids) > limit]:
        log.warning("%d of %d prompts are longer than the text encoder reads (%d tokens) and are cut, such as %r",
                    len(long), len(prompts), limit, long[0][:80])  # fmt: skip


def clip_embeds(stock: Any, prompts: Sequence[str]) -> Tensor:
    """fp32 [B, 77, width]: the last layer of a stock pipeline's only text encoder, a CLIP."""
    tokenizer, encoder = stock.tokenizer, stock.text_encoder
    limit = tokenizer.model_max_length
    warn_of_long_prompts(tokenizer, prompts, limit)
    ids = tokenizer(list(prompts), padding="max_length", max_length=limit, truncation=True, return_tensors="pt")
    return encoder(ids.input_ids.to(encoder.device)).last_hidden_state.float()


def t5_embeds(stock: Any, prompts: Sequence[str], tokens: int) -> Tensor:
    """fp32 [B, tokens, width], as a stock pipeline encodes prompts whose only text encoder is a T5."""
    warn_of_long_prompts(stock.tokenizer, prompts, tokens)
    with stock_warnings_off():
        embeds, _ = stock.encode_prompt(list(prompts), do_classifier_free_guidance=False,
                                        device=stock.text_encoder.device, max_sequence_length=tokens)  # fmt: skip
    return embeds.float()


@contextlib.contextmanager
def stock_warnings_off() -> Iterator[None]:
    """While a stock method runs that would warn once per prompt of what has been said in one line."""
    before = diffusers_logging.get_verbosity()
    diffusers_logging.set_verbosity_error()
    try:
        yield
    finally:
        diffusers_logging.set_verbosity(before)


def text_parts(stock: Any) -> tuple[list[torch.nn.Module], dict[str, Any]]:
    """The text encoders of a stock pipeline, and the settings that its embeddings depend on beside their weights."""
    parts = sorted(stock.components.items())
    encoders = [part for name, part in parts if name.startswith("text_encoder") and part is not None]
    tokenizers = {name: part for name, part in parts if name.startswith("tokenizer") and part is not None}
    settings = {n: {"vocabulary": t.get_vocab(), "length": t.model_max_length} for n, t in tokenizers.items()}
    # the zeroed unconditional embedding of SDXL
    return encoders, {**settings, "zeros": stock.config.get("force_zeros_for_empty_prompt")}


def fingerprint(modules: Sequence[torch.nn.Module], settings: dict[str, Any]) -> str:
    """Hash of weights and settings; the same in fp16 and fp32 only if the weights are."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    for module in modules:
        digest.update(type(module).__name__.encode())
        for name, value in sorted(module.state_dict().items()):
            digest.update(f"{name} {value.dtype} {list(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:32]
