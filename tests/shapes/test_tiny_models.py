"""The shipped models and pairs are stock files of the promised size and strength."""

from __future__ import annotations

import io
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from PIL import Image
from safetensors import safe_open

from diffalign.generation import generate
from diffalign.pipelines import SHIPPED as SHIPPED_MODELS
from diffalign.pipelines import load_pipeline
from diffalign.shapes.grammar import CATEGORIES, one_fact_changed, parse, sample_scenes, scenes
from diffalign.shapes.render import render
from diffalign.shapes.verify import verify

MB = 1e6
PICKAPIC_COLUMNS = {
    "are_different", "best_image_uid", "caption", "created_at", "has_label", "image_0_uid", "image_0_url",
    "image_1_uid", "image_1_url", "jpg_0", "jpg_1", "label_0", "label_1", "model_0", "model_1", "ranking_id",
    "user_id", "num_example_per_prompt", "__index_level_0__",
}  # fmt: skip


def shipped(root: Path, name: str, made_by: str) -> Path:
    path = root / "assets" / name
    assert path.exists(), f"assets/{name} is not there: it is made by python -m diffalign.shapes.{made_by}"
    return path


def size_of(folder: Path) -> float:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / MB


def dtypes(folder: Path) -> set[str]:
    """Of the floating-point tensors in the weights on disk."""
    found = set()
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "np") as weights:
            found |= {weights.get_slice(key).get_dtype() for key in weights.keys()}  # noqa: SIM118
    return found


@dataclass(frozen=True)
class Model:
    """A pipeline that ships: its size in MB, what computes, and between which shares of each kind it draws right.

    Loose bounds: an untrained or a broken model is far below, and above there is nothing left to align.
    """

    megabytes: float
    network: str
    texts: tuple[str, ...]
    right: dict[str, tuple[float, float]]
    rest_of: str = ""  # the model that has the parts which this one lacks
    steps: int = 20
    guidance_scale: float = 7.5


SHIPPED = {
    "tiny-sd": Model(6, "unet", ("text_encoder",), {"single": (0.75, 1.0), "two": (0.25, 0.75)}),
    # 76 % of 180 held-out draws were right of one object, and of the 60 here it may be 15 points less
    "tiny-sdxl": Model(7, "unet", ("text_encoder", "text_encoder_2"), {"single": (0.6, 1.0), "two": (0.25, 0.75)}),
    # 13.7 % of 270 held-out draws were right of two objects, below the range that is wanted; of the 60 here 3 or more
    "tiny-sd3": Model(
        7,
        "transformer",
        ("text_encoder", "text_encoder_2", "text_encoder_3"),
        {"single": (0.6, 1.0), "two": (0.05, 0.75)},
    ),
    "tiny-sd-turbo": Model(
        6, "unet", ("text_encoder",), {"single": (0.75, 1.0), "two": (0.25, 0.75)}, "tiny-sd", 4, 1.0
    ),
}


@pytest.fixture(scope="module", params=SHIPPED)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def folder(root: Path, name: str) -> Path:
    return shipped(root, name, "distill" if SHIPPED[name].rest_of else f"train --model {name}")


@pytest.fixture(scope="module")
def stock(folder: Path, name: str) -> Any:
    """As a user without this project has it; of a distilled model, with its parts put into its teacher's pipeline."""
    from diffusers import DiffusionPipeline, UNet2DConditionModel

    if home := SHIPPED[name].rest_of:
        unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet", torch_dtype=torch.float32)
        own = {"unet": unet, "scheduler": DDIMScheduler.from_pretrained(folder, subfolder="scheduler")}
        pipe = DiffusionPipeline.from_pretrained(str(folder.parent / home), **own)
    else:
        pipe = DiffusionPipeline.from_pretrained(str(folder))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw_stock(pipe: Any, name: str, prompts: list[str], seeds: list[int], steps: int = 0) -> np.ndarray:
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    how = {"num_inference_steps": steps or SHIPPED[name].steps, "guidance_scale": SHIPPED[name].guidance_scale}
    return pipe(prompts, generator=generators, output_type="np", **how).images


# --- the pipelines


def test_the_list_is_complete(root: Path):
    assert set(SHIPPED) == set(SHIPPED_MODELS)
    assert set(SHIPPED) == {index.parent.name for index in (root / "assets").glob("*/model_index.json")}


def test_it_is_small_and_each_part_has_its_type(folder: Path, name: str):
    model = SHIPPED[name]
    assert size_of(folder) <= model.megabytes
    assert dtypes(folder / model.network) == {"F16"}
    if model.rest_of:
        assert {part.name for part in folder.iterdir()} == {model.network, "scheduler", "model_index.json"}
        return
    assert dtypes(folder / "vae") == {"F16"}
    for part in model.texts:
        assert "F16" not in dtypes(folder / part) and "F32" in dtypes(folder / part)


def test_the_stock_pipeline_loads_in_fp32_and_draws(stock: Any, name: str):
    model = SHIPPED[name]
    assert {getattr(stock, part).dtype for part in (model.network, "vae", *model.texts)} == {torch.float32}
    (picture,) = draw_stock(stock, name, ["a red circle"], [0], steps=4)
    assert picture.shape == (64, 64, 3) and picture.std() > 0.02


