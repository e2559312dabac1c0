"""Checkpoints in the layouts of the official files, small, with the weights of `oracle.seeded`; one function each."""

from __future__ import annotations

import json
import math
from pathlib import Path

import open_clip
import oracle
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor
from transformers import (
    CLIPConfig,
    CLIPModel,
    PreTrainedTokenizerFast,
    SiglipConfig,
    SiglipModel,
    SiglipTextConfig,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from diffalign.rewards import blip_itm
from diffalign.rewards.aesthetic import HEAD
from diffalign.rewards.affine import HIDDEN
from diffalign.rewards.blip import BertSizes, ViTSizes
from diffalign.rewards.blip_itm import BlipMatcher
from diffalign.rewards.imagereward import ImageRewardNetwork
from diffalign.rewards.mps_network import CrossModel, HeadSizes

LOGIT_SCALE = 4.6052  # ln 100
TINY_HPS = {
    "embed_dim": 48,
    "vision_cfg": {"image_size": 224, "layers": 3, "width": 64, "head_width": 16, "patch_size": 14},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}
IMAGEREWARD = (
    ViTSizes(grid=14, patch=16, width=64, hidden=256, layers=3, heads=4),
    BertSizes(words=30524, positions=64, width=48, seen_width=64, hidden=112, layers=2, heads=4),
)
BLIP_SIDE, BLIP_SHARED = 64, 24
BLIP = (
    ViTSizes(grid=4, patch=16, width=32, hidden=64, layers=2, heads=4),
    BertSizes(words=30524, positions=40, width=36, seen_width=32, hidden=48, layers=2, heads=3),
)
MPS_HEAD = HeadSizes(width=32, layers=2, heads=4, inner=8)


def pickscore(folder: Path) -> Path:
    """The folder of a CLIPModel with OpenAI's tokenizer, as the hub has it; the one of PickScore's golden scores."""
    tower = {"hidden_act": "gelu", "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = tower | {"hidden_size": 32, "bos_token_id": 0, "eos_token_id": 2}
    vision = tower | {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3, "num_attention_heads": 4,
                      "patch_size": 14}  # fmt: skip
    return _clip(folder, CLIPConfig(text_config=text, vision_config=vision, projection_dim=48), LOGIT_SCALE)


def backbone(folder: Path) -> Path:
    """The folder of the CLIPModel under the small aesthetic head."""
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    text, vision = tower | {"eos_token_id": 2}, tower | {"patch_size": 14}
    return _clip(folder, CLIPConfig(text_config=text, vision_config=vision, projection_dim=48), 4.6)


def _clip(folder: Path, config: CLIPConfig, logit_scale: float) -> Path:
    config.save_pretrained(folder)
    oracle.clip_tokenizer().save_pretrained(folder)
    state = oracle.seeded(CLIPModel(config).state_dict(), logit_scale=logit_scale)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def hps(folder: Path) -> Path:
    """The official container in fp16, of an architecture that open_clip then knows as tiny-hps."""
    (folder / "tiny-hps.json").write_text(json.dumps(TINY_HPS))
    open_clip.add_model_config(folder)
    state = oracle.seeded(open_clip.create_model("tiny-hps").state_dict(), logit_scale=LOGIT_SCALE)
    torch.save({"state_dict": state}, folder / "HPS_v2.1_compressed.pt")
    return folder / "HPS_v2.1_compressed.pt"


def imagereward(folder: Path) -> Path:
    """ImageReward.pt with all keys of the official file, small and in fp16."""
    vision, text = IMAGEREWARD
    with torch.device("meta"):
        state = ImageRewardNetwork(vision, text).state_dict()
    for side, width in (("vision", vision.width), ("text", text.width)):
        state[f"blip.{side}_proj.weight"] = torch.empty(256, width)
        state[f"blip.{side}_proj.bias"] = torch.empty(256)
    state["blip.text_encoder.embeddings.position_ids"] = torch.arange(text.positions)[None]
    torch.save(oracle.seeded(state), folder / "ImageReward.pt")
    return folder / "ImageReward.pt"


def blip_matching(folder: Path) -> Path:
    """The container and the keys of a retrieval checkpoint, momentum copies and queues included."""
    vision, text = BLIP
    with torch.device("meta"):
        state = BlipMatcher(vision, text, BLIP_SHARED).state_dict()
    copies = {f"{key.partition('.')[0]}_m.{key.partition('.')[2]}": value for key, value in state.items()}
    state = oracle.seeded(state) | oracle.seeded({k: v for k, v in copies.items() if not k.startswith("itm_head")})
    state["text_encoder.embeddings.position_ids"] = torch.arange(text.positions)[None]
    queue = torch.zeros(BLIP_SHARED, 8)
    state |= {"image_queue": queue, "text_queue": queue.clone(), "temp": torch.tensor(0.07)}
    state |= {"idx_queue": torch.full((1, 8), -100), "ptr_queue": torch.zeros(1, dtype=torch.long)}
    assert all(any(key.startswith(prefix) for key in state) for prefix in blip_itm.UNUSED)
    torch.save({"model": state, "epoch": 5}, folder / blip_itm.NAME)
    return folder / blip_itm.NAME


def head_state(width: int, names: tuple[int, ...], prefix: str) -> dict[str, Tensor]:
    """An aesthetic head under the layer numbers of its official file."""
    shapes = zip(names, (width, *HIDDEN), (*HIDDEN, 1), strict=True)
    state = {}
    for name, fan_in, fan_out in shapes:
        state |= {
            f"{prefix}.{name}.weight": torch.empty(fan_out, fan_in),
            f"{prefix}.{name}.bias": torch.empty(fan_out),
        }
    return {key: value.float() for key, value in oracle.seeded(state).items()}


def aesthetic_head(folder: Path) -> Path:
    """LAION's file, for features of width 48."""
    torch.save(head_state(48, (0, 2, 4, 6, 7), "layers"), folder / HEAD.name)
    return folder / HEAD.name


def aesthetic_siglip(folder: Path) -> Path:
    """The folder of a SiglipVisionModel of 384 pixels, with head.pth in bf16 as v2.5 has it."""
    config = SiglipVisionConfig(hidden_size=48, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
                                image_size=384, patch_size=32)  # fmt: skip
    model = SiglipVisionModel(config)
    model.load_state_dict({key: value.float() for key, value in oracle.seeded(model.state_dict()).items()})
    model.save_pretrained(folder)
    state = {key: value.bfloat16() for key, value in head_state(48, (0, 2, 4, 6, 8), "scoring_head").items()}
    torch.save(state, folder / "head.pth")
    return folder


def siglip(folder: Path) -> Path:
    """The folder of a SiglipModel of 384 pixels with a tokenizer of the whole words of the oracle's prompts."""
    words = ["[PAD]", "[UNK]", *sorted({word for prompt in oracle.prompts().values() for word in prompt.split()})]
    backend = Tokenizer(WordLevel({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = WhitespaceSplit()
    tower = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = SiglipTextConfig(**tower, vocab_size=len(words), max_position_embeddings=16, projection_size=48)
    config = SiglipConfig(text_config=text.to_dict(), vision_config=tower | {"image_size": 384, "patch_size": 32})
    model = SiglipModel(config)
    model.load_state_dict({key: value.float() for key, value in oracle.seeded(model.state_dict()).items()})
    model.save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(folder)
    return folder


def mps_config() -> CLIPConfig:
    tower = {"intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = tower | {"hidden_size": 32, "vocab_size": 49408, "eos_token_id": 2, "bos_token_id": 0, "pad_token_id": 1}
    vision = tower | {"hidden_size": 48, "image_size": 224, "patch_size": 28}
    return CLIPConfig(text_config=text, vision_config=vision, projection_dim=32)


def mps_backbone(folder: Path) -> Path:
    """Config and tokenizer of the CLIP under the small MPS."""
    mps_config().save_pretrained(folder)
    oracle.clip_tokenizer().save_pretrained(folder)
    return folder


def mps_state() -> dict[str, Tensor]:
    """All keys of the released model's state dict, small, in fp16."""
    with torch.device("meta"):
        head, clip = CrossModel(MPS_HEAD), CLIPModel(mps_config())
    shapes = {f"cross_model.{key}": value for key, value in head.state_dict().items()}
    shapes |= {f"model.{key}": value for key, value in clip.state_dict().items()}
    state = oracle.seeded(shapes)
    frequencies = 1 / 10000 ** (torch.arange(0, MPS_HEAD.inner, 2).float() / MPS_HEAD.inner)
    for layer in range(MPS_HEAD.layers):
        state[f"cross_model.layers.{layer}.1.fn.rotary_emb.inv_freq"] = frequencies.half()
        for part in (0, 1):
            state[f"cross_model.layers.{layer}.{part}.fn.norm.bias"] = torch.zeros(MPS_HEAD.width).half()
    return state | {"model.logit_scale": torch.tensor(math.log(100)).half()}


def mps(folder: Path) -> Path:
    """mps.pth, as the conversion of the released object leaves it."""
    torch.save(mps_state(), folder / "mps.pth")
    return folder / "mps.pth"
