"""Clips from files: which frames are taken, and what is said of those that cannot be used."""

from __future__ import annotations

import io
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from diffalign.data.clips import FrameFolder, contact_sheet, decode_clip, write_clip
from diffalign.data.records import MediaSource


def levels(count: int, side: tuple[int, int] = (32, 48)) -> np.ndarray:
    """uint8 [count, *side, 3]: frame k is gray of 20 + 10 k."""
    return np.stack([np.full((*side, 3), 20 + 10 * number, np.uint8) for number in range(count)])


def seen(pictures: list[Image.Image]) -> list[int]:
    """Which of `levels` each picture is."""
    return [round((float(np.asarray(picture).mean()) - 20) / 10) for picture in pictures]


def video(tmp_path: Path, count: int = 12, fps: float = 24, side: tuple[int, int] = (32, 48)) -> bytes:
    write_clip(levels(count, side), tmp_path / "a.mp4", fps)
    return (tmp_path / "a.mp4").read_bytes()


def animation(durations: list[int], form: str = "gif") -> bytes:
    pictures = [Image.fromarray(array) for array in levels(len(durations))]
    buffer = io.BytesIO()
    pictures[0].save(buffer, form, save_all=True, append_images=pictures[1:], duration=durations, loop=0)
    return buffer.getvalue()


def muxed(tmp_path: Path, name: str, times: list[int] | None = None, rotation: int = 0) -> bytes:
    """A video whose frames are shown at these milliseconds; None: a file of sound alone."""
    file = tmp_path / name
    with av.open(str(file), "w") as container:
        if times is None:
            sound: Any = container.add_stream("aac", rate=16000)
            block = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), format="fltp", layout="mono")
            block.sample_rate = 16000
            container.mux(sound.encode(block))
            container.mux(sound.encode())
        else:
            stream: Any = container.add_stream("libvpx-vp9" if name.endswith("webm") else "libx264", rate=1000)
            stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
            stream.codec_context.time_base = Fraction(1, 1000)
            for time, array in zip(times, levels(len(times)), strict=True):
                frame = av.VideoFrame.from_ndarray(array, format="rgb24")
                frame.pts, frame.time_base = time, Fraction(1, 1000)
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
    return file.read_bytes()


def test_every_frame_of_a_video_from_the_first_on(tmp_path: Path) -> None:
    data = video(tmp_path)
    pictures = decode_clip(data, "a.mp4", 9, None)
    assert seen(pictures) == list(range(9)) and {picture.size for picture in pictures} == {(48, 32)}
    assert len(decode_clip(data, "a.mp4", 12, None)) == 12


@pytest.mark.parametrize(("fps", "expected"), [(24, [0, 1, 2, 3]), (12, [0, 2, 4, 6]), (8, [0, 3, 6, 9]),
                                               (48, [0, 0, 1, 1])])  # fmt: skip
def test_frames_at_another_rate_are_those_on_screen_then(tmp_path: Path, fps: float, expected: list[int]) -> None:
    assert seen(decode_clip(video(tmp_path), "a.mp4", 4, fps)) == expected


def test_a_rate_that_varies_is_refused_unless_one_is_asked_for(tmp_path: Path) -> None:
    data = muxed(tmp_path, "v.webm", [0, 40, 80, 280, 320, 360, 400])
    assert seen(decode_clip(data, "v.webm", 8, 20)) == [0, 1, 2, 2, 2, 2, 3, 4]
    with pytest.raises(ValueError, match=r"v\.webm: the frame rate varies, from 5 to 25 a second; set fps"):
        decode_clip(data, "v.webm", 6, None)


def test_times_that_are_rounded_to_milliseconds_are_one_rate(tmp_path: Path) -> None:
    data = muxed(tmp_path, "w.webm", [0, 33, 67, 100, 133, 167])
    assert seen(decode_clip(data, "w.webm", 6, None)) == list(range(6))
    assert seen(decode_clip(data, "w.webm", 3, 15)) == [0, 2, 4]


@pytest.mark.parametrize("form", ["gif", "webp", "png"])
def test_an_animation_is_a_clip(form: str) -> None:
    data = animation([100] * 6, form)
    assert seen(decode_clip(data, "x", 5, None)) == [0, 1, 2, 3, 4]
    assert seen(decode_clip(data, "x", 3, 5)) == [0, 2, 4]


def test_a_still_picture_is_a_clip_of_one_frame() -> None:
    buffer = io.BytesIO()
    Image.fromarray(levels(1)[0]).save(buffer, "png")
    assert seen(decode_clip(buffer.getvalue(), "p", 1, None)) == seen(decode_clip(buffer.getvalue(), "p", 1, 16)) == [0]
    with pytest.raises(ValueError, match=r"p: the clip has 1 frames.*and 5 .*are needed"):
        decode_clip(buffer.getvalue(), "p", 5, 16)


