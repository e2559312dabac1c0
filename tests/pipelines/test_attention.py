"""One setting chooses the kernel of every attention of every family, and an honest error says what is there."""

import copy
import sys
import types
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from miniatures import FAMILIES
from torch import Tensor
from torch.nn.attention import SDPBackend

from diffalign.generation import generate
from diffalign.pipelines import load_pipeline
from diffalign.pipelines.attention import (
    BACKENDS,
    CUDNN_FIRST,
    PACKAGES,
    TORCH_KERNELS,
    Routed,
    counted_kernels,
    kernel_order,
    preferring,
    require,
    set_attention,
    using,
)
from diffalign.pipelines.base import LatentPipeline

HERE = ("flash", "math")  # the kernels that torch has for a CPU
PROMPTS = ["a red circle", "two blue squares"]
every_family = pytest.mark.parametrize("folder", [pytest.param(make, id=name) for name, make in FAMILIES.items()])
Make = Callable[[], Path]


def asked(pipe: LatentPipeline) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    x = torch.randn(2, *pipe.latent_shape(), generator=torch.Generator().manual_seed(0))
    return x, pipe.times(5)[1:3], pipe.encode_prompts(PROMPTS)


def attentions(pipe: LatentPipeline) -> int:
    return sum(isinstance(getattr(module, "processor", None), Routed) for module in pipe.network.modules())


@every_family
@pytest.mark.parametrize("backend", HERE)
def test_the_setting_reaches_every_processor_and_the_count_says_so(folder: Make, backend: str) -> None:
    pipe = load_pipeline(folder(), attention=backend)
    question = asked(pipe)
    with counted_kernels() as ran:
        pipe.predict(*question)
    assert attentions(pipe) > 1 and ran == {backend: attentions(pipe)}
    expected = load_pipeline(folder()).predict(*question)
    torch.testing.assert_close(pipe.predict(*question), expected, rtol=0, atol=1e-5)


@every_family
def test_it_holds_in_blocks_that_are_run_again_and_for_copies(folder: Make) -> None:
    pipe = load_pipeline(folder(), attention="math")
    pipe.network.enable_gradient_checkpointing()
    pipe.network.train()
    x, t, condition = asked(pipe)
    with counted_kernels() as ran:
        pipe.predict(x.requires_grad_(), t, condition).sum().backward()
    assert ran == {"math": ran.total()} and ran.total() > attentions(pipe)  # softmax's own backward has another name
    twin = copy.copy(pipe)
    twin.network = copy.deepcopy(pipe.network)
    set_attention(pipe.network, "flash")
    with torch.no_grad(), counted_kernels() as ran:
        twin.predict(x, t, condition)
    assert ran == {"math": attentions(pipe)}


def test_generate_draws_the_same_picture_with_every_kernel() -> None:
    folder = FAMILIES["sdxl"]()
    drawn = [generate(load_pipeline(folder, attention=kernel), PROMPTS, seeds=range(2), steps=3) for kernel in HERE]
    torch.testing.assert_close(*drawn, rtol=0, atol=1e-4)


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Stands in for packages that need a GPU: notes that it was called, and answers with torch's own attention."""
    calls: list[str] = []

    def answering(name: str, keyword: str) -> Callable[..., Tensor]:
        def attend(q: Tensor, k: Tensor, v: Tensor, **options: float | None) -> Tensor:
            assert q.is_contiguous() and set(options) == {keyword}
            calls.append(name)
            out = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), scale=options[keyword])
            return out.transpose(1, 2)

        return attend

    for name, place in PACKAGES.items():
        module, _, function = place.partition(":")
        made = types.ModuleType(module)
        setattr(made, function, answering(name, "scale" if name == "xformers" else "softmax_scale"))
        monkeypatch.setitem(sys.modules, module, made)
        if "." in module:
            monkeypatch.setitem(sys.modules, module.partition(".")[0], types.ModuleType(module.partition(".")[0]))
    return calls


@every_family
@pytest.mark.parametrize("backend", PACKAGES)
def test_a_package_is_given_every_attention(folder: Make, backend: str, package: list[str]) -> None:
    pipe = load_pipeline(folder(), attention=backend)
    package.clear()
    question = asked(pipe)
    ours = pipe.predict(*question)
    assert package == [backend] * attentions(pipe)
    torch.testing.assert_close(ours, load_pipeline(folder()).predict(*question), rtol=0, atol=1e-5)


