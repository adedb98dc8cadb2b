import doctest
import os
import subprocess
import sys
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from tests.strategies import CPU_BACKENDS
from wsseg_layers import kernels
from wsseg_layers.kernels import (
    BackendName,
    VariantName,
    backends,
    filters,
    operators,
    pamr_affinity,
    pamr_propagate,
    variants,
)
from wsseg_layers.kernels.backends import BACKENDS, find_backend

SHAPES = [(2, 6, 7, 5), (1, 1, 1, 1), (0, 2, 4, 3), (1, 2, 9, 1)]
LAYOUTS = [torch.contiguous_format, torch.channels_last]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("variant", kernels.VARIANTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_opcheck_affinity(
    shape: tuple[int, ...], variant: VariantName, backend: BackendName, layout: torch.memory_format
) -> None:
    image = torch.rand(shape).contiguous(memory_format=layout)
    opcheck(torch.ops.wsseg_layers.pamr_affinity.default, (image, [1, 2], *kernels.VARIANTS[variant], backend))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
@pytest.mark.parametrize("num_iter", [0, 2])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("name", ["pamr_propagate", "pamr_propagate_transposed"])
def test_opcheck_propagate(
    name: str,
    backend: BackendName,
    shape: tuple[int, ...],
    num_iter: int,
    dtype: torch.dtype,
    layout: torch.memory_format,
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
        (ValueError, "backend must be one of 'auto', 'triton', 'cpp', 'eager', got 'cuda'", {"backend": "cuda"}),
    ],
)
def test_errors_of_affinity(error: type[Exception], message: str, arguments: dict[str, Any]) -> None:
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
        (ValueError, "mask must have the same batch size as affinity, or a multiple of it", {"mask": MASK[:1]}),
        (ValueError, "mask and affinity must have the same height and width", {"affinity": AFFINITY[:, :, 1:]}),
        (ValueError, "mask and affinity must be on one device, .* on meta", {"affinity": AFFINITY.to("meta")}),
        (ValueError, "affinity must not require a gradient", {"affinity": AFFINITY.clone().requires_grad_()}),
        (ValueError, "num_iter must be at least 0, got -1", {"num_iter": -1}),
        (ValueError, "num_iter must be at most 2147483647, got 2147483648", {"num_iter": 2**31}),
        (TypeError, "num_iter must be an integer, got 2.0", {"num_iter": 2.0}),
        (TypeError, "num_iter must be an integer, got True", {"num_iter": True}),
        (ValueError, "backend must be one of 'auto', 'triton', 'cpp', 'eager', got None", {"backend": None}),
    ],
)
def test_errors_of_propagate(error: type[Exception], message: str, arguments: dict[str, Any]) -> None:
    with pytest.raises(error, match=message):
        pamr_propagate(**{"mask": MASK, "affinity": AFFINITY, "dilations": [1, 2], "num_iter": 1, **arguments})


def test_auto_is_the_first_usable_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    reasons = {"triton": "has no driver", "cpp": "has no compiler", "eager": None}
    for name, reason in reasons.items():
        monkeypatch.setattr(BACKENDS[name], "unavailable", lambda _, reason=reason: reason)
    assert find_backend("auto", torch.device("meta")) is BACKENDS["eager"]
    monkeypatch.setattr(BACKENDS["cpp"], "unavailable", lambda _: None)
    assert find_backend("auto", torch.device("cpu")) is BACKENDS["cpp"]
    monkeypatch.setattr(BACKENDS["triton"], "unavailable", lambda _: None)
    assert find_backend("auto", torch.device("cuda")) is BACKENDS["triton"]


def test_says_once_that_only_pytorch_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BACKENDS["triton"], "unavailable", lambda _: "runs on CUDA and ROCm devices only")
    monkeypatch.setattr(BACKENDS["cpp"], "unavailable", lambda _: "needs a C++ compiler")
    backends._warn_once.cache_clear()
    with pytest.warns(UserWarning, match=r"plain PyTorch on device type 'cpu'.*'cpp' needs a C\+\+ compiler"):
        pamr_affinity(IMAGE, [1, 2])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pamr_affinity(IMAGE, [1, 2])
    backends._warn_once.cache_clear()


@pytest.mark.parametrize("name", ["triton", "cpp"])
def test_says_why_a_backend_is_not_usable(name: BackendName, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BACKENDS[name], "unavailable", lambda _: "is not installed")
    for operation in (
        lambda: pamr_affinity(IMAGE, [1, 2], backend=name),
        lambda: pamr_propagate(MASK, AFFINITY, [1, 2], 1, backend=name),
        lambda: pamr_propagate(MASK, AFFINITY, [1, 2], 0, backend=name),
    ):
        with pytest.raises(ValueError, match=f"backend='{name}' is not usable on device 'cpu': is not installed"):
            operation()


def test_backends_refuse_devices_that_they_do_not_run_on() -> None:
    if os.environ.get("TRITON_INTERPRET") != "1":
        with pytest.raises(ValueError, match="backend='triton' is not usable on device 'cpu': runs on CUDA and ROCm"):
            pamr_affinity(IMAGE, [1, 2], backend="triton")
    with pytest.raises(ValueError, match="backend='cpp' is not usable on device 'meta': runs on CPUs only"):
        pamr_propagate(MASK.to("meta"), AFFINITY.to("meta"), [1, 2], 1, backend="cpp")


def test_the_list_of_backends_names_the_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BACKENDS["cpp"], "unavailable", lambda _: "needs a C++ compiler")
    rows = {row.name: row for row in kernels.available_backends("cpu")}
    assert list(rows) == list(BACKENDS)
    assert rows["cpp"] == ("cpp", False, "needs a C++ compiler")
    assert rows["eager"] == ("eager", True, None)


def test_the_first_call_imports_nothing_of_torch() -> None:
    # torch._dynamo alone takes 2 s to import, and torch.onnx 0.1 s.
    code = """import sys, torch
from wsseg_layers import PAMR, PAR, DenseCRF
before = set(sys.modules)
image, mask = torch.rand(1, 3, 5, 6), torch.rand(1, 2, 5, 6, requires_grad=True)
for layer in (PAMR(), PAR(), DenseCRF()):
    layer(image, mask).sum().backward()
assert not [name for name in set(sys.modules) - before if name.startswith("torch")], set(sys.modules) - before"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_examples_in_the_docstrings() -> None:
    # Not by pytest --doctest-modules: it would import kernels/ under a second name and register the operators twice.
    for module in (operators, filters, backends, variants):
        failures, examples = doctest.testmod(module)
        assert examples > 0
        assert failures == 0