def test_a_folder_of_frames_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    for number, array in enumerate(levels(11)):
        Image.fromarray(array).save(tmp_path / f"f{number}.png")
    (tmp_path / ".hidden").write_text("")
    source = MediaSource(tmp_path)
    assert seen(source.clip("x", 11, None)) == list(range(11)) and source.size == (32, 48)
    first = source.sha256
    Image.fromarray(levels(1)[0]).save(tmp_path / "f10.png")
    assert MediaSource(tmp_path).sha256 != first
    with pytest.raises(ValueError, match="x: the clip has 11 frames, and 13 are needed; set a smaller num_frames"):
        source.clip("x", 13, None)
    Image.fromarray(levels(1, (16, 48))[0]).save(tmp_path / "f3.png")
    with pytest.raises(ValueError, match="x: expected frames of one size, got 48 x 32 and 48 x 16"):
        source.clip("x", 5, None)
    (tmp_path / "f2.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"x, frame f2\.png: not a readable image"):
        decode_clip(FrameFolder(tmp_path), "x", 5, None)


def test_what_is_no_clip_is_said_in_one_sentence(tmp_path: Path) -> None:
    data = video(tmp_path, count=12)
    cases = {
        b"": "the clip is empty",
        b"this is a text": "not a readable clip, or a truncated one",
        data[: len(data) // 3]: "not a readable clip, or a truncated one",
        muxed(tmp_path, "sound.mp4"): r"expected a video stream, found none \(streams: audio\)",
        animation([100] * 3): "the clip has 3 frames, and 5 are needed",
    }
    for content, message in cases.items():
        with pytest.raises(ValueError, match=f"here: {message}") as caught:
            decode_clip(content, "here", 5, None)
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=r"12 frames \(0.5 s\), and 9 at 8 a second \(1.12 s\) are needed"):
        decode_clip(data, "here", 9, 8)


def test_a_clip_that_would_fill_the_memory_is_refused_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "frames"
    folder.mkdir()
    for number, array in enumerate(levels(4)):
        Image.fromarray(array).save(folder / f"{number}.png")
    contents = (FrameFolder(folder), animation([100] * 4), video(tmp_path, 4))
    monkeypatch.setattr("diffalign.data.clips.MOST", 3 * 32 * 48)
    for content in contents:
        assert len(decode_clip(content, "here", 3, None)) == 3
        with pytest.raises(ValueError, match="here: all frames of the clip are more than the 4608 pixels"):
            decode_clip(content, "here", None, None)


def test_a_frame_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "0.png"
    Image.fromarray(levels(1)[0]).save(file)

    def refused(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", refused)
    for ask in (FrameFolder(tmp_path).read, lambda: decode_clip(FrameFolder(tmp_path), "here", None, None)):
        with pytest.raises(ValueError, match=r"0.png cannot be read \(Permission denied\)"):
            ask()


def test_a_clip_is_turned_as_its_player_would(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    array = levels(1)[0]
    array[:16] = 250  # the upper half
    write_clip(np.stack([array] * 3), tmp_path / "up.mp4", 8)

    class Turned:
        """A frame of a video that a phone wrote lying on its side; `av` cannot write such files."""

        def __init__(self, frame: Any) -> None:
            self.frame = frame

        rotation = 90

        def __getattr__(self, name: str) -> Any:
            return getattr(self.frame, name)

    decode = av.container.InputContainer.decode

    class Container:
        def __init__(self, inner: Any) -> None:
            self.inner, self.streams = inner, inner.streams

        def __enter__(self) -> Container:
            return self

        def __exit__(self, *_: object) -> None:
            self.inner.close()

        def decode(self, stream: Any) -> Any:
            return (Turned(frame) for frame in decode(self.inner, stream))

    opened = av.open
    monkeypatch.setattr(av, "open", lambda *args: Container(opened(*args)))
    [picture, _] = decode_clip((tmp_path / "up.mp4").read_bytes(), "x", 2, None)
    assert picture.size == (32, 48)
    left, right = np.asarray(picture)[:, :12].mean(), np.asarray(picture)[:, -12:].mean()
    assert left > 200 > 60 > right  # counterclockwise by 90 degrees


@pytest.mark.parametrize("side", [(32, 48), (33, 49)])
def test_what_is_written_is_read_again(tmp_path: Path, side: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    smooth = np.asarray(Image.fromarray(rng.integers(0, 255, (4, 6, 3), np.uint8)).resize(side[::-1], Image.BICUBIC))
    frames = np.stack([np.roll(smooth, shift, axis=1) for shift in range(5)])
    write_clip(frames, tmp_path / "a.mp4", 7.5)
    again = np.stack([np.asarray(picture) for picture in decode_clip((tmp_path / "a.mp4").read_bytes(), "a", 5, None)])
    height, width = (length // 2 * 2 for length in side)
    assert again.shape == (5, height, width, 3)
    assert np.abs(again.astype(float) - frames[:, :height, :width]).mean() < 6
    with av.open(str(tmp_path / "a.mp4")) as container:
        assert container.streams.video[0].average_rate == Fraction(15, 2)


def test_a_contact_sheet_has_its_frames_row_by_row() -> None:
    sheet = contact_sheet(levels(7), columns=4)
    assert sheet.size == (4 * 48, 2 * 32)
    shown = [[(int(np.asarray(sheet)[32 * row, 48 * column, 0]) - 20) / 10 for column in range(4)] for row in range(2)]
    assert shown == [[0, 1, 2, 3], [4, 5, 6, -2]]
    assert contact_sheet(levels(2), columns=5).size == (96, 32)
