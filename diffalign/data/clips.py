"""Video files, animations and folders of frames to the frames that a run trains on; and clips to mp4 files.

Videos are read by PyAV (ffmpeg), animated gif and webp by Pillow. Frames are upright (the rotation that phones write is
applied) and in RGB.
"""

from __future__ import annotations

import hashlib
import io
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from diffalign.data.images import DAMAGED, LARGEST, decode, upright
from diffalign.errors import first_line

# the longest frame over the shortest, from where on a frame rate varies; milliseconds round 30 to 33 or 34
STEADY = 1.5
MOST = 10**9  # pixels of a whole clip, 4 bytes each: 480 frames of 1920 x 1080
BLINK = 1e-3  # seconds that time stamps may be off
PILLOWS = (b"GIF8", b"RIFF", b"\x89PNG", b"\xff\xd8")  # how files begin that are no videos; avi begins with RIFF too
QUALITY = 14  # of x264, of which 0 is lossless and 23 usual

Timed = tuple[float, Image.Image]  # seconds from the start of the file, and the frame that is shown from then on


@dataclass(frozen=True)
class FrameFolder:
    """A folder of pictures, the frames of a clip in the order of their names: 2.png before 10.png."""

    path: Path

    def files(self) -> list[Path]:
        """Of the frames.

        Raises:
            ValueError: the folder cannot be read.
        """
        try:
            found = [file for file in self.path.iterdir() if file.is_file() and not file.name.startswith(".")]
        except OSError as error:
            raise ValueError(f"{self.path} cannot be read ({error.strerror})") from error
        return sorted(found, key=lambda file: [int(part) if part.isdecimal() else part for part in
                                               re.split(r"(\d+)", file.name)])  # fmt: skip

    def read(self) -> bytes:
        """A digest of the frames' bytes, which stands for them in cache keys."""
        return b"".join(hashlib.sha256(read_frame(file)).digest() for file in self.files())


def read_frame(file: Path) -> bytes:
    """Raises ValueError where that cannot be read."""
    try:
        return file.read_bytes()
    except OSError as error:
        raise ValueError(f"{file} cannot be read ({error.strerror})") from error


def decode_clip(content: bytes | FrameFolder, source: str, frames: int | None, fps: float | None) -> list[Image.Image]:
    """The first `frames` frames of a clip, or all of them, as RGB pictures of one size.

    Args:
        content: a file's bytes, or a folder of frames.
        source: for messages.
        frames: None for all, whatever their rate.
        fps: frames a second, counted from the first: of a file with another rate, or a rate that varies, the frames
            that are on screen then (one may come twice). None takes every frame of the file. A folder of frames has no
            rate, and gives each of its files.

    Raises:
        ValueError: no video, a damaged one, too short, of a rate that varies without an `fps`, or with frames so large
            that they may be an attack; the message names `source`.
    """
    if isinstance(content, FrameFolder):
        found = _of_folder(content, source, frames)
    elif not content:
        raise ValueError(f"{source}: the clip is empty (0 bytes)")
    else:
        video = not content.startswith(PILLOWS) or content[8:12] == b"AVI "
        try:
            found = _chosen((_of_video if video else _of_animation)(content, source), source, frames, fps)
        except DAMAGED as error:
            if isinstance(error, Unusable):
                raise
            raise ValueError(f"{source}: not a readable clip, or a truncated one ({first_line(error)})") from error
    if sizes := {picture.size for picture in found} - {found[0].size}:
        (width, height), (wide, high) = found[0].size, min(sizes)
        raise Unusable(f"{source}: expected frames of one size, got {width} x {height} and {wide} x {high}")
    return found


class Unusable(ValueError):
    """A clip that can be read and not used."""


def _of_folder(folder: FrameFolder, source: str, frames: int | None) -> list[Image.Image]:
    files = folder.files()
    if not files:
        raise Unusable(f"{source}: no frame in the folder")
    if frames is not None and len(files) < frames:
        raise Unusable(_too_short(source, len(files), frames, None))
    if frames is None:
        width, height = decode(read_frame(files[0]), f"{source}, frame {files[0].name}").size
        _refuse_long(len(files) * width * height, source)
    return [decode(read_frame(file), f"{source}, frame {file.name}") for file in files[:frames]]


def _of_animation(content: bytes, source: str) -> Iterator[Timed]:
    """Frames of a gif, webp or png; a still picture is a clip of one frame."""
    image: Any = Image.open(io.BytesIO(content))
    _refuse_large(image.width, image.height, source)
    seconds, count = 0.0, getattr(image, "n_frames", 1)
    for number in range(count):
        image.seek(number)
        yield seconds, upright(image.copy())
        # as browsers read a duration of 0; what does not move is there for a moment, and no clip
        seconds += (image.info.get("duration") or 100) / 1000 if count > 1 else 2 * BLINK
    yield seconds, Image.new("RGB", image.size)  # where the last one ends


