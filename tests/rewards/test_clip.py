from __future__ import annotations

import copy
import dataclasses
import logging
import shutil

import huggingface_hub.constants
import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, CLIPModel, CLIPProcessor, SiglipModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from diffalign.rewards import load_reward
from diffalign.rewards.clip import CLIPScore
from diffalign.rewards.preprocess import openai_recipe, square_recipe
from diffalign.rewards.towers import OpenCLIPTower


@pytest.fixture(scope="module")
def reward(clip_folder) -> CLIPScore:
    return CLIPScore(str(clip_folder))


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def stock_logits(folder, pictures, prompts, scale):
    """What transformers' own CLIPModel and CLIPProcessor (PIL) say, with the checkpoint's scale replaced."""
    model = CLIPModel.from_pretrained(folder, dtype=torch.float32).eval()
    processor = CLIPProcessor(CLIPImageProcessorPil.from_pretrained(folder), AutoTokenizer.from_pretrained(folder))
    inputs = processor(text=prompts, images=[p.convert("RGB") for p in pictures], return_tensors="pt", padding=True)
    with torch.no_grad():
        logits = model(**inputs).logits_per_image
    return scale / model.logit_scale.exp() * logits


def test_scores_equal_the_stock_model_and_processor(reward, clip_folder, photographs, prompts):
    expected = stock_logits(clip_folder, photographs, prompts, scale=100).diag()
    assert expected.std() > 5  # else any number would do
    torch.testing.assert_close(reward(photographs, prompts), expected.detach(), atol=1e-4, rtol=0)


def test_a_wrong_recipe_would_be_seen(reward, photographs, prompts):
    wrong = copy.copy(reward)
    wrong.tower = dataclasses.replace(reward.tower, recipe=square_recipe(32))
    assert (wrong(photographs, prompts) - reward(photographs, prompts)).abs().max() > 1


def test_a_batch_equals_one_by_one_and_order_does_not_matter(reward, photographs, prompts):
    whole = reward(photographs, prompts)
    single = torch.cat([reward([p], [c]) for p, c in zip(photographs, prompts, strict=True)])
    torch.testing.assert_close(whole, single, atol=1e-4, rtol=0)
    torch.testing.assert_close(reward(photographs[::-1], prompts[::-1]), whole.flip(0), atol=1e-4, rtol=0)


def test_the_float_path_is_near_the_exact_one(reward, photographs, prompts, pixels_of):
    exact = reward(photographs, prompts)
    floats = torch.cat([reward(pixels_of(p) / 255, [c]) for p, c in zip(photographs, prompts, strict=True)])
    assert not torch.equal(exact, floats)
    assert (exact - floats).abs().max() < 0.25  # scores spread over tens


def test_bytes_take_the_exact_recipe(reward, photographs, prompts, pixels_of):
    exact = reward(photographs, prompts)
    of_bytes = torch.cat([reward(pixels_of(p), [c]) for p, c in zip(photographs, prompts, strict=True)])
    torch.testing.assert_close(of_bytes, exact, atol=1e-4, rtol=0)


def test_the_gradient_is_that_of_the_score(reward, photographs, pixels_of):
    pixels = (pixels_of(photographs[2]) / 255).clamp(0.1, 0.9).requires_grad_()
    reward(pixels, ["a red circle"]).backward()
    step = 1e-3 * pixels.grad / pixels.grad.norm()
    with torch.no_grad():
        up, down = reward(pixels + step, ["a red circle"]), reward(pixels - step, ["a red circle"])
    slope = ((up - down) / 2e-3).item()
    assert slope == pytest.approx(pixels.grad.norm().item(), rel=0.05)
    assert not any(parameter.requires_grad for parameter in reward.tower.model.parameters())


def test_autocast_of_a_training_loop_does_not_reach_the_score(clip_folder, reward, photographs, pixels_of):
    pixels = pixels_of(photographs[0]) / 255
    fresh = CLIPScore(str(clip_folder))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = [fresh(photographs[:1], ["a cat"]), fresh(pixels, ["a cat"])]
        assert fresh.text_features(["tea"]).dtype == fresh.image_features(pixels).dtype == torch.float32
    assert scores == [reward(photographs[:1], ["a cat"]), reward(pixels, ["a cat"])]


def test_clips_average_their_frames(reward, photographs, pixels_of):
    frames = torch.cat([pixels_of(p.resize((40, 40))) for p in photographs[:4]]) / 255
    clip = frames.view(2, 2, 3, 40, 40)
    expected = reward(frames, ["a cat", "a cat", "tea", "tea"]).view(2, 2).mean(1)
    torch.testing.assert_close(reward(clip, ["a cat", "tea"]), expected, atol=1e-4, rtol=0)


