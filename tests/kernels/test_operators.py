import doctest
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from tests.strategies import CPU_BACKENDS
from wsseg_layers import kernels
from wsseg_layers.kernels import pamr_affinity, pamr_propagate

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPES = [(2, 6, 7, 5), (1, 1, 1, 1), (0, 2, 4, 3), (1, 2, 9, 1)]
LAYOUTS = [torch.contiguous_format, torch.channels_last]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("variant", kernels.VARIANTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_opcheck_affinity(shape: tuple[int, ...], variant: str, backend: str, layout: torch.memory_format) -> None:
    image = torch.rand(shape).contiguous(memory_format=layout)
    opcheck(torch.ops.wsseg_layers.pamr_affinity.default, (image, [1, 2], variant, backend))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
@pytest.mark.parametrize("num_iter", [0, 2])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("name", ["pamr_propagate", "pamr_propagate_transposed"])
def test_opcheck_propagate(
    name: str, backend: str, shape: tuple[int, ...], num_iter: int, dtype: torch.dtype, layout: torch.memory_format
) -> None:
    mask = torch.rand(shape, dtype=dtype).contiguous(memory_format=layout).requires_grad_()
    affinity = pamr_affinity(torch.rand(shape), [1, 2])
    operator = getattr(torch.ops.wsseg_layers, name).default
    opcheck(operator, (mask, affinity, [1, 2], num_iter, backend))


@pytest.mark.parametrize("channels", [2, 21])
def test_compiles_without_a_graph_break(channels: int, device: torch.device) -> None:
    def refine(image: Tensor, mask: Tensor) -> Tensor:
        return 2 * pamr_propagate(mask, pamr_affinity(image, (1, 2)), (1, 2), 3)

    compiled = torch.compile(refine, fullgraph=True, backend="inductor" if device.type == "cuda" else "aot_eager")
    for height in (6, 9, 11):  # the second size makes the shapes dynamic
        image = torch.rand(2, 3, height, 7, device=device)
        mask = torch.rand(2, channels, height, 7, device=device, requires_grad=True)
        actual, expected = compiled(image, mask), refine(image, mask)
        torch.testing.assert_close(actual, expected)
        weight = torch.rand_like(expected)
        gradients = [torch.autograd.grad(result, mask, weight)[0] for result in (actual, expected)]
        torch.testing.assert_close(*gradients)


IMAGE, MASK, AFFINITY = torch.rand(2, 3, 5, 6), torch.rand(2, 4, 5, 6), torch.rand(2, 16, 5, 6)


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (TypeError, "image must be a torch.Tensor, got list", {"image": [1.0]}),
        (TypeError, "image must be a floating-point tensor, got torch.uint8", {"image": IMAGE.byte()}),
        (ValueError, r"image must have 4 dimensions .*\[3, 5, 6\]", {"image": IMAGE[0]}),
        (ValueError, r"image must have at least one channel .*\[2, 0, 5, 6\]", {"image": IMAGE[:, :0]}),
        (ValueError, r"image must have at least one .* pixel.*\[2, 3, 0, 6\]", {"image": IMAGE[:, :, :0]}),
        (TypeError, "dilations must be a sequence of integers, got 3", {"dilations": 3}),
        (ValueError, "dilations must hold at least one", {"dilations": []}),
        (ValueError, r"dilations\[1\] must be at least 1, got 0", {"dilations": [1, 0]}),
        (ValueError, r"dilations\[0\] must be at least 1, got -2", {"dilations": [-2]}),
        (TypeError, r"dilations\[0\] must be an integer, got 1.5", {"dilations": [1.5]}),
        (ValueError, "variant must be one of 'pamr', 'paper', 'par', got 'PAMR'", {"variant": "PAMR"}),
        (ValueError, "backend must be one of 'auto', 'triton', 'cpp', 'torch', got 'cuda'", {"backend": "cuda"}),
    ],
)
def test_affinity_says_what_is_wrong(error: type[Exception], message: str, arguments: dict[str, Any]) -> None:
    with pytest.raises(error, match=message):
        pamr_affinity(**{"image": IMAGE, "dilations": [1, 2], **arguments})


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (TypeError, "mask must be a floating-point tensor, got torch.int64", {"mask": MASK.long()}),
        (ValueError, r"mask must have 4 dimensions .*\[5, 6\]", {"mask": MASK[0, 0]}),
        (ValueError, r"mask must have at least one channel .*\[2, 0, 5, 6\]", {"mask": MASK[:, :0]}),
        (TypeError, "affinity must be a floating-point tensor, got torch.bool", {"affinity": AFFINITY > 0}),
        (ValueError, r"affinity must have 4 dimensions .*\[16, 5, 6\]", {"affinity": AFFINITY[0]}),
        (ValueError, "affinity must have 8 channels for each of 1 dilations", {"dilations": [1]}),
        (ValueError, "mask and affinity must have the same batch size", {"affinity": AFFINITY[:1]}),
        (ValueError, "mask and affinity must have the same height and width", {"affinity": AFFINITY[:, :, 1:]}),
        (ValueError, "mask and affinity must be on one device, .* on meta", {"affinity": AFFINITY.to("meta")}),
        (ValueError, "affinity must not require a gradient", {"affinity": AFFINITY.clone().requires_grad_()}),
        (ValueError, "num_iter must be at least 0, got -1", {"num_iter": -1}),
        (ValueError, "num_iter must be at most 2147483647, got 2147483648", {"num_iter": 2**31}),
        (TypeError, "num_iter must be an integer, got 2.0", {"num_iter": 2.0}),
        (TypeError, "num_iter must be an integer, got True", {"num_iter": True}),
        (ValueError, "backend must be one of 'auto', 'triton', 'cpp', 'torch', got None", {"backend": None}),
    ],
)
def test_propagate_says_what_is_wrong(error: type[Exception], message: str, arguments: dict[str, Any]) -> None:
    with pytest.raises(error, match=message):
        pamr_propagate(**{"mask": MASK, "affinity": AFFINITY, "dilations": [1, 2], "num_iter": 1, **arguments})