def test_a_mask_is_refused_for_a_network_and_left_to_torch_elsewhere(package: list[str]) -> None:
    x = torch.randn(1, 2, 5, 8, generator=torch.Generator().manual_seed(0))
    expected = F.scaled_dot_product_attention(x, x, x, is_causal=True)
    with using("xformers"), pytest.raises(ValueError, match="without a mask"):
        F.scaled_dot_product_attention(x, x, x, is_causal=True)
    with preferring("xformers"):
        assert torch.equal(F.scaled_dot_product_attention(x, x, x, is_causal=True), expected)
        assert not package
        F.scaled_dot_product_attention(x, x, x)
        assert package == ["xformers"]
    mask = torch.ones(5, 5, dtype=torch.bool).tril()
    for kernel in (*HERE, "cudnn"):  # one that is not here as well: it is a preference
        with preferring(kernel):
            torch.testing.assert_close(F.scaled_dot_product_attention(x, x, x, attn_mask=mask), expected)


def test_what_does_not_run_here_is_an_error_that_names_what_does() -> None:
    for backend in ("cudnn", "efficient"):
        with pytest.raises(ValueError, match=rf"{backend} does not run on this cpu in float32 .*: auto, flash, math$"):
            load_pipeline(FAMILIES["sd"](), attention=backend)
    with pytest.raises(ValueError, match=r"flash_attn_3 does not run .*not installed: No module"):
        require("flash_attn_3", torch.device("cpu"), torch.float32)
    with pytest.raises(ValueError, match=r"unknown attention 'flsh', did you mean 'flash'\?"):
        require("flsh", torch.device("cpu"), torch.float32)


def test_cudnn_goes_first_for_long_sequences_on_hopper_and_nowhere_else() -> None:
    assert kernel_order((9, 0), 64, 4096, 4096) == CUDNN_FIRST and CUDNN_FIRST[0] == SDPBackend.CUDNN_ATTENTION
    assert kernel_order((9, 0), 64, 4096, 77) is None  # a prompt's 77 tokens
    assert kernel_order((9, 0), 160, 1024, 1024) is None  # wider than its kernel takes
    for capability in ((8, 0), (10, 0), (12, 0), None):
        assert kernel_order(capability, 64, 4096, 4096) is None


SHAPES = [  # (heads, queries, keys, width): SD1.5 and SDXL self and cross, SD3 joint, a video's
    pytest.param((8, 256, 256, 40), id="sd15"),
    pytest.param((10, 256, 77, 64), id="sdxl-cross"),
    pytest.param((10, 256, 256, 64), id="sdxl-self"),
    pytest.param((24, 397, 397, 64), id="sd3-joint"),
    pytest.param((12, 300, 300, 128), id="video"),
]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("backend", HERE)
def test_every_kernel_agrees_with_exact_attention_forward_and_backward(backend: str, shape: tuple[int, ...]) -> None:
    parity(backend, shape, torch.device("cpu"), torch.float32, 1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "auto"])
def test_every_kernel_agrees_on_a_gpu(backend: str, shape: tuple[int, ...]) -> None:
    device = torch.device("cuda")
    try:
        require(backend, device, torch.bfloat16)
    except ValueError as error:
        assert backend in ("cudnn", *PACKAGES), error  # torch has the others for every card
        pytest.skip(str(error))
    parity(backend, shape, device, torch.bfloat16, 2e-2)


def parity(backend: str, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype, allowed: float) -> None:
    """Output and gradients against softmax(q k / sqrt(d)) v in float64; largest difference over largest value."""
    heads, queries, keys, width = shape
    g = torch.Generator().manual_seed(0)
    exact = [torch.randn(1, heads, n, width, generator=g).to(dtype).double().requires_grad_()
             for n in (queries, keys, keys)]  # fmt: skip
    given = [x.detach().to(device, dtype).requires_grad_() for x in exact]
    q, k, v = exact
    expected = (q @ k.transpose(-1, -2) / width**0.5).softmax(-1) @ v
    with using(backend), counted_kernels() as ran:
        out = F.scaled_dot_product_attention(*given)
    assert backend in PACKAGES or ran == {backend: 1}
    pull = torch.randn(expected.shape, generator=g).to(dtype)
    expected.backward(pull.double())
    out.backward(pull.to(device))
    for ours, theirs in [(out, expected), *((a.grad, b.grad) for a, b in zip(given, exact, strict=True))]:
        assert (ours.double().cpu() - theirs).abs().max() <= allowed * theirs.abs().max()


def test_every_torch_kernel_has_a_row() -> None:
    assert set(TORCH_KERNELS) | set(PACKAGES) | {"auto"} == set(BACKENDS)
