"""DeepSpeed's ZeRO-2 as an optimizer: weights whole on every rank, gradients and moments dealt out.

DeepSpeed is driven directly and not by accelerate, which would step inside of the last backward pass, before the
trainer knows whether the loss was finite on every rank. Needs deepspeed 0.19, the version that this was run with.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor

from diffalign.config import RunConfig


def zero2(
    network: torch.nn.Module, optimizer: torch.optim.Optimizer, config: RunConfig
) -> tuple[torch.nn.Module, ZeroOptimizer]:
    """The engine to call instead of the network, and the optimizer to use instead of this one, an AdamW of one group.

    Raises:
        ValueError: deepspeed is not installed.
    """
    try:
        import deepspeed
    except ImportError as error:
        raise ValueError("this launch asks for DeepSpeed, which is not installed: pip install deepspeed, or launch "
                         "with configs/accelerate/fsdp2.yaml") from error  # fmt: skip
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    engine, zero, _, _ = deepspeed.initialize(model=network, optimizer=optimizer, config=_settings(config))
    return engine, ZeroOptimizer(engine, zero, parameters)


class ZeroOptimizer:
    """What the trainer needs of an optimizer. Its state dict is AdamW's own, whole, so any launch can go on with it."""

    def __init__(self, engine: Any, zero: Any, parameters: list[torch.nn.Parameter]) -> None:
        self._engine, self._zero, self._parameters = engine, zero, parameters
        self.param_groups: list[dict[str, Any]] = zero.param_groups

    def norm(self) -> Tensor:
        """Of the averaged gradients of all ranks, before they are clipped."""
        return torch.as_tensor(self._zero.scaled_global_norm())

    def step(self) -> None:
        """Clips, steps, and gives every rank the new weights."""
        self._engine.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drops the gradients, also those of a step that is not taken."""
        self._zero.zero_grad(set_to_none=set_to_none)
        self._zero.averaged_gradients = {}

    def state_dict(self) -> dict[str, Any]:
        """Every rank must call this: the moments of all parameters are one flat tensor, of which each has a part."""
        inner = self._zero.optimizer.state_dict()
        [flat] = inner["state"].values()
        names = sorted(name for name, value in flat.items() if value.ndim)  # in one order on all ranks
        parts = {name: torch.cat(gather_object([flat[name].cpu()])) for name in names}
        state: dict[int, dict[str, Tensor]] = {}
        start = 0
        for index, parameter in enumerate(self._parameters):
            end = start + parameter.numel()
            moments = {name: part[start:end].view(parameter.shape).clone() for name, part in parts.items()}
            state[index], start = {"step": flat["step"], **moments}, end
        return {"state": state, "param_groups": [{**inner["param_groups"][0], "params": list(state)}]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """After the weights have been put back, which the fp32 copies inside are renewed from."""
        self._zero.refresh_fp32_params()
        inner, size = self._zero.optimizer.state_dict(), self._zero.partition_size[0]
        start = size * torch.distributed.get_rank()
        own: dict[str, Tensor] = {"step": state["state"][0]["step"]}
        for name in (name for name in state["state"][0] if name != "step"):
            flat = torch.cat([state["state"][index][name].flatten() for index in range(len(self._parameters))])
            own[name] = torch.nn.functional.pad(flat[start : start + size], (0, max(0, start + size - len(flat))))
        self._zero.optimizer.load_state_dict({"state": {0: own}, "param_groups": inner["param_groups"]})


def _settings(config: RunConfig) -> dict[str, Any]:
    """Weights and gradients in fp32, as in every other launch; 16 bit is autocast's."""
    bf16 = config.mixed_precision == "bf16"
    return {
        "train_micro_batch_size_per_gpu": config.train_batch_size,
        "gradient_clipping": config.max_grad_norm,
        "zero_optimization": {"stage": 2},
        "zero_allow_untested_optimizer": True,
        "torch_autocast": {"enabled": bf16, "dtype": "bfloat16", "lower_precision_safe_modules": []},
    }