def test_features_have_unit_length_and_make_the_score(reward, photographs, prompts):
    image, text = reward.image_features(photographs), reward.text_features(prompts)
    torch.testing.assert_close(image.norm(dim=-1), torch.ones(len(photographs)))
    torch.testing.assert_close(100 * (image * text).sum(-1), reward(photographs, prompts))


def test_scale_scales(clip_folder, reward, photographs, prompts):
    cosine = CLIPScore(str(clip_folder), scale=1)
    torch.testing.assert_close(100 * cosine(photographs, prompts), reward(photographs, prompts))
    assert cosine.card.range == (-1.0, 1.0)
    with pytest.raises(ValueError, match="above 0"):
        CLIPScore(str(clip_folder), scale=0)


def test_a_long_prompt_is_cut_and_said_once(reward, photographs, caplog):
    long, longer = "abc " * 30, "abc " * 40
    with caplog.at_level(logging.WARNING):
        scores = reward(photographs[:1] * 2, [long, longer])
        reward(photographs[:1], ["xyz " * 30])
    assert scores[0] == scores[1]
    assert [record.message.count("abc") > 0 for record in caplog.records] == [True]


def test_alpha_gray_and_palette_pictures_score_as_rgb(reward, photographs):
    for mode in ("RGBA", "L", "P"):
        picture = photographs[0].convert(mode)
        assert reward([picture], ["a cat"]) == reward([picture.convert("RGB")], ["a cat"])


def test_a_checkpoint_without_a_processor_gets_clips_own_settings(clip_folder, reward, photographs, prompts, tmp_path):
    shutil.copytree(clip_folder, tmp_path / "clip")
    (tmp_path / "clip" / "processor_config.json").unlink()
    bare = CLIPScore(str(tmp_path / "clip"))
    assert torch.equal(bare(photographs, prompts), reward(photographs, prompts))


def test_weights_stand_in_for_the_hub(clip_folder, reward, photographs, prompts):
    local = load_reward("clip", weights=str(clip_folder))
    assert local.card.source == "openai/clip-vit-large-patch14"
    assert torch.equal(local(photographs, prompts), reward(photographs, prompts))


def test_what_is_not_there_is_named_with_the_remedy(offline, tmp_path, clip_folder):
    with pytest.raises(
        ValueError, match=r"openai/clip-vit-large-patch14: neither a folder .*hf download openai/clip.*weights="
    ):
        CLIPScore()
    with pytest.raises(ValueError, match=r"nothing at .*absent"):
        CLIPScore(weights=tmp_path / "absent")
    with pytest.raises(ValueError, match="expected the folder of a CLIPModel"):
        CLIPScore(str(tmp_path))


def test_another_kind_of_model_is_refused_not_filled_with_random_weights(tmp_path, clip_folder):
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match="its model_type is bert, not clip or siglip"):
        CLIPScore(str(tmp_path))
    half = tmp_path / "half"
    shutil.copytree(clip_folder, half)
    weights = load_file(half / "model.safetensors")
    save_file({key: value for key, value in weights.items() if "text" not in key}, half / "model.safetensors")
    with pytest.raises(ValueError, match=r"lacks weights of a CLIPModel: .*text_"):
        CLIPScore(str(half))


def test_a_truncated_checkpoint_is_named(tmp_path, clip_folder):
    shutil.copytree(clip_folder, tmp_path / "clip")
    file = tmp_path / "clip" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(ValueError, match="clip: expected the folder of a CLIPModel"):
        CLIPScore(str(tmp_path / "clip"))


def test_another_picture_recipe_is_refused(tmp_path, clip_folder):
    shutil.copytree(clip_folder, tmp_path / "clip")
    CLIPImageProcessorPil(size={"shortest_edge": 40}, crop_size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    shutil.copyfile(tmp_path / "preprocessor_config.json", tmp_path / "clip" / "preprocessor_config.json")
    (tmp_path / "clip" / "processor_config.json").unlink()
    with pytest.raises(ValueError, match="short side of 32"):
        CLIPScore(str(tmp_path / "clip"))


@pytest.fixture(scope="module")
def open_clip_tower() -> OpenCLIPTower:
    vision = {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8}
    text = {"context_length": 12, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
    model = open_clip.CLIP(embed_dim=16, vision_cfg=vision, text_cfg=text).eval()
    return OpenCLIPTower(model, open_clip.get_tokenizer("ViT-B-32"), openai_recipe(32))


def test_the_open_clip_tower_encodes_as_open_clip_does(open_clip_tower, photographs, prompts):
    tower, model = open_clip_tower, open_clip_tower.model
    transform = open_clip.transform.image_transform(32, is_train=False)
    x = torch.stack([transform(picture) for picture in photographs])
    torch.testing.assert_close(tower.image_features(tower.recipe.pictures(photographs)), model.encode_image(x))
    ids = open_clip.get_tokenizer("ViT-B-32")(prompts, context_length=12)
    torch.testing.assert_close(tower.text_features(prompts), model.encode_text(ids))


def test_the_open_clip_tower_knows_what_it_cuts(open_clip_tower):
    fits, cut = " ".join(["cat"] * 10), " ".join(["cat"] * 11)  # 12 with start and end
    assert open_clip_tower.too_long([fits, cut, ""]) == [cut]


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("open_clip:ViT-B-33/openai", "architecture 'ViT-B-33'; nearest: .*ViT-B-32"),
        ("open_clip:ViT-B-32/laion2b_s34b", "tag of ViT-B-32 'laion2b_s34b'; nearest: laion2b_s34b_b79k"),
        ("open_clip:ViT-B-32", "tag of ViT-B-32 ''"),
    ],
)
def test_open_clip_names_are_checked_before_anything_is_fetched(model, message):
    with pytest.raises(ValueError, match=message):
        CLIPScore(model)


