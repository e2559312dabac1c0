"""What was drawn as files: pictures, clips with sheets of their frames, and the page that plays them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from diffalign.data.clips import contact_sheet, write_clip
from diffalign.pages import write_html
from diffalign.writing import replacing

SHEETS = "sheets"  # folder beside clips, of their frames side by side
SHEET = 9  # frames on a sheet
PAGE = "index.html"
FPS = 16.0  # at which clips are shown


@dataclass(frozen=True)
class Player:
    """A clip on a page: its file from there, whose sheet lies in sheets/ beside it, and what is said below."""

    file: str
    caption: str

    @property
    def sheet(self) -> str:
        path = Path(self.file)
        return str(path.parent / SHEETS / f"{path.stem}.png")


def refuse_unplayable(fps: float) -> None:
    """Raises ValueError for a rate that nothing plays."""
    if not 0 < fps <= 240:
        raise ValueError(f"fps: expected frames a second above 0 and at most 240, got {fps}")


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
