"""Several processes: which launches are refused, who takes which share, and networks in shards (FSDP2).

A part of the trainer, so it may know accelerate. Under DDP every rank holds the whole network. With `train: full` and
an FSDP2 launch each rank holds a share of every tensor, as a DTensor, and gathers one block at a time to compute with
it. What a run leaves (checkpoints, results) is made of whole tensors, so no file tells how many ranks wrote it.
DeepSpeed is in `zero.py`.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, recursively_apply
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from diffalign.config import RunConfig
from diffalign.reference import MOVING, Fixed, Reference
from diffalign.zero import ZeroOptimizer, zero2

Item = TypeVar("Item")


def refuse_launch(config: RunConfig, accelerator: Accelerator) -> None:
    """Launches that would do something else than they say, before anything is loaded.

    Raises:
        ValueError: processes that do not see each other; FSDP or DeepSpeed of a LoRA or in fp16; another stage than
            ZeRO-2; FSDP1, or FSDP that loads empty networks on all ranks but one.
    """
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started > accelerator.num_processes:
        raise ValueError(f"{started} processes were started, but they do not see each other and each would train "
                         f"alone: without a GPU, set cpu=true")  # fmt: skip
    dealt_out = in_shards(accelerator) or with_deepspeed(accelerator)
    if dealt_out and config.train != "full":
        raise ValueError("FSDP2 and DeepSpeed are for train: full; a LoRA is small enough for every process: launch "
                         "it with configs/accelerate/ddp.yaml")  # fmt: skip
    if dealt_out and config.reference_name in MOVING:
        raise ValueError(f"reference {config.reference_name!r} keeps whole weights, and FSDP2 and DeepSpeed deal "
                         f"them out: set reference: {{name: frozen_copy}}, or launch with ddp.yaml")  # fmt: skip
    if dealt_out and config.mixed_precision == "fp16":
        raise ValueError("FSDP2 and DeepSpeed are supported with mixed_precision: no or bf16, got fp16")
    if with_deepspeed(accelerator) and os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2") != "2":
        raise ValueError("DeepSpeed is supported at zero_stage: 2 only; configs/accelerate/fsdp2.yaml deals out the "
                         "weights as well")  # fmt: skip
    if not in_shards(accelerator):
        return
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise ValueError("only FSDP2 is supported: set fsdp_version: 2, as configs/accelerate/fsdp2.yaml does")
    if _on("FSDP_CPU_RAM_EFFICIENT_LOADING"):
        raise ValueError("fsdp_cpu_ram_efficient_loading: true leaves the text encoders of all processes but one "
                         "empty: set it to false, as configs/accelerate/fsdp2.yaml does")  # fmt: skip


def refuse_few_pairs(config: RunConfig, pairs: int, ranks: int) -> None:
    """Too few training pairs for all ranks at once, which would train on one pair twice in a step.

    Raises:
        ValueError: says how many are needed and how many there are.
    """
    needed = ranks * config.train_batch_size
    if ranks > 1 and pairs < needed:
        raise ValueError(f"{ranks} processes with train_batch_size {config.train_batch_size} take {needed} different "
                         f"pairs at a time, but there are {pairs} to train on: start fewer processes")  # fmt: skip


def in_shards(accelerator: Accelerator) -> bool:
    """Whether the launch asks for FSDP; accelerate itself does not say so on CPUs."""
    return accelerator.num_processes > 1 and _on("ACCELERATE_USE_FSDP")


def with_deepspeed(accelerator: Accelerator) -> bool:
    """Whether the launch asks for DeepSpeed; accelerate is not told, since it is driven directly."""
    return accelerator.num_processes > 1 and _on("ACCELERATE_USE_DEEPSPEED")


def spread(
    accelerator: Accelerator,
    config: RunConfig,
    network: torch.nn.Module,
    reference: Reference | None,
    optimizer: Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer],
) -> tuple[torch.nn.Module, Any]:
    """(the network as the policy calls it, the optimizer of what is trained).

    That network is wrapped by DDP or DeepSpeed, or it is itself, in shards from now on, if FSDP2 is asked for. Then a
    reference with a network of its own, which `frozen_copy` is, is put in shards as well. The parameters of a network
    in shards are new ones.
    """
    if in_shards(accelerator):
        shard(accelerator, config, network)
        if isinstance(reference, Fixed) and reference.network is not network:
            shard(accelerator, config, reference.network)
    made = optimizer([p for p in network.parameters() if p.requires_grad])
    if with_deepspeed(accelerator):
        return zero2(network, made, config)
    wrapper = network if in_shards(accelerator) else accelerator.prepare_model(network)
    return wrapper, accelerator.prepare_optimizer(made)


def exchange(accelerator: Accelerator, wrapper: Any, last: bool) -> AbstractContextManager[None]:
    """Around the backward passes of one microbatch: DDP exchanges gradients in the last one only, which is cheaper.

    In shards they are exchanged every time, or each rank would have to keep them whole.
    """
    if last or in_shards(accelerator) or with_deepspeed(accelerator):
        return nullcontext()
    return accelerator.no_sync(wrapper)


def announce(accelerator: Accelerator, wrapper: Any, last: bool) -> None:
    """Before every backward pass: DeepSpeed must know whether it is the last one of the step. Others need not."""
    if with_deepspeed(accelerator):
        wrapper.set_gradient_accumulation_boundary(last)


def clip(accelerator: Accelerator, optimizer: Any, parameters: Sequence[Tensor], largest: float) -> Tensor:
    """Clips the gradients to a norm, over all ranks; returns the norm before. DeepSpeed clips as it steps."""
    if isinstance(optimizer, ZeroOptimizer):
        return optimizer.norm()
    norm: Tensor = accelerator.clip_grad_norm_(parameters, largest)  # type: ignore[assignment]
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def step_unless(optimizer: Any, parameters: Sequence[Tensor], skip: Tensor) -> None:
    """Steps where `skip` is 0.0; a step that is skipped leaves weights and moments as they were.

    The fused AdamW looks at the flag on the device. In shards and with DeepSpeed it cannot: the device is waited for.
    """
    if isinstance(optimizer, ZeroOptimizer) or isinstance(parameters[0], DTensor):
        if not skip:
            optimizer.step()
        return
    optimizer.optimizer.found_inf = skip  # the name that torch's gradient scaler uses
    optimizer.step()


def any_rank(accelerator: Accelerator, flag: Tensor) -> Tensor:
    """1.0 on every rank where the flag is true on any, else 0.0; stays on the device."""
    number = flag.float()
    if accelerator.num_processes > 1:
        number = accelerator.reduce(number, "sum").clamp(max=1)
    return number


def shard(accelerator: Accelerator, config: RunConfig, network: Any) -> None:
    """Deals out the weights over all ranks, in place: gathered block by block, freed again after each.

    The root is freed too, which is not FSDP2's default: whole weights that stay would be stale once averaged weights
    are put in their place. With bf16 the weights are gathered as such: the copies that autocast would make of gathered
    fp32 ones would be kept, whole, until the backward pass. Shards and inputs (times above all) stay fp32.
    """
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    dtype = torch.bfloat16 if config.mixed_precision == "bf16" else None
    policy = MixedPrecisionPolicy(dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    blocks = [m for m in network.modules() if type(m).__name__ in network._no_split_modules and m is not network]
    for module in [*reversed(blocks), network]:  # inner ones first
        fully_shard(module, mesh=mesh, reshard_after_forward=True, mp_policy=policy)


def whole(values: Any, keep: bool) -> Any:
    """Nested dicts and lists with whole tensors on the CPU for those in shards; every rank must call this.

    Ranks that do not `keep` the result get empty ones, and need no memory for it.
    """

    def gather(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, DTensor):
            return tensor
        full: Tensor = tensor.full_tensor().detach()
        return full.cpu() if keep else full.new_empty(0)

    return recursively_apply(gather, values)


def placed_like(value: Tensor, parameter: Tensor) -> Tensor:
    """A whole tensor, which every rank has, on the device of a parameter, and in shards if that is."""
    value = value.to(parameter.device)
    if not isinstance(parameter, DTensor):
        return value
    return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)


def placed_optimizer(state: Mapping[str, Any], parameters: Sequence[Tensor]) -> dict[str, Any]:
    """The state of an optimizer of these parameters (in its order) with every moment placed like its parameter."""
    placed = {
        index: {
            name: placed_like(value, parameters[index]) if value.shape == parameters[index].shape else value
            for name, value in moments.items()
        }
        for index, moments in state["state"].items()
    }
    return {**state, "state": placed}


def in_turns(items: Iterable[Item], accelerator: Accelerator) -> Iterator[tuple[int, Item, bool]]:
    """(number, item, whether it counts here) of every item that is this rank's turn.

    All ranks get equally many, since a network in shards needs all of them at once: where the last turn is not full,
    the ranks that are left over repeat its last item, and it does not count.
    """
    rank, numbered = accelerator.process_index, enumerate(items)
    while turn := list(itertools.islice(numbered, accelerator.num_processes)):
        number, item = turn[min(rank, len(turn) - 1)]
        yield number, item, rank < len(turn)


def own_rows(count: int, accelerator: Accelerator) -> list[int]:
    """Which of `count` rows this rank takes: every n-th, and the last one again for a rank that has none."""
    return list(range(count))[accelerator.process_index :: accelerator.num_processes] or [count - 1]


def gathered_rows(rows: Sequence[int], values: Tensor, count: int) -> Tensor:
    """[count, ...] on the CPU on every rank, of the rows [len(rows), ...] that each of them has."""
    result = values.new_empty((count, *values.shape[1:]), device="cpu")
    for indices, part in gather_object([(list(rows), values.cpu())]):
        result[indices] = part
    return result


def _on(name: str) -> bool:
    return os.environ.get(name, "").lower() in ("true", "1")