def test_open_clip_weights_not_to_be_had_are_named(offline):
    name = "open_clip:ViT-B-32/laion2b_s34b_b79k"
    with pytest.raises(ValueError, match=rf"{name}: .*hf download laion/CLIP-ViT-B-32.*--weights siglip=FILE"):
        load_reward("siglip", model=name)


def test_an_open_clip_file_of_another_model_is_named(tmp_path):
    torch.save({"weight": torch.zeros(2)}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"other.pt: expected an open_clip checkpoint of RN50/openai"):
        CLIPScore("open_clip:RN50/openai", weights=tmp_path / "other.pt")


def test_open_clip_loads_a_local_file_with_the_activation_of_its_tag(tmp_path, photographs):
    model = open_clip.create_model("RN50-quickgelu", pretrained=None)
    file = tmp_path / "rn50.pt"
    torch.save(model.state_dict(), file)
    reward = CLIPScore("open_clip:RN50/openai", weights=file)
    with torch.no_grad():
        x = reward.tower.recipe.pictures(photographs[:1])
        torch.testing.assert_close(reward.tower.image_features(x), model.eval().encode_image(x))
        text = reward.tower.text_features(["a cat"])
        torch.testing.assert_close(text, model.encode_text(open_clip.get_tokenizer("RN50")(["a cat"])))
    assert reward(photographs[:2], ["a cat", "tea"]).isfinite().all()


def test_siglip_scores_equal_the_stock_model_and_processor(siglip_folder, photographs, prompts):
    reward = load_reward("siglip", weights=siglip_folder, scale=1)
    model = SiglipModel.from_pretrained(siglip_folder, dtype=torch.float32).eval()
    pixels = SiglipImageProcessorPil.from_pretrained(siglip_folder)(photographs, return_tensors="pt").pixel_values
    tokenizer = AutoTokenizer.from_pretrained(siglip_folder)
    ids = tokenizer(prompts, padding="max_length", max_length=8, truncation=True, return_tensors="pt").input_ids
    with torch.no_grad():
        out = model(input_ids=ids, pixel_values=pixels)
    expected = (out.image_embeds * out.text_embeds).sum(-1)
    assert expected.std() > 0.02
    torch.testing.assert_close(reward(photographs, prompts), expected, atol=1e-6, rtol=0)
    assert reward.card.side == 32 and reward.card.unit == "1 cos"


def test_siglip_reads_the_padding_of_a_prompt(siglip_folder, photographs, prompts):
    """Alone or beside a longer one a prompt scores the same: it is padded to the full length either way."""
    reward = load_reward("siglip", weights=siglip_folder)
    whole = reward(photographs, prompts)
    single = torch.cat([reward([p], [c]) for p, c in zip(photographs, prompts, strict=True)])
    torch.testing.assert_close(whole, single, atol=1e-4, rtol=0)


def test_another_picture_recipe_of_a_siglip_is_refused(siglip_folder, tmp_path):
    shutil.copytree(siglip_folder, tmp_path / "siglip")
    SiglipImageProcessorPil(size={"height": 64, "width": 64}).save_pretrained(tmp_path / "siglip")
    with pytest.raises(ValueError, match="bicubic resize to 32 x 32"):
        load_reward("siglip", weights=tmp_path / "siglip")


@pytest.mark.parametrize(("dtype", "bound"), [("bfloat16", 1.5), ("float16", 0.2)])
def test_16_bit_towers_drift_by_little(clip_folder, reward, photographs, prompts, dtype, bound):
    """Scores spread over tens; the drift is that of the towers, since pictures are made in fp32."""
    drift = (CLIPScore(str(clip_folder), dtype=dtype)(photographs, prompts) - reward(photographs, prompts)).abs().max()
    assert 0 < drift < bound


def test_tiny_clip_is_a_reward_of_its_own(photographs):
    ships = load_reward("tiny-clip")
    assert torch.equal(ships(photographs[:2], ["a red circle"] * 2),
                       CLIPScore("tiny-clip")(photographs[:2], ["a red circle"] * 2))  # fmt: skip