@pytest.mark.parametrize(
    ("device", "triton", "compiler", "chosen"),
    [
        ("cuda", True, True, "triton"),
        ("cuda", False, True, "torch"),
        ("cpu", True, True, "cpp"),
        ("cpu", True, False, "torch"),
        ("meta", True, True, "torch"),
    ],
)
def test_auto_is_the_fastest_that_runs(
    device: str, triton: bool, compiler: bool, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "_TRITON_INSTALLED", triton)
    monkeypatch.setattr(kernels.cpp_library, "load", lambda: object() if compiler else None)
    assert kernels._implementation("auto", torch.device(device)) == chosen
    assert kernels._implementation(chosen, torch.device(device)) == chosen


def test_says_why_cpp_is_not_available(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="backend='cpp' needs tensors on the CPU, got mask on meta"):
        pamr_propagate(MASK.to("meta"), AFFINITY.to("meta"), [1, 2], 1, backend="cpp")
    monkeypatch.setattr(kernels.cpp_library, "load", lambda: None)
    for operation in (
        lambda: pamr_affinity(IMAGE, [1, 2], backend="cpp"),
        lambda: pamr_propagate(MASK, AFFINITY, [1, 2], 1, backend="cpp"),
    ):
        with pytest.raises(ValueError, match=r"backend='cpp' needs Linux and a C\+\+ compiler"):
            operation()


def test_says_why_triton_is_not_available(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_TRITON_INSTALLED", True)
    with pytest.raises(ValueError, match="backend='triton' needs tensors on a CUDA or ROCm device, got image on cpu"):
        pamr_affinity(IMAGE, [1, 2], backend="triton")
    monkeypatch.setattr(kernels, "_TRITON_INSTALLED", False)
    with pytest.raises(ValueError, match="needs the package triton, which is not installed"):
        pamr_propagate(MASK, AFFINITY, [1, 2], 1, backend="triton")


def test_import_needs_no_triton() -> None:
    code = "import sys; sys.modules['triton'] = None; import wsseg_layers.kernels"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_import_leaves_triton_alone() -> None:
    code = """import sys, torch
before = "triton" in sys.modules
import wsseg_layers.kernels
assert ("triton" in sys.modules) == before"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_examples_in_the_docstrings() -> None:
    # Not by pytest --doctest-modules: it would import kernels/ under a second name and register the operators twice.
    failures, examples = doctest.testmod(kernels)
    assert examples > 0
    assert failures == 0