def test_each_word_of_the_grammar_is_one_token(stock: Any):
    longest = max((str(s) for c in CATEGORIES for s in scenes("train", c)), key=lambda text: len(text.split()))
    words = len(longest.split())
    for part, framing in (("tokenizer", 2), ("tokenizer_2", 2), ("tokenizer_3", 1)):
        tokenizer = getattr(stock, part, None)
        if tokenizer is not None:
            ids = tokenizer(longest).input_ids
            assert len(ids) == words + framing
            assert tokenizer.decode(ids, skip_special_tokens=True).strip() == longest


def test_generate_equals_the_stock_pipeline(stock: Any, folder: Path, name: str):
    """With the sampler that `generate` uses for diffusion models, which is not SDXL's default."""
    prompts = ["a red circle", "three green crosses", "a blue square above a yellow triangle"]
    how = {"steps": 4, "guidance_scale": SHIPPED[name].guidance_scale}
    ours = generate(load_pipeline(folder), prompts, seeds=[5, 6, 7], batch_size=2, **how)
    before = stock.scheduler
    if name == "tiny-sdxl":
        stock.scheduler = DDIMScheduler.from_config(before.config, clip_sample=False)
    try:
        theirs = draw_stock(stock, name, prompts, [5, 6, 7], steps=4)
    finally:
        stock.scheduler = before
    assert np.abs(ours.permute(0, 2, 3, 1).numpy() - theirs).max() <= 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("category", ["single", "two"])
def test_the_stock_pipeline_draws_heldout_captions_about_as_often_as_measured(stock: Any, name: str, category: str):
    low, high = SHIPPED[name].right[category]
    chosen = [scene for scene in sample_scenes("heldout", 600, seed=1) if scene.category == category][:60]
    passed = []
    for start in range(0, len(chosen), 30):
        part = chosen[start : start + 30]
        pictures = draw_stock(stock, name, [str(s) for s in part], [1000 + start + i for i in range(len(part))])
        passed += [verify((p * 255).round().astype(np.uint8), s).ok for p, s in zip(pictures, part, strict=True)]
    assert len(passed) == 60 and low <= np.mean(passed) <= high


@pytest.mark.parametrize("asset", [*SHIPPED, "tiny-clip"])
def test_no_shipped_file_tells_where_it_was_made(root, asset):
    configs = list((root / "assets" / asset).rglob("*.json"))
    assert configs and not any("_name_or_path" in file.read_text(encoding="utf-8") for file in configs)


# --- tiny-clip


def test_tiny_clip_is_a_stock_model_that_can_be_fooled_but_not_always(root):
    folder = shipped(root, "tiny-clip", "train_clip")
    from transformers import CLIPModel, CLIPProcessor

    assert size_of(folder) <= 1.5
    model, processor = CLIPModel.from_pretrained(folder).float().eval(), CLIPProcessor.from_pretrained(folder)
    rng, right = random.Random(2), []
    for scene in sample_scenes("heldout", 300, seed=2):
        captions = [str(scene), str(one_fact_changed(scene, rng))]
        inputs = processor(text=captions, images=[render(scene, rng)], return_tensors="pt", padding=True)
        with torch.no_grad():
            true, false = model(**inputs).logits_per_image[0].tolist()
        right.append(true > false)
    assert 0.75 <= np.mean(right) <= 0.97


# --- the pairs


@pytest.fixture(scope="module")
def pairs(root: Path) -> list[dict]:
    path = shipped(root, "shapes-pairs.parquet", "pairs")
    import pyarrow.parquet as pq

    return pq.read_table(path).to_pylist()


def test_the_pairs_have_the_columns_of_pick_a_pic_and_are_enough(pairs, root):
    assert (root / "assets" / "shapes-pairs.parquet").stat().st_size <= 4 * MB
    assert set(pairs[0]) == PICKAPIC_COLUMNS
    assert sum(row["label_0"] != 0.5 for row in pairs) >= 1000
    assert all(row["label_0"] in (0, 0.5, 1) and row["label_0"] + row["label_1"] == 1 for row in pairs)
    assert all(row["are_different"] == (row["label_0"] != 0.5) for row in pairs)
    best = {1: "image_0_uid", 0: "image_1_uid"}
    assert all(row["best_image_uid"] == row.get(best.get(row["label_0"], ""), "tie") for row in pairs)


def test_the_pairs_are_of_training_captions(pairs):
    trained = {scene for category in CATEGORIES for scene in scenes("train", category)}
    assert all(parse(row["caption"]) in trained for row in pairs)
    assert {parse(row["caption"]).category for row in pairs} == set(CATEGORIES)


def test_the_labels_are_the_verifiers(pairs):
    for row in pairs[:: max(1, len(pairs) // 300)]:
        first, second = (verify(Image.open(io.BytesIO(row[key])), row["caption"]).score for key in ("jpg_0", "jpg_1"))
        assert row["label_0"] == (0.5 if first == second else float(first > second)), row["caption"]


def test_neither_side_of_the_pairs_is_the_better_one_more_often(pairs):
    first = [row["label_0"] for row in pairs if row["label_0"] != 0.5]
    assert 0.4 <= np.mean(first) <= 0.6
