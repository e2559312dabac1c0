"""What noise optimization leaves: pictures, their noise, and how it went, in memory and as files."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffalign.rewards.preprocess import to_pictures
from diffalign.writing import replacing_folder, write_json

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NOISE, REPORT = "noise.safetensors", "noise.json"


@dataclass(frozen=True)
class Found:
    """One picture of each of B prompts, on the CPU.

    Attributes:
        noise: fp32 [B, C, h, w]: give it to a stock pipeline as `latents`, in the dtype of its network. Of methods that
            steer a random walk it is [B, N + 1, ...], with the noise of each of the N steps.
        pixels: fp32 [B, 3, H, W] in [0, 1].
        total: [B], the weighted sum of rewards.
        terms: each reward by name, [B], unweighted.
        iteration: [B] where in `history` it was seen.
    """

    noise: Tensor
    pixels: Tensor
    total: Tensor
    terms: Mapping[str, Tensor]
    iteration: Tensor

    @property
    def images(self) -> list[Image.Image]:
        """As 8-bit pictures."""
        return to_pictures(self.pixels)

    def row(self, number: int) -> Found:
        """Of one prompt."""
        one = slice(number, number + 1)
        terms = {name: term[one] for name, term in self.terms.items()}
        return Found(self.noise[one], self.pixels[one], self.total[one], terms, self.iteration[one])


@dataclass(frozen=True)
class NoiseResult:
    """Of B prompts.

    Attributes:
        prompts, seeds: B of each.
        best: of each prompt the picture with the largest total, not counting a regularizer.
        first: the first look; of reno, best_of_n and zero_order it is the plain picture of the seed.
        last: what was looked at last.
        history: a dict per look: `total`, each reward by name and `norm` (of the noise; of a chain the root mean square
            over its parts), each [B]; and `ends`, false for looks ahead in the middle of a walk, which no picture is.
        evaluations: forward passes of the network for each prompt, guidance and recomputation counted.
        seconds: `setup`, `search` and `final`.
        settings: the call's.
        interrupted: whether it was stopped before its end.
    """

    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    best: Found
    first: Found
    last: Found
    history: tuple[dict[str, Any], ...]
    evaluations: float
    seconds: Mapping[str, float]
    settings: Mapping[str, Any]
    interrupted: bool = False

    @property
    def images(self) -> list[Image.Image]:
        """The best pictures, one per prompt."""
        return self.best.images

    @property
    def noise(self) -> Tensor:
        """Of the best pictures, see `Found.noise`."""
        return self.best.noise

    def each(self) -> list[NoiseResult]:
        """A result of its own for every prompt; seconds stay those of all together."""
        return [
            replace(
                self, prompts=self.prompts[row : row + 1], seeds=self.seeds[row : row + 1], best=self.best.row(row),
                first=self.first.row(row), last=self.last.row(row),
                history=tuple({key: value if key == "ends" else value[row : row + 1] for key, value in look.items()}
                              for look in self.history),
            )
            for row in range(len(self.prompts))
        ]  # fmt: skip

    def report(self) -> dict[str, Any]:
        """Everything but pictures and noise, as JSON has it; a score that is missing is null."""
        looks = [{key: value if key == "ends" else _numbers(value) for key, value in look.items()}
                 for look in self.history]  # fmt: skip
        kinds = {"best": self.best, "first": self.first, "last": self.last}
        found = {kind: {"total": _numbers(one.total), "iteration": one.iteration.tolist(),
                        "rewards": {name: _numbers(term) for name, term in one.terms.items()}}
                 for kind, one in kinds.items()}  # fmt: skip
        return {
            "prompts": list(self.prompts), "seeds": list(self.seeds), "settings": dict(self.settings), **found,
            "evaluations": self.evaluations, "seconds": dict(self.seconds), "interrupted": self.interrupted,
            "history": looks,
        }  # fmt: skip

    def save(self, folder: str | Path, more: Mapping[str, Image.Image] | None = None) -> Path:
        """Writes best-0000.png, first-0000.png ..., noise.safetensors and noise.json into a folder, in one piece.

        The folder is replaced if it is empty, or an older result.

        Args:
            more: further pictures by file name.

        Raises:
            ValueError: a folder that holds something else.
        """
        folder = Path(folder)
        if folder.exists() and (not folder.is_dir() or (any(folder.iterdir()) and not (folder / REPORT).exists())):
            raise ValueError(f"{folder}: expected a new or empty folder, or an older result (with a {REPORT}), and it "
                             f"holds something else; choose another one")  # fmt: skip
        with replacing_folder(folder) as partial:
            for kind, one in (("best", self.best), ("first", self.first)):
                for number, image in enumerate(one.images):
                    image.save(partial / f"{kind}-{number:04d}.png")
            for name, picture in (more or {}).items():
                picture.save(partial / name)
            save_file({"noise": self.best.noise.contiguous()}, partial / NOISE)
            write_json(partial / REPORT, self.report(), indent=1, allow_nan=False)
        return folder

    def plot(self) -> Figure:
        """The mean over prompts of total, of each reward and of the norm, look by look."""
        from diffalign.noise.page import curves

        return curves(self.report()["history"])


def load_noise(folder: str | Path) -> Tensor:
    """The noise of a saved result, fp32 [B, C, h, w].

    Raises:
        ValueError: the folder holds none that can be read.
    """
    file = Path(folder) / NOISE
    try:
        return load_file(file)["noise"]
    except (OSError, SafetensorError, KeyError) as error:
        raise ValueError(f"{folder}: expected a saved result with a readable {NOISE} ({error})") from error


def _numbers(values: Tensor) -> Sequence[float | None]:
    return [value if math.isfinite(value) else None for value in values.tolist()]
