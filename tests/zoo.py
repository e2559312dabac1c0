"""Every row of REWARDS as something small that scores: what the contract tests and the table of gaps run over.

A new row of REWARDS needs one here; `tests/rewards/test_contract.py` says so until it has one.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import small_checkpoints
import small_language_models
import tiny_qwen
from PIL import Image
from torch import Tensor, nn

from diffalign.answers import Answer
from diffalign.judging.command import Place
from diffalign.judging.store import CHOSEN, Choice
from diffalign.rewards import load_reward
from diffalign.rewards.base import Reward
from diffalign.rewards.geneval_rules import Detection

Build = Callable[..., Reward]
CAPTIONS = ("a red circle above a blue square", "a green triangle")


@dataclass(frozen=True)
class Small:
    """How a row is built, and what it is asked.

    Args:
        build: takes `dtype=` where the row does.
        prompts: that it can answer.
        grouped: scores a picture against the others of its prompt, so groups must not be torn apart.
    """

    build: Build
    prompts: tuple[str, ...] = ("A cup of tea.", "a red car parked on a street", "", "coffee")
    grouped: bool = False


@functools.cache
def made(make: Callable[[Path], Path]) -> Path:
    """What a function that writes a checkpoint leaves in a folder that lives as long as this process."""
    folder = tempfile.TemporaryDirectory(prefix="diffalign-zoo-")
    _FOLDERS.append(folder)
    return make(Path(folder.name))


_FOLDERS: list[Any] = []  # removed when the process ends


def clip(name: str, **keywords: Any) -> Reward:
    return load_reward(name, weights=made(small_checkpoints.pickscore), **keywords)


def hps(name: str, **keywords: Any) -> Reward:
    return load_reward(name, weights=made(small_checkpoints.hps), architecture="tiny-hps", **keywords)


def imagereward(**keywords: Any) -> Reward:
    vision, text = small_checkpoints.IMAGEREWARD
    heads = {"vision_heads": vision.heads, "text_heads": text.heads}
    return load_reward("imagereward", weights=made(small_checkpoints.imagereward), **heads, **keywords)


def blip_itm(**keywords: Any) -> Reward:
    vision, text = small_checkpoints.BLIP
    heads = {"vision_heads": vision.heads, "text_heads": text.heads, "side": small_checkpoints.BLIP_SIDE}
    return load_reward("blip-itm", weights=made(small_checkpoints.blip_matching), **heads, **keywords)


def aesthetic(**keywords: Any) -> Reward:
    backbone = str(made(small_checkpoints.backbone))
    return load_reward("aesthetic", weights=made(small_checkpoints.aesthetic_head), backbone=backbone, **keywords)


def aesthetic_siglip(**keywords: Any) -> Reward:
    folder = made(small_checkpoints.aesthetic_siglip)
    return load_reward("aesthetic-v2.5", weights=folder / "head.pth", backbone=str(folder), **keywords)


def siglip(**keywords: Any) -> Reward:
    return load_reward("siglip", weights=made(small_checkpoints.siglip), **keywords)


def mps(**keywords: Any) -> Reward:
    backbone = str(made(small_checkpoints.mps_backbone))
    return load_reward("mps", weights=made(small_checkpoints.mps), backbone=backbone, **keywords)


def hpsv3(dtype: str = "float32") -> Reward:
    base = str(made(tiny_qwen.qwen2_base))
    return load_reward("hpsv3", weights=made(small_language_models.hpsv3), base=base, dtype=dtype)


def videoreward(dtype: str = "float32") -> Reward:
    base = str(made(small_language_models.videoreward_base))
    return load_reward("videoreward", weights=made(small_language_models.videoreward), base=base, dtype=dtype)


def videoscore(dtype: str = "float32") -> Reward:
    return load_reward("videoscore", weights=made(small_language_models.videoscore), dtype=dtype)


def vqascore(dtype: str = "float32") -> Reward:
    # one letter is one token of its vocabulary
    return load_reward("vqascore", weights=made(tiny_qwen.qwen25_vl), answer="Y", dtype=dtype)


def level(picture: Image.Image) -> float:
    """What the stand-ins for detectors, engines and judges see: the mean of all pixels, 0 to 255."""
    return float(np.asarray(picture.convert("RGB")).mean())


class ByLevel:
    """A detector that finds a dog in what is bright, and an asker that gives brighter pictures more points."""

    classes = ("dog", "cat")
    workers = 1

    def __call__(self, picture: Image.Image, confidence: float) -> list[Detection]:
        return [Detection("dog" if level(picture) > 110 else "cat", (0.0, 0.0, 9.0, 9.0), 0.95)]

    def ask(self, pictures: list[Image.Image], text: str) -> Answer:
        return Answer(f"Final Score: {1 + int(level(pictures[0]) / 60)}", "")

    def prefer(self, a: Image.Image, b: Image.Image, prompt: str) -> float:
        return float(level(a) > level(b))


def geneval() -> Reward:
    metadata = {
        f"a {name}": {"tag": "single_object", "include": [{"class": name, "count": 1}]} for name in ("dog", "cat")
    }
    return load_reward("geneval", metadata=metadata, detector=ByLevel())


def ocr() -> Reward:
    return load_reward("ocr", engine=lambda picture: [("open" if level(picture) > 110 else "shut", 0.9)])


def vlm() -> Reward:
    class Points(ByLevel):
        def ask(self, pictures: list[Image.Image], text: str) -> Answer:
            return Answer(f"Score: {1 + int(level(pictures[0]) / 30)}", "")

    return load_reward("vlm", judge=Points())


def human() -> Reward:
    """A judge who likes bright pictures, and is at hand whenever something waits."""
    folder = made(lambda path: path)
    reward = load_reward("human", folder=str(folder))

    def answer() -> None:
        for place in (Place(str(path)) for path in folder.iterdir()):
            found, store, _ = place.open()
            for group in found.groups:
                brightest = max(group.pictures, key=lambda name: level(group.pictures[name].source.decode("it")))
                store.add(Choice("judge", group.key, CHOSEN, (brightest,)))

    reward.wait = answer  # type: ignore[attr-defined]
    return reward


ZOO: dict[str, Small] = {
    "aesthetic": Small(aesthetic),
    "aesthetic-v2.5": Small(aesthetic_siglip),
    "blip-itm": Small(blip_itm),
    "clip": Small(functools.partial(clip, "clip")),
    "geneval": Small(geneval, ("a dog", "a cat")),
    "human": Small(human, CAPTIONS, grouped=True),
    "hpsv2": Small(functools.partial(hps, "hpsv2")),
    "hpsv2.1": Small(functools.partial(hps, "hpsv2.1")),
    "hpsv3": Small(hpsv3),
    "imagereward": Small(imagereward),
    "jpeg": Small(functools.partial(load_reward, "jpeg")),
    "mps": Small(mps),
    "ocr": Small(ocr, ('a sign that says "open"', 'a "shut" door')),
    "pickscore": Small(functools.partial(clip, "pickscore")),
    "moving-shapes": Small(
        functools.partial(load_reward, "moving-shapes", mode="score"),
        tuple(f"{caption} standing still" for caption in CAPTIONS),
    ),
    "shapes": Small(functools.partial(load_reward, "shapes", mode="score"), CAPTIONS),
    "siglip": Small(siglip),
    "tiny-clip": Small(functools.partial(load_reward, "tiny-clip")),
    "unifiedreward": Small(functools.partial(load_reward, "unifiedreward", judge=ByLevel())),
    "videoreward": Small(videoreward),
    "videoscore": Small(videoscore),
    "vlm": Small(vlm),
    "vqascore": Small(vqascore),
    "winrate": Small(functools.partial(load_reward, "winrate", preference=ByLevel()), grouped=True),
}


def pictures() -> list[Image.Image]:
    """The oracle's twelve photographs."""
    return list(oracle.photographs().values())


def holdings(thing: Any) -> Iterator[tuple[dict[str, Any], str, nn.Module | Tensor]]:
    """(attributes, name, value) of every network and tensor that a reward holds, itself or in parts of diffalign."""
    for name, value in list(vars(thing).items()):
        if isinstance(value, nn.Module | Tensor):
            yield vars(thing), name, value
        elif type(value).__module__.startswith("diffalign."):
            yield from holdings(value)
