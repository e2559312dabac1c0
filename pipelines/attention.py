"""Which kernel computes attention: one setting that reaches every processor of a network, whatever its family.

diffusers' own switch (`set_attention_backend`) passes over the processors of Stable Diffusion, XL and 3, which call
torch's attention directly. Here every processor is wrapped instead: the choice is made around each call, so it holds
in the blocks that gradient checkpointing runs again, and for policy and reference alike.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from diffalign.errors import first_line
from diffalign.pipelines.user_attention import Decoupled
from diffalign.table import unknown

Attend = Callable[..., Tensor]  # the signature of torch.nn.functional.scaled_dot_product_attention
Around = contextlib.AbstractContextManager[Any]

TORCH_KERNELS: dict[str, SDPBackend] = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
PACKAGES: dict[str, str] = {  # name -> "module:function" with tensors [B, length, heads, width]
    "xformers": "xformers.ops:memory_efficient_attention",
    "flash_attn": "flash_attn:flash_attn_func",
    "flash_attn_3": "flash_attn_interface:flash_attn_func",
}
BACKENDS = ("auto", *TORCH_KERNELS, *PACKAGES)

HOPPER = (9, 0)
CUDNN_FIRST = (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)
LONG = 1024  # tokens from which on cuDNN's kernel pays

MASKS = ("attn_mask", "dropout_p", "is_causal")  # options of torch's attention that the packages are not wired up for
OPERATORS = {  # what each kernel is called when torch dispatches it
    "_scaled_dot_product_flash_attention": "flash",
    "_scaled_dot_product_flash_attention_for_cpu": "flash",
    "_scaled_dot_product_cudnn_attention": "cudnn",
    "_scaled_dot_product_efficient_attention": "efficient",
    "_softmax": "math",
    "_safe_softmax": "math",
}


def set_attention(network: torch.nn.Module, backend: str) -> None:
    """Makes every attention of the network use `backend` from now on; "auto" leaves the choice to `kernel_order`.

    Raises:
        ValueError: an unknown backend, or one that does not run on the network's device in its dtype.
    """
    first = next(network.parameters())
    require(backend, first.device, first.dtype)
    module: Any
    for module in network.modules():
        if hasattr(module, "set_processor"):
            owner = module.processor if isinstance(module.processor, Decoupled) else module
            inner = owner.processor
            owner.processor = routed(inner.inner if isinstance(inner, Routed) else inner, backend)


def require(backend: str, device: torch.device, dtype: torch.dtype) -> None:
    """Tries the backend out.

    Raises:
        ValueError: unknown, or it does not run here; names those that do.
    """
    if backend not in BACKENDS:
        raise unknown("attention", backend, BACKENDS)
    if reason := _why_not(backend, device, dtype):
        there = ", ".join(name for name in BACKENDS if not _why_not(name, device, dtype))
        raise ValueError(f"attention: {backend} does not run on this {device.type} in {_short(dtype)} ({reason}); "
                         f"what does: {there}")  # fmt: skip


def kernel_order(
    capability: tuple[int, int] | None, head_width: int, queries: int, keys: int
) -> tuple[SDPBackend, ...] | None:
    """Which of torch's kernels to try first; None leaves torch's own order: flash, memory-efficient, math.

    On Hopper cuDNN's kernel is 1.2 to 1.7 times as fast as torch's flash kernel for long sequences (head widths 64 and
    128, 1,024 tokens and more: FlashAttention-3 paper, figure 5), and slower on an A100 and for short ones, such as the
    77 tokens of a prompt.

    Args:
        capability: of the CUDA device; None on any other.
    """
    long = min(queries, keys) >= LONG
    if capability == HOPPER and long and head_width % 8 == 0 and head_width <= 128:
        return CUDNN_FIRST
    return None


class Routed:
    """A diffusers attention processor, called with the chosen kernel."""

    def __init__(self, inner: Any, backend: str) -> None:
        self.inner, self.backend = inner, backend

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, *args: Any, **options: Any
    ) -> Any:
        others = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        with self._around(attn, hidden_states, others):
            return self.inner(attn, hidden_states, encoder_hidden_states, *args, **options)

    def _around(self, attn: Any, queries: Tensor, keys: Tensor) -> Around:
        if self.backend != "auto":
            return using(self.backend)
        if not queries.is_cuda:
            return contextlib.nullcontext()
        # of joint attention both streams are queries and keys; the picture's alone decides whether they are long
        count = queries.shape[1] if getattr(attn, "added_kv_proj_dim", None) else keys.shape[1]
        capability = torch.cuda.get_device_capability(queries.device)
        order = kernel_order(capability, attn.inner_dim // attn.heads, queries.shape[1], count)
        return contextlib.nullcontext() if order is None else sdpa_kernel(list(order), set_priority=True)


def routed(inner: Any, backend: str) -> Routed:
    """A processor with the chosen kernel, which diffusers passes the keywords that it would pass the inner one."""
    kind: Any = type(inner)
    return _with_keywords_of(kind)(inner, backend)


@functools.cache
def _with_keywords_of(kind: Any) -> type[Routed]:
    """diffusers looks at the signature of a processor's call: rotary positions of CogVideoX are not given otherwise."""

    def call(self: Routed, *args: Any, **options: Any) -> Any:
        return Routed.__call__(self, *args, **options)

    vars(call)["__signature__"] = inspect.signature(kind.__call__)
    return type(f"Routed{kind.__name__}", (Routed,), {"__call__": call})


