"""The shipped models and pairs are stock files of the promised size and strength."""

from __future__ import annotations

import io
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from diffalign.generation import generate
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


@pytest.fixture(scope="module")
def tiny_sd(root: Path) -> Path:
    return shipped(root, "tiny-sd", "train_sd")


@pytest.fixture(scope="module")
def stock(tiny_sd: Path):
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(str(tiny_sd))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw_stock(pipe, prompts: list[str], seeds: list[int], **keywords) -> np.ndarray:
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return pipe(prompts, num_inference_steps=20, generator=generators, output_type="np", **keywords).images


# --- tiny-sd


def test_tiny_sd_is_small_and_each_part_has_its_type(tiny_sd):
    assert size_of(tiny_sd) <= 6
    assert dtypes(tiny_sd / "unet") == dtypes(tiny_sd / "vae") == {"F16"}
    assert "F16" not in dtypes(tiny_sd / "text_encoder") and "F32" in dtypes(tiny_sd / "text_encoder")


def test_the_stock_pipeline_loads_and_draws(stock):
    assert {part.dtype for part in (stock.unet, stock.vae, stock.text_encoder)} == {torch.float32}
    (picture,) = draw_stock(stock, ["a red circle"], [0])
    assert picture.shape == (64, 64, 3) and picture.std() > 0.02


def test_each_word_of_the_grammar_is_one_token(stock):
    longest = max((str(s) for c in CATEGORIES for s in scenes("train", c)), key=lambda text: len(text.split()))
    ids = stock.tokenizer(longest).input_ids
    assert len(ids) == len(longest.split()) + 2
    assert stock.tokenizer.decode(ids, skip_special_tokens=True).strip() == longest


def test_generate_equals_the_stock_pipeline(stock, tiny_sd):
    prompts = ["a red circle", "three green crosses", "a blue square above a yellow triangle"]
    ours = generate(load_pipeline(tiny_sd), prompts, seeds=[5, 6, 7], steps=20, guidance_scale=7.5, batch_size=2)
    theirs = draw_stock(stock, prompts, [5, 6, 7], guidance_scale=7.5)
    assert np.abs(ours.permute(0, 2, 3, 1).numpy() - theirs).max() <= 1e-4


@pytest.mark.slow
@pytest.mark.parametrize(("category", "low", "high"), [("single", 0.75, 1.0), ("two", 0.25, 0.75)])
def test_the_stock_pipeline_draws_heldout_captions_about_as_often_as_measured(stock, category, low, high):
    """Loose bounds: an untrained or a broken model is far below, and above there is nothing left to align."""
    chosen = [scene for scene in sample_scenes("heldout", 600, seed=1) if scene.category == category][:60]
    passed = []
    for start in range(0, len(chosen), 30):
        part = chosen[start : start + 30]
        pictures = draw_stock(stock, [str(s) for s in part], [1000 + start + i for i in range(len(part))])
        passed += [verify((p * 255).round().astype(np.uint8), s).ok for p, s in zip(pictures, part, strict=True)]
    assert len(passed) == 60 and low <= np.mean(passed) <= high


@pytest.mark.parametrize("name", ["tiny-sd", "tiny-clip"])
def test_no_shipped_file_tells_where_it_was_made(root, name):
    configs = list((root / "assets" / name).rglob("*.json"))
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
