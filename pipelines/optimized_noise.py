"""Noise optimization where code expects a diffusers pipeline: `pipe(prompt, rewards=...)`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import BaseOutput

from diffalign.noise.driver import optimize_noise
from diffalign.noise.result import NoiseResult
from diffalign.pipelines import as_pipeline, load_pipeline

OUTPUTS = ("pil", "np", "pt")


@dataclass
class OptimizedNoiseOutput(BaseOutput):  # type: ignore[misc]  # diffusers has no annotations
    """`images` as asked for (PIL, [N, H, W, 3] or [N, 3, H, W] in [0, 1]), and the whole result."""

    images: Any
    result: NoiseResult


class OptimizedNoisePipeline(DiffusionPipeline):  # type: ignore[misc]
    """A stock pipeline of a family that is served, whose call looks for better noise before it draws.

    Its parts are the stock pipeline's own (`pipe.unet`, `pipe.components`, `pipe.to(...)`); `pipe.stock` draws without,
    and is where diffusers' ways to save memory are to be switched on.

        pipe = OptimizedNoisePipeline(StableDiffusionPipeline.from_pretrained("stabilityai/sd-turbo"))
        image = pipe("a red circle", rewards={"pickscore": 1.0}, num_inference_steps=1).images[0]

    Raises:
        ValueError: a pipeline of another family.
    """

    def __init__(self, stock: DiffusionPipeline) -> None:
        super().__init__()
        self._ours, self.stock = as_pipeline(stock), stock

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or "stock" not in vars(self):  # while it is being made
            return super().__getattr__(name)
        return getattr(self.stock, name)

    @property
    def components(self) -> dict[str, Any]:
        """Those of the stock pipeline."""
        parts: dict[str, Any] = self.stock.components
        return parts

    @property
    def device(self) -> torch.device:
        """Where the stock pipeline is."""
        place: torch.device = self.stock.device
        return place

    def to(self, *args: Any, **keywords: Any) -> Self:
        """As the stock pipeline's."""
        self.stock.to(*args, **keywords)
        return self

    def save_pretrained(self, folder: str, **keywords: Any) -> None:
        """Writes the stock pipeline."""
        self.stock.save_pretrained(folder, **keywords)

    @classmethod
    def from_pretrained(cls, folder: str, dtype: torch.dtype = torch.float32, **keywords: Any) -> Self:
        """Of a folder or a hub id, as `load_pipeline` has it; keywords are its."""
        return cls(load_pipeline(folder, dtype=dtype, **keywords).stock)

    def __call__(
        self,
        prompt: str | Sequence[str],
        rewards: Any,
        *,
        num_inference_steps: int = 1,
        guidance_scale: float = 1.0,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        **options: Any,
    ) -> OptimizedNoiseOutput | tuple[Any, NoiseResult]:
        """The best picture of each prompt.

        Args:
            rewards: as in `diffalign.optimize_noise`.
            num_inference_steps, guidance_scale: of each picture; the defaults are for distilled models.
            num_images_per_prompt: each with noise of its own; they follow each other, prompt by prompt.
            generator: one per picture, or one whose seed is that of the first, from which the next ones count up. Seeds
                are taken from them, and their states stay as they are.
            output_type: pil | np | pt.
            options: `method`, `steps`, and all others of `diffalign.optimize_noise`.

        Raises:
            ValueError: as `diffalign.optimize_noise`, or another output type.
        """
        if output_type not in OUTPUTS:
            raise ValueError(f"output_type: expected one of {', '.join(OUTPUTS)}, got {output_type!r}")
        if num_images_per_prompt < 1:
            raise ValueError(f"num_images_per_prompt: expected at least 1, got {num_images_per_prompt}")
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        texts = [text for text in prompts for _ in range(num_images_per_prompt)]
        how = {"sampling_steps": num_inference_steps, "guidance_scale": guidance_scale, **options}
        result = optimize_noise(self._ours, texts, rewards, seed=seeds_of(generator), **how)
        pixels = result.best.pixels
        images = {"pil": lambda: result.images, "np": lambda: pixels.permute(0, 2, 3, 1).numpy(), "pt": lambda: pixels}
        found = images[output_type]()
        return OptimizedNoiseOutput(images=found, result=result) if return_dict else (found, result)


def seeds_of(generator: torch.Generator | Sequence[torch.Generator] | None) -> int | list[int]:
    """Without generators a seed that nobody knows, as stock pipelines do it."""
    if generator is None:
        return int(torch.randint(2**31, (1,)))
    if isinstance(generator, torch.Generator):
        return generator.initial_seed()
    return [one.initial_seed() for one in generator]