def using(backend: str) -> Around:
    """Inside the block torch's attention is computed by this backend, or fails."""
    if backend == "auto":
        return contextlib.nullcontext()
    if backend in TORCH_KERNELS:
        return sdpa_kernel([TORCH_KERNELS[backend]])
    return _Redirect(_from_package(backend, otherwise=_refuse_mask))


def preferring(backend: str) -> Around:
    """As `using`, for networks without processors: text encoders and rewards. Torch does what the backend cannot.

    A text encoder's mask is such a thing. Gradient checkpointing runs blocks again outside of this block: a network
    that is trained so takes `set_attention`.
    """
    if backend == "math":  # can do all; asked to prefer it, a CPU takes another one
        return using(backend)
    if backend in TORCH_KERNELS:
        others = [kernel for name, kernel in TORCH_KERNELS.items() if name != backend]
        return sdpa_kernel([TORCH_KERNELS[backend], *others], set_priority=True)
    if backend == "auto":
        return contextlib.nullcontext()
    return _Redirect(_from_package(backend, otherwise=F.scaled_dot_product_attention))


@contextlib.contextmanager
def counted_kernels() -> Iterator[Counter[str]]:
    """Counts the attention calls inside the block by the kernel that ran them: {"flash": 32}."""
    counter = _Counting()
    with counter:
        yield counter.found


class _Counting(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        if kernel := OPERATORS.get(func._schema.name.removeprefix("aten::")):
            self.found[kernel] += 1
        return func(*args, **(kwargs or {}))


class _Redirect(TorchFunctionMode):
    """Calls of torch's attention go to another function, which may call torch's own itself."""

    def __init__(self, attend: Attend) -> None:
        super().__init__()
        self.attend = attend

    def __torch_function__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        called = self.attend if func is F.scaled_dot_product_attention else func
        return called(*args, **(kwargs or {}))


def _from_package(name: str, otherwise: Attend) -> Attend:
    """torch's signature, [B, heads, length, width], around a package's function; with a mask `otherwise` is called."""
    module, _, function = PACKAGES[name].partition(":")
    compute = getattr(importlib.import_module(module), function)
    keyword = "scale" if name == "xformers" else "softmax_scale"

    def attend(query: Tensor, key: Tensor, value: Tensor, *args: Any, **options: Any) -> Tensor:
        if args or any(_given(options.get(option)) for option in MASKS):
            return otherwise(query, key, value, *args, **options)
        out: Tensor = compute(*(x.transpose(1, 2).contiguous() for x in (query, key, value)),
                              **{keyword: options.get("scale")})  # fmt: skip
        return out.transpose(1, 2)

    return attend


def _refuse_mask(*_: Any, **__: Any) -> Tensor:
    raise ValueError("attention: this backend is wired up for attention without a mask; use auto or efficient")


def _given(option: Any) -> bool:
    return isinstance(option, Tensor) or bool(option)


def _why_not(backend: str, device: torch.device, dtype: torch.dtype) -> str:
    """Empty when a small attention, forward and backward, runs on the device."""
    try:
        x = torch.zeros(1, 1, 16, 64, device=device, dtype=dtype, requires_grad=True)
        with using(backend), torch.enable_grad():
            F.scaled_dot_product_attention(x, x, x).sum().backward()
    except ImportError as error:
        return f"not installed: {error}"
    except (RuntimeError, NotImplementedError, ValueError) as error:
        return first_line(error, 150)
    return ""


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