def _of_video(content: bytes, source: str) -> Iterator[Timed]:
    try:
        import av
    except ImportError as error:
        raise Unusable(f"{source}: reading videos needs PyAV: pip install 'diffalign[video]'") from error

    container: Any
    with av.open(io.BytesIO(content)) as container:
        if not container.streams.video:
            kinds = ", ".join(sorted({stream.type for stream in container.streams})) or "none"
            raise Unusable(f"{source}: expected a video stream, found none (streams: {kinds})")
        stream = container.streams.video[0]
        _refuse_large(stream.width, stream.height, source)
        stream.thread_type = "AUTO"
        start, last, length = None, 0.0, 0.0
        for frame in container.decode(stream):
            if frame.time is None:
                raise Unusable(f"{source}: frames without a time; write the file again, such as with ffmpeg -i")
            start = frame.time if start is None else start
            length = float(frame.duration * frame.time_base) if frame.duration else frame.time - start - last
            last = frame.time - start
            picture = frame.to_image()
            yield last, picture.rotate(frame.rotation, expand=True) if frame.rotation else picture
        if start is not None:
            yield last + length, picture


def _chosen(timed: Iterable[Timed], source: str, frames: int | None, fps: float | None) -> list[Image.Image]:
    """Of frames with times, the last of which says only where the clip ends."""
    wanted = math.inf if frames is None else frames
    found: list[Image.Image] = []
    lengths: list[float] = []
    shown: Image.Image | None = None
    begun = seconds = 0.0
    for seconds, picture in timed:
        if shown is not None:
            lengths.append(seconds - begun)
            if fps is None:
                found.append(shown)
            while fps is not None and len(found) < wanted and len(found) / fps < seconds - BLINK:
                found.append(shown)
        begun, shown = seconds, picture
        _refuse_long(len(found) * picture.width * picture.height, source)
        if len(found) >= wanted:
            break
    if not lengths:
        raise Unusable(f"{source}: no frame in the clip")
    if frames is not None and len(found) < frames:
        raise Unusable(_too_short(source, len(lengths), frames, fps, seconds))
    whole = [max(length, BLINK) for length in lengths[:-1]]  # the last one may be cut off
    if fps is None and frames is not None and whole and max(whole) > STEADY * min(whole):
        raise Unusable(f"{source}: the frame rate varies, from {1 / max(whole):.3g} to {1 / min(whole):.3g} a second; "
                       f"set fps, at which clips are then seen")  # fmt: skip
    return found


def _too_short(source: str, count: int, frames: int, fps: float | None, seconds: float = 0.0) -> str:
    asked = f"{frames} at {fps:g} a second ({frames / fps:.3g} s)" if fps else str(frames)
    lasts = f" ({seconds:.3g} s)" if fps else ""
    return f"{source}: the clip has {count} frames{lasts}, and {asked} are needed; set a smaller num_frames"


def _refuse_large(width: int, height: int, source: str) -> None:
    if width * height > LARGEST:
        raise Unusable(f"{source}: frames of {width} x {height} pixels are more than the {LARGEST} that are safe to "
                       f"decode")  # fmt: skip


def _refuse_long(pixels: int, source: str) -> None:
    if pixels > MOST:
        raise Unusable(f"{source}: all frames of the clip are more than the {MOST} pixels that are held at once; cut "
                       f"the clip shorter, or scale it down")  # fmt: skip


def write_clip(frames: NDArray[np.uint8], file: Path, fps: float) -> None:
    """uint8 [F, H, W, 3] as an mp4 (H.264) that browsers play. An odd side loses its last row or column.

    Raises:
        ValueError: PyAV is not there.
    """
    try:
        import av
    except ImportError as error:
        raise ValueError("writing videos needs PyAV: pip install 'diffalign[video]'") from error

    height, width = (side // 2 * 2 for side in frames.shape[1:3])
    with av.open(str(file), "w", format="mp4") as container:
        stream: Any = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.options = {"crf": str(QUALITY)}
        for picture in frames:
            array = np.ascontiguousarray(picture[:height, :width])
            container.mux(stream.encode(av.VideoFrame.from_ndarray(array, format="rgb24")))
        container.mux(stream.encode())


def contact_sheet(frames: NDArray[np.uint8], columns: int) -> Image.Image:
    """Frames uint8 [F, H, W, 3] row by row."""
    count, height, width, _ = frames.shape
    columns = min(count, columns)
    sheet = np.zeros((-(-count // columns) * height, columns * width, 3), np.uint8)
    for place, frame in enumerate(frames):
        top, left = place // columns * height, place % columns * width
        sheet[top : top + height, left : left + width] = frame
    return Image.fromarray(sheet)
