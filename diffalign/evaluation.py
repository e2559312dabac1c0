"""A model against the same model with a LoRA, on the same prompts and seeds; and scores of pictures that exist.

Scores are of the 8-bit pictures that are saved, by each reward's exact recipe, never of training's floats.
"""

from __future__ import annotations

import contextlib
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from diffalign.data.images import open_as_stored
from diffalign.drawn import FPS, PAGE, Player, refuse_unplayable, save, write_players
from diffalign.fitting import Fitted, batch_size_for, side_of
from diffalign.gains import Scores, summary
from diffalign.generation import generate
from diffalign.pipelines.base import LatentPipeline
from diffalign.pipelines.lora import adapters_disabled, load_lora
from diffalign.pipelines.user_adapter import load_user_adapter, remove_user_adapter
from diffalign.prompts import Prompt
from diffalign.rewards.base import Images, Reward, Weighted, each_prompt
from diffalign.rewards.preprocess import as_shown
from diffalign.scoring.batch import batches
from diffalign.writing import replacing_folder, write_json

ADAPTER = "evaluated"
REPORT = "evaluation.json"
SUM = "weighted"  # the row of a weighted sum beside its terms


@dataclass(frozen=True)
class Draw:
    """One picture to be made: a prompt with a seed."""

    prompt: Prompt
    seed: int


