"""Regional compilation: the blocks that a network repeats are compiled, each kind once, and the rest is left as it is.

As fast as compiling the whole network and a tenth of the wait. diffusers' `compile_repeated_blocks` does the same for
networks that name their blocks, which SD3Transformer2DModel does not.
"""

from __future__ import annotations

import torch

COMPILED = ("BasicTransformerBlock", "JointTransformerBlock", "WanTransformerBlock", "CogVideoXBlock")
# of one kind of block: widths x adapters on and off x gradients on and off x shapes of training, validation, drawing
VARIANTS = 64


def compile_blocks(network: torch.nn.Module, backend: str = "inductor") -> int:
    """Compiles the network's repeated blocks in place, at their first call; returns how many there are.

    Args:
        backend: of torch.compile; "aot_eager" only traces, which tells in seconds whether inductor could compile.

    Raises:
        ValueError: the network has no block of a known kind.
    """
    blocks = [module for module in network.modules() if type(module).__name__ in COMPILED]
    if not blocks:
        raise ValueError(f"compile: expected a network with blocks of kind {', '.join(COMPILED)}, "
                         f"got {type(network).__name__}")  # fmt: skip
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, VARIANTS)
    for block in blocks:
        block.compile(dynamic=False, backend=backend)
    return len(blocks)


def compiled(network: torch.nn.Module) -> bool:
    """Whether `compile_blocks` was called on this network."""
    return any(module._compiled_call_impl is not None for module in network.modules())
