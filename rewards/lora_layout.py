"""Weights as peft writes them, merged into the weights that they change: W + scale B A.

peft names a weight of the model `base_model.model.NAME`. Beside a module that it adapts stand `MODULE.lora_A.weight`
and `MODULE.lora_B.weight`, in a whole state dict with the adapter's name in between and the module's own weight as
`MODULE.base_layer.weight`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

Factors = tuple[Tensor, Tensor]  # A [rank, in] and B [out, rank]
FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])(\.default)?\.weight")


def plain_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors under the model's own names; factors stay `MODULE.lora_A.weight` and `MODULE.lora_B.weight`."""
    names = {key: key.removeprefix("base_model.model.").replace(".base_layer.", ".") for key in state}
    return {name.replace(".default.weight", ".weight"): state[key] for key, name in names.items()}


def split_factors(
    state: Mapping[str, Tensor], where: Path
) -> tuple[dict[str, Tensor], dict[str, tuple[Tensor, Tensor]]]:
    """(weights by name, (A, B) by module) of a state with `plain_names`.

    Raises:
        ValueError: one of a pair is missing.
    """
    weights = {key: value for key, value in state.items() if not FACTOR.fullmatch(key)}
    found: dict[str, dict[str, Tensor]] = {}
    for key, value in state.items():
        if match := FACTOR.fullmatch(key):
            found.setdefault(match["module"], {})[match["side"]] = value
    for module, pair in found.items():
        if lacking := {"A", "B"} - pair.keys():
            raise ValueError(
                f"{where}: expected both factors of every LoRA, {module} lacks lora_{lacking.pop()}.weight"
            )
    return weights, {module: (pair["A"], pair["B"]) for module, pair in found.items()}


def merged(weight: Tensor, factors: Factors, scale: float, what: str) -> Tensor:
    """W + scale B A in fp32.

    Args:
        weight: [out, in].
        factors: A [rank, in] and B [out, rank].
        what: the weight's name, for the message.

    Raises:
        ValueError: shapes that do not fit.
    """
    a, b = factors
    if weight.ndim != 2 or a.shape[0] != b.shape[1] or (b.shape[0], a.shape[1]) != tuple(weight.shape):
        raise ValueError(f"{what}: expected LoRA factors [rank, in] and [out, rank] of a weight {list(weight.shape)}, "
                         f"got {list(a.shape)} and {list(b.shape)}")  # fmt: skip
    return weight.float() + scale * b.float() @ a.float()
