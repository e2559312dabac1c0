"""Pictures or clips from prompts: the sampler core with guidance, one generator per picture."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffalign.data.clips import contact_sheet, write_clip
from diffalign.pages import write_html
from diffalign.pipelines.base import LatentPipeline
from diffalign.pipelines.user_attention import for_nobody, with_user
from diffalign.sampling import Condition, as_stock, ddim_stepper, draw, guided, sample
from diffalign.writing import replacing

SHEETS = "sheets"  # folder beside clips, of their frames side by side
SHEET = 9  # frames on a sheet
PAGE = "index.html"


@dataclass(frozen=True)
class Canvas:
    """What is drawn on; None is the model's own. `frames` are of clips, which are shown at `fps`.

    Raises:
        ValueError: an `fps` that nothing plays.
    """

    height: int | None = None
    width: int | None = None
    frames: int | None = None
    fps: float = 16.0

    def __post_init__(self) -> None:
        if not 0 < self.fps <= 240:
            raise ValueError(f"fps: expected frames a second above 0 and at most 240, got {self.fps}")

    def latent_shape(self, pipe: LatentPipeline) -> tuple[int, ...]:
        """Of one picture or clip; raises ValueError for a size that the model cannot draw."""
        return pipe.latent_shape(self.height, self.width, self.frames)


OWN_SIZE = Canvas()


@torch.no_grad()
def generate(
    pipe: LatentPipeline,
    prompts: Sequence[str],
    *,
    seeds: Sequence[int],
    steps: int = 20,
    guidance_scale: float = 7.5,
    batch_size: int = 16,
    canvas: Canvas = OWN_SIZE,
    user: Tensor | None = None,
    progress: Callable[[int], None] | None = None,
) -> Tensor:
    """Pixels [N, 3, H, W], of clips [N, F, 3, H, W], in [0, 1], fp32 on the CPU, for N prompts and as many seeds.

    A picture follows from its prompt and its seed alone, as from the stock pipeline with
    `generator=torch.Generator("cpu").manual_seed(seed)` and a DDIM scheduler; as there, a guidance of 1 or less is
    none. `progress` is told of finished pictures.

    Args:
        canvas: the size; the model's own if not given.
        user: tokens [N, D] of whom it draws for, or [pictures, N, D], by a user adapter (`load_user_adapter`). Guidance
            leads away from the empty prompt for nobody, so it strengthens both the prompt and the user.

    Raises:
        ValueError: no prompt, another number of seeds than prompts, or a size that the model cannot draw.
    """
    if not prompts or len(prompts) != len(seeds):
        raise ValueError(f"expected at least one prompt and one seed per prompt, got {len(prompts)} and {len(seeds)}")
    shape, times = canvas.latent_shape(pipe), pipe.times(steps)
    parts = []
    for start in range(0, len(prompts), batch_size):
        some, some_seeds = prompts[start : start + batch_size], seeds[start : start + batch_size]
        noise = draw(shape, [torch.Generator().manual_seed(seed) for seed in some_seeds])
        own = user if user is None or user.ndim == 2 else user[start : start + batch_size]
        condition = with_user(pipe.encode_prompts(some), own)
        negative = for_nobody(pipe.encode_prompts([""] * len(some)), own)
        latents = sample_latents(pipe, condition, negative, noise, times, guidance_scale)
        parts.append(pipe.decode(latents).clamp(0, 1).cpu())
        if progress:
            progress(len(some))
    return torch.cat(parts)


@torch.no_grad()
def sample_latents(
    pipe: LatentPipeline, condition: Condition, negative: Condition, noise: Tensor, times: Tensor, guidance_scale: float
) -> Tensor:
    """Latents [B, C, ...] from starting noise of the same shape, by guided DDIM along `times`."""
    device = next(pipe.network.parameters()).device
    here, away = ({name: value.to(device) for name, value in c.items()} for c in (condition, negative))
    policy = guided(pipe.predict, away, as_stock(guidance_scale))
    step = ddim_stepper(policy, pipe.process, pipe.parametrization, here)
    return sample(step, noise.to(device), times.to(device)).x


@dataclass(frozen=True)
class Player:
    """A clip on a page: its file from there, whose sheet lies in sheets/ beside it, and what is said below."""

    file: str
    caption: str

    @property
    def sheet(self) -> str:
        path = Path(self.file)
        return str(path.parent / SHEETS / f"{path.stem}.png")


def save(drawn: Sequence[Image.Image] | Tensor, files: Sequence[Path], fps: float) -> None:
    """Pictures, or clips uint8 [B, F, 3, H, W] with their sheets, as files."""
    for shown, file in zip(drawn, files, strict=True):
        if not isinstance(shown, Tensor):
            shown.save(file)
            continue
        frames = shown.permute(0, 2, 3, 1).numpy()
        with replacing(file) as partial:
            write_clip(frames, partial, fps)
        (file.parent / SHEETS).mkdir(exist_ok=True)
        taken = np.linspace(0, len(frames) - 1, min(SHEET, len(frames))).round().astype(int)
        contact_sheet(frames[taken], columns=SHEET).save(file.parent / SHEETS / f"{file.stem}.png")


def write_players(page: Path, title: str, groups: Sequence[tuple[str, Sequence[Player]]]) -> None:
    """A page that plays the clips of each prompt side by side."""
    write_html(page, "clips.html.j2", title=title, groups=groups)
