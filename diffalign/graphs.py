"""A piece of work on tensors of fixed shapes, recorded once as a CUDA graph and replayed.

A training step of SDXL launches about 11,000 kernels; at one pair a step that takes Python longer than the GPU takes to
run them. A replay is one launch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

Batch = TypeVar("Batch", bound=Any)
Tensors = Mapping[str, Tensor]
Work = Callable[[Tensors], Tensors]
Replay = Callable[[], None]
Record = Callable[[Callable[[], None]], Replay]

WARM_UP = 3  # runs before recording: libraries choose their kernels and allocate in the first


@dataclass(frozen=True)
class _Recording:
    inputs: dict[str, Tensor]  # where the graph reads
    outputs: dict[str, Tensor]  # where it writes
    replay: Replay


class Graphed:
    """`work` with the same results, replayed: one recording for each set of shapes that it is called with.

    Args:
        work: from named tensors to named tensors; it may add to the gradients of `parameters`, and must neither read a
            number back nor draw from a generator (noise is an input).
        parameters: whose gradients the work adds to. They get gradients of zero where they have none, which must stay
            in place: `optimizer.zero_grad(set_to_none=False)`.
        record: how a function is recorded; a CUDA graph if not given.
    """

    def __init__(self, work: Work, parameters: Sequence[Tensor] = (), record: Record | None = None) -> None:
        self.work, self.parameters = work, parameters
        self.record = record or cuda_graph
        self._recordings: dict[tuple[tuple[object, ...], ...], _Recording] = {}

    def __call__(self, inputs: Tensors) -> dict[str, Tensor]:
        key = tuple((name, tuple(value.shape), value.dtype) for name, value in sorted(inputs.items()))
        if key not in self._recordings:
            self._recordings[key] = self._recorded(inputs)
        recording = self._recordings[key]
        for name, value in inputs.items():
            recording.inputs[name].copy_(value, non_blocking=True)
        recording.replay()
        return {name: value.clone() for name, value in recording.outputs.items()}

    def _recorded(self, inputs: Tensors) -> _Recording:
        static = {name: value.clone() for name, value in inputs.items()}
        outputs: dict[str, Tensor] = {}

        def run() -> None:
            outputs.update({name: value.detach() for name, value in self.work(static).items()})

        for parameter in self.parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        kept = [parameter.grad.clone() for parameter in self.parameters if parameter.grad is not None]
        replay = self.record(run)
        for parameter, grad in zip(self.parameters, kept, strict=True):  # what warming up has added
            assert parameter.grad is not None
            parameter.grad.copy_(grad)
        return _Recording(static, outputs, replay)


def graphed(work: Callable[[Any], Tensors], parameters: Sequence[Tensor], record: Record | None = None) -> Any:
    """`Graphed` for work on a dataclass of tensors, and of mappings of them, such as `Noised`.

    What else is in the dataclass has to stay as it is at the first call.
    """
    recordings: dict[tuple[str, ...], Graphed] = {}

    def call(batch: Any) -> dict[str, Tensor]:
        tensors = named_tensors(batch)
        if (names := tuple(tensors)) not in recordings:
            recordings[names] = Graphed(lambda given: work(with_tensors(batch, given)), parameters, record)
        return recordings[names](tensors)

    return call


def named_tensors(batch: Any) -> dict[str, Tensor]:
    """The tensors of a dataclass: {"x_t": ..., "condition.prompt_embeds": ...}."""
    found: dict[str, Tensor] = {}
    for entry in dataclasses.fields(batch):
        value = getattr(batch, entry.name)
        if isinstance(value, Tensor):
            found[entry.name] = value
        elif isinstance(value, Mapping):
            found |= {f"{entry.name}.{name}": inner for name, inner in value.items()}
    return found


def with_tensors(batch: Batch, tensors: Tensors) -> Batch:
    """The same dataclass with other tensors, named as by `named_tensors`."""
    changed: dict[str, Any] = {}
    for entry in dataclasses.fields(batch):
        value = getattr(batch, entry.name)
        if isinstance(value, Tensor):
            changed[entry.name] = tensors[entry.name]
        elif isinstance(value, Mapping):
            changed[entry.name] = {name: tensors[f"{entry.name}.{name}"] for name in value}
    return dataclasses.replace(batch, **changed)


def cuda_graph(run: Callable[[], None]) -> Replay:
    """Records `run` on the current CUDA device, after some runs on a stream of its own."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    torch.clear_autocast_cache()  # a cast that is remembered from before would not be part of the recording
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    torch.clear_autocast_cache()
    return graph.replay