def evaluate(
    pipe: LatentPipeline,
    prompts: Sequence[Prompt | str],
    rewards: Reward,
    *,
    lora: str | Path | None = None,
    lora_scale: float = 1.0,
    user_adapter: str | Path | None = None,
    user: torch.Tensor | None = None,
    seeds_per_prompt: int = 1,
    steps: int = 20,
    guidance_scale: float = 7.5,
    batch_size: int = 16,
    seed: int = 0,
    height: int | None = None,
    width: int | None = None,
    num_frames: int | None = None,
    fps: float = FPS,
    out: str | Path | None = None,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Scores a model without adapters, and with `lora` also the model with that, on the same prompts and seeds.

    The report has `rewards` (name -> base, aligned, gain, win_rate, each with its 95 % interval beside it as *_ci95)
    and the same per category in `per_category`. Intervals are over rows of `prompts`: the seeds of one are averaged
    first. An interval of a single prompt is [None, None]. `missing` counts prompts without a score, which are left out.

    Args:
        prompts: with a category, where the report is to have one.
        rewards: one reward, or a `Weighted`, of which every term and the sum are reported.
        lora: file or folder of a LoRA; without it only the base is scored. It is taken off again at the end.
        lora_scale: how much of it acts, at least 0.
        user_adapter, user: file or folder of a user adapter, and the tokens [N, D] of whom the aligned side draws for;
            alone or beside a LoRA.
        seed: draw s of prompt i has the seed `seed + i * seeds_per_prompt + s`.
        height, width, num_frames: of each picture or clip; the model's own where not given.
        fps: at which clips are saved.
        out: folder for evaluation.json and the pictures (base/00000.png, aligned/00000.png, in the order of the draws;
            clips are .mp4, and index.html plays them side by side), written in one piece at the end; it must be new or
            empty.
        progress: told of finished draws.

    Raises:
        ValueError: no prompt, a count below 1, a folder that holds something, or a LoRA or prompt that does not fit.
    """
    draws = _draws(prompts, seeds_per_prompt, seed)
    if batch_size < 1:
        raise ValueError(f"expected a batch_size of at least 1, got {batch_size}")
    if (user_adapter is None) != (user is None):
        raise ValueError("user_adapter and user go together: whom to draw for, and the adapter that knows how")
    refuse_unplayable(fps)
    how: dict[str, Any] = {
        "steps": steps,
        "guidance_scale": guidance_scale,
        "height": height,
        "width": width,
        "num_frames": num_frames,
    }
    texts = [draw.prompt.text for draw in draws]
    scores: dict[str, Scores] = defaultdict(lambda: defaultdict(lambda: [math.nan] * len(draws)))
    with _new_folder(out) as folder, _attached(pipe, lora, lora_scale), _told(pipe, user_adapter):
        for batch in batches(texts, batch_size, rewards.card.compares):
            some = [draws[index] for index in batch]
            for side, off in _sides(pipe, aligned=lora is not None or user is not None):
                with off:
                    pictures = _pictures(pipe, some, how, batch_size, user)
                _save(pictures, folder, side, batch, fps)
                _enter(scores[side], batch, _score(rewards, pictures, [texts[index] for index in batch]))
            if progress:
                progress(len(some))
        settings = {
            "model": str(pipe.name),
            "lora": None if lora is None else str(lora),
            "lora_scale": lora_scale,
            "user_adapter": None if user_adapter is None else str(user_adapter),
            "prompts": len(prompts),
            "seeds_per_prompt": seeds_per_prompt,
            "draws": len(draws),
            "seed": seed,
            **how,
        }
        report = settings | summary(scores, [draw.prompt for draw in draws], seeds_per_prompt, seed)
        if folder:
            write_json(folder / REPORT, report, allow_nan=False)
            if pipe.clips:
                write_players(folder / PAGE, f"{pipe.name}, {lora or 'alone'}", _players(draws, folder))
    return report


def score_images(
    rewards: Reward,
    images: Sequence[Image.Image | str | Path],
    prompts: Sequence[str],
    *,
    batch_size: int | None = None,
    device: torch.device | str = "cpu",
    progress: Callable[[int], None] | None = None,
) -> Scores:
    """Scores of pictures, given as PIL or as files: reward -> one score per picture; every term of a `Weighted`.

    Pictures of one prompt are in one batch, whatever its size, where a reward compares them (`Card.compares`).

    Args:
        prompts: one per picture, or a single one for all.
        batch_size: pictures at once; None for as many as `device` holds by an estimate. Where the memory runs out it
            is halved, and the batch is done again.
        device: where the rewards are; only read to choose a batch size.

    Raises:
        ValueError: counts that differ, no picture, a file that is not a whole picture (named), a batch size below 1, or
            a picture that alone does not fit the memory.
    """
    if not images:
        raise ValueError("expected at least one picture, got none")
    prompts = each_prompt(prompts, len(images))
    compares = rewards.card.compares
    size = batch_size_for(side_of(rewards), device) if batch_size is None else batch_size
    scores: Scores = defaultdict(lambda: [math.nan] * len(images))

    def score(some: Sequence[int]) -> list[int]:
        pictures = [_opened(images[index]) for index in some]
        _enter(scores, some, _score(rewards, pictures, [prompts[index] for index in some]))
        return list(some)

    fitted = Fitted(score, divisible=not compares)
    for batch in batches(prompts, size, compares):
        done = fitted(batch)
        if progress:
            progress(len(done))
    return dict(scores)


def open_picture(path: str | Path) -> Image.Image:
    """The picture of a file, read to its end; of an animation the first frame.

    Raises:
        ValueError: missing, truncated, too large or not a picture.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: expected a whole picture, could not read it: {error.strerror}") from error
    return open_as_stored(data, str(path))


def _draws(prompts: Sequence[Prompt | str], seeds_per_prompt: int, seed: int) -> list[Draw]:
    if isinstance(prompts, str) or not prompts:
        raise ValueError(f"expected a list of at least one prompt, got {prompts!r}; read a file with read_prompts")
    if seeds_per_prompt < 1 or seed < 0:
        raise ValueError(f"expected at least one seed per prompt, from 0 on, got {seeds_per_prompt} from {seed} on")
    rows = [prompt if isinstance(prompt, Prompt) else Prompt(prompt) for prompt in prompts]
    repeated = [row for row in rows for _ in range(seeds_per_prompt)]
    return [Draw(row, seed + number) for number, row in enumerate(repeated)]


@contextlib.contextmanager
def _attached(pipe: LatentPipeline, lora: str | Path | None, scale: float) -> Iterator[None]:
    if lora is None:
        yield
        return
    load_lora(pipe, lora, adapter=ADAPTER, scale=scale)
    try:
        yield
    finally:
        network: Any = pipe.network
        network.delete_adapters(ADAPTER)


@contextlib.contextmanager
def _told(pipe: LatentPipeline, user_adapter: str | Path | None) -> Iterator[None]:
    if user_adapter is None:
        yield
        return
    load_user_adapter(pipe, user_adapter)
    try:
        yield
    finally:
        remove_user_adapter(pipe)


def _sides(pipe: LatentPipeline, aligned: bool) -> list[tuple[str, contextlib.AbstractContextManager[None]]]:
    if not aligned:
        return [("base", contextlib.nullcontext())]
    return [("base", adapters_disabled(pipe)), ("aligned", contextlib.nullcontext())]


def _pictures(
    pipe: LatentPipeline, draws: Sequence[Draw], how: Mapping[str, Any], batch_size: int, user: torch.Tensor | None
) -> Images:
    prompts, seeds = [draw.prompt.text for draw in draws], [draw.seed for draw in draws]
    pixels = generate(pipe, prompts, seeds=seeds, batch_size=batch_size, user=user, **how)
    return as_shown(pixels)


def _score(rewards: Reward, pictures: Images, prompts: Sequence[str]) -> Scores:
    total = rewards(pictures, prompts).tolist()
    if not isinstance(rewards, Weighted):
        return {rewards.name: total}
    terms = {name: term.tolist() for name, term in rewards.terms.items()}
    return terms if len(terms) == 1 else terms | {SUM: total}


def _enter(scores: Scores, places: Sequence[int], more: Scores) -> None:
    for name, values in more.items():
        for place, value in zip(places, values, strict=True):
            scores[name][place] = value


def _opened(image: Image.Image | str | Path) -> Image.Image:
    return image if isinstance(image, Image.Image) else open_picture(image)


@contextlib.contextmanager
def _new_folder(out: str | Path | None) -> Iterator[Path | None]:
    """A temporary folder beside `out` that takes its name if the block succeeds and is gone if it does not."""
    if out is None:
        yield None
        return
    out = Path(out)
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise ValueError(f"{out}: expected a new or empty folder; it holds something already, choose another --out")
    with replacing_folder(out) as partial:
        yield partial


def _save(pictures: Images, folder: Path | None, side: str, numbers: Sequence[int], fps: float) -> None:
    if folder is None:
        return
    (folder / side).mkdir(exist_ok=True)
    suffix = "mp4" if isinstance(pictures, torch.Tensor) else "png"
    save(pictures, [folder / side / f"{number:05d}.{suffix}" for number in numbers], fps)


def _players(draws: Sequence[Draw], folder: Path) -> list[tuple[str, list[Player]]]:
    sides = [side for side in ("base", "aligned") if (folder / side).is_dir()]
    return [(draw.prompt.text, [Player(f"{side}/{number:05d}.mp4", f"seed {draw.seed}") for side in sides])
            for number, draw in enumerate(draws)]  # fmt: skip
