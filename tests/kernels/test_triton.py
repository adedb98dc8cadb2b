"""The Triton kernels against the float64 reference: on a GPU where there is one, in Triton's interpreter elsewhere.

The interpreter must be chosen before the kernels are imported, so that it takes a pytest process of its own; it is
slow, so that shapes are tiny. What a compiler makes of the kernels: test_triton_compiled.py.
"""

import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from tests import reference
from tests.strategies import assert_close, exact, layouts, map_shapes, seeds, uniform
from wsseg_layers.kernels import (
    VARIANTS,
    VariantName,
    available_backends,
    bilateral_filter,
    pamr_affinity,
    pamr_propagate,
)
from wsseg_layers.kernels.filters import mean_field

pytest.importorskip("triton", reason="triton is not installed")
import triton
from torch._subclasses.fake_tensor import FakeTensorMode

from wsseg_layers.kernels.backends import find_backend
from wsseg_layers.kernels.backends import triton as backend
from wsseg_layers.kernels.backends.triton import affinities, launch, propagation
from wsseg_layers.kernels.variants import Variant

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
runs_kernels = pytest.mark.skipif(
    not INTERPRETED and not torch.cuda.is_available(), reason="no GPU: run by test_in_the_interpreter"
)

few = settings(max_examples=6 if INTERPRETED else 60)
# Not square, not a multiple of anything, the border within reach of every pixel, a repeated dilation.
dilation_lists = st.sampled_from([[1], [2, 5], [3, 3]])
dtypes = st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16])


@pytest.mark.skipif(INTERPRETED, reason="already in the interpreter")
@pytest.mark.skipif(
    tuple(map(int, triton.__version__.split(".")[:2])) < (3, 3),
    reason="the old interpreter stores no scalar",
)
def test_in_the_interpreter() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__]
    result = subprocess.run(
        command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.fixture
def unwritten_is_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill what the launchers allocate with NaN, so that a value that no program writes shows."""
    empty_like, new_empty = torch.empty_like, torch.Tensor.new_empty

    def filled(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor

    def empty_like_nan(*args: Any, **kwargs: Any) -> torch.Tensor:
        return filled(empty_like(*args, **kwargs))

    def new_empty_nan(*args: Any, **kwargs: Any) -> torch.Tensor:
        return filled(new_empty(*args, **kwargs))

    monkeypatch.setattr(torch, "empty_like", empty_like_nan)
    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty_nan)


@runs_kernels
@few
@given(map_shapes(max_channels=3, max_side=7), dilation_lists, st.sampled_from(list(VARIANTS)), dtypes, layouts, seeds)
def test_affinity_equals_the_definition(
    shape: tuple[int, ...], dilations: list[int], variant: VariantName, dtype: torch.dtype, layout: str, seed: int
) -> None:
    image = uniform(shape, dtype, layout, seed)
    expected = reference.pamr_affinity(exact(image), dilations, variant)
    actual = pamr_affinity(image.to(DEVICE), dilations, variant, backend="triton")
    assert_close(actual, expected, dtype=torch.float32, precision=torch.float32)


@runs_kernels
@few
@given(map_shapes(max_channels=9, max_side=7), dilation_lists, st.integers(1, 2), dtypes, layouts, seeds)
def test_propagation_equals_the_definition(
    shape: tuple[int, ...], dilations: list[int], num_iter: int, dtype: torch.dtype, layout: str, seed: int
) -> None:
    mask = uniform(shape, dtype, layout, seed)
    affinity = pamr_affinity(uniform((shape[0], 3, *shape[2:]), torch.float32, "contiguous", seed + 1), dilations)
    expected = reference.pamr_propagate(exact(mask), exact(affinity), dilations, num_iter)
    actual = pamr_propagate(mask.to(DEVICE), affinity.to(DEVICE), dilations, num_iter, backend="triton")
    assert actual.is_contiguous()
    assert_close(actual, expected, dtype=dtype, precision=dtype)


@runs_kernels
@few
@given(map_shapes(max_batch=1, max_side=4), dilation_lists, st.integers(1, 2), seeds)
def test_transposed_equals_the_transposed_definition(
    shape: tuple[int, ...], dilations: list[int], num_iter: int, seed: int
) -> None:
    mask = uniform(shape, torch.float64, "contiguous", seed).to(DEVICE).requires_grad_()
    affinity = uniform((shape[0], 8 * len(dilations), *shape[2:]), torch.float32, "contiguous", seed + 1).to(DEVICE)
    grad = uniform(shape, torch.float64, "sliced", seed + 2).to(DEVICE)
    gradients = [
        torch.autograd.grad(pamr_propagate(mask, affinity, dilations, num_iter, backend), mask, grad)[0]
        for backend in ("triton", "eager")  # PyTorch's is compared with the reference in test_propagate.py
    ]
    torch.testing.assert_close(*gradients)


@runs_kernels
@few
@given(
    map_shapes(max_channels=18, max_side=9), st.sampled_from([None, 0.05, 0.4]), st.booleans(), dtypes, layouts, seeds
)
def test_gaussian_sums_equal_the_definition(
    shape: tuple[int, ...], sigma_rgb: float | None, normalise: bool, dtype: torch.dtype, layout: str, seed: int
) -> None:
    values = uniform(shape, dtype, layout, seed)
    image = (
        None if sigma_rgb is None else uniform((shape[0], 3, *shape[2:]), torch.float32, layout, seed + 1).to(DEVICE)
    )
    sigmas = (2.3, sigma_rgb or 1.0)
    for b in range(shape[0]):
        one = None if image is None else exact(image[b])
        weights = reference.gaussian_weights(one, (shape[2], shape[3]), *sigmas)
        weights = reference.normalised_weights(weights) if normalise else weights
        expected = reference.filter_values(exact(values[b]), weights)[None]
        scale = max(1.0, expected.max())
        actual = bilateral_filter(values.to(DEVICE), image, *sigmas, normalise, "triton")[b : b + 1]
        assert_close(actual / scale, expected / scale, dtype=dtype, precision=dtype)


@runs_kernels
def test_mean_field_is_that_of_eager() -> None:
    image, logits = torch.rand(2, 3, 6, 9, device=DEVICE), torch.rand(2, 4, 6, 9, device=DEVICE).requires_grad_()
    image[1, 0, 2, 3] = torch.nan
    numbers = (2, 2.0, 1.5, 3.0, 0.4, 2.0)
    marginals = [mean_field(logits, image, *numbers, name) for name in ("triton", "eager")]
    torch.testing.assert_close(*marginals, equal_nan=True)
    torch.testing.assert_close(*(torch.autograd.grad(one[0, 0].sum(), logits)[0] for one in marginals), equal_nan=True)


@runs_kernels
@pytest.mark.usefixtures("unwritten_is_nan")
@pytest.mark.parametrize("shape", [(1, 5, 3, 4), (2, 2, 1, 6), (1, 1, 5, 1)])
def test_every_value_is_written(shape: tuple[int, ...]) -> None:
    mask = torch.rand(shape, device=DEVICE)
    affinity = pamr_affinity(mask, [1, 2], backend="triton")
    assert affinity.isfinite().all()
    assert pamr_propagate(mask, affinity, [1, 2], 2, backend="triton").isfinite().all()
    transposed = torch.ops.wsseg_layers.pamr_propagate_transposed(mask, affinity, [1, 2], 2, "triton")
    assert transposed.isfinite().all()


@runs_kernels
def test_a_new_form_is_an_entry_of_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(VARIANTS, "mine", Variant(2.0, 2, 2, guard=1.0, with_centre=False, position_weight=0.5))
    image = uniform((1, 2, 5, 6), torch.float64, "contiguous", seed=0)
    expected = reference.squared_affinity(exact(image), [1, 3], guard=1.0, weight=2.0, position_weight=0.5)
    actual = pamr_affinity(image.to(DEVICE), [1, 3], "mine", backend="triton")  # type: ignore[arg-type]
    assert_close(actual, expected, dtype=torch.float32, precision=torch.float32)


@runs_kernels
@pytest.mark.parametrize("variant", VARIANTS)
def test_affinity_of_little_contrast(variant: VariantName) -> None:
    # Eq. 8 divides by a square: even the nearest neighbour's exponent is far below what exp can hold.
    image = 1e-4 * uniform((1, 1, 5, 6), torch.float32, "contiguous", seed=0)
    expected = reference.pamr_affinity(exact(image), [1], variant)
    actual = pamr_affinity(image.to(DEVICE), [1], variant, backend="triton")
    assert_close(actual, expected, dtype=torch.float32, precision=torch.float32)


@runs_kernels
@pytest.mark.parametrize("variant", ["pamr", "paper"])
def test_is_uniform_where_the_image_is_flat(variant: VariantName) -> None:
    affinity = pamr_affinity(torch.full((1, 3, 4, 5), 1000.0, device=DEVICE), [1, 2], variant, backend="triton")
    torch.testing.assert_close(affinity, torch.full_like(affinity, 1 / 16), rtol=0, atol=1e-7)


@runs_kernels
@pytest.mark.parametrize("variant", [*VARIANTS, "constant scale"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_nan_and_inf_spread_as_with_pytorch(
    variant: VariantName, value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(VARIANTS, "constant scale", Variant(1.0, sigma_power=0))
    image = torch.rand(1, 2, 7, 6)
    image[0, 1, 3, 3] = value
    expected = pamr_affinity(image, [1, 3], variant, "eager")
    actual = pamr_affinity(image.to(DEVICE), [1, 3], variant, "triton").cpu()
    assert expected.isnan().any()
    torch.testing.assert_close(actual, expected, equal_nan=True)


@runs_kernels
@pytest.mark.parametrize("variant", VARIANTS)
def test_dilations_far_beyond_the_image(variant: VariantName) -> None:
    image, mask = torch.rand(1, 3, 4, 5), torch.rand(1, 2, 4, 5)
    dilations = [1, 2**31 - 1]
    expected = reference.pamr_affinity(exact(image), dilations, variant)
    affinity = pamr_affinity(image.to(DEVICE), dilations, variant, "triton")
    assert_close(affinity, expected, dtype=torch.float32, precision=torch.float32)
    refined = pamr_propagate(mask.to(DEVICE), affinity, dilations, 2, "triton")
    expected = reference.pamr_propagate(exact(mask), exact(affinity), dilations, 2)
    assert_close(refined, expected, dtype=torch.float32, precision=torch.float32)


@runs_kernels
@pytest.mark.parametrize("variant", VARIANTS)
def test_affinity_around_outliers(variant: VariantName) -> None:
    # One pixel far from neighbours that are nearly equal: exponents reach 10^9, and their differences decide.
    image = torch.rand(1, 2, 5, 6) * 1e-3
    image[0, :, 2, 3] = 1
    expected = reference.pamr_affinity(exact(image), [1, 2], variant)
    actual = pamr_affinity(image.to(DEVICE), [1, 2], variant, "triton")
    assert_close(actual, expected, dtype=torch.float32, precision=torch.float32)


@runs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("transposed", [False, True])
def test_counts_equal_a_loop_over_the_images(transposed: bool, dtype: torch.dtype) -> None:
    function = backend.propagate_transposed if transposed else backend.propagate
    counts = [5, 0, 9]
    mask = torch.rand(len(counts), 9, 2, 3, device=DEVICE).to(dtype)
    affinity = torch.rand(len(counts), 8, 2, 3, device=DEVICE)
    for b, count in enumerate(counts):
        mask[b, count:] = torch.nan  # not read
    expected = torch.zeros_like(mask)
    for b, count in enumerate(counts):
        if count > 0:
            one = slice(b, b + 1)
            expected[one, :count] = function(mask[one, :count], affinity[one], [1], 2)
    assert torch.equal(function(mask, affinity, [1], 2, torch.tensor(counts, device=DEVICE)), expected)


@runs_kernels
@pytest.mark.parametrize("shape", [(1, 1, 2, 70), (1, 2, 5, 1), (1, 1, 1, 1), (1, 1, 2, 2)])
def test_transposed_at_the_border(shape: tuple[int, ...]) -> None:
    # Ends of rows with more readers than a program has lanes; a pixel that is both ends of its row.
    grad, affinity = torch.rand(shape, dtype=torch.float64), torch.rand(shape[0], 8, *shape[2:])
    actual = backend.propagate_transposed(grad.to(DEVICE), affinity.to(DEVICE), [66], 1)
    expected = torch.ops.wsseg_layers.pamr_propagate_transposed(grad, affinity, [66], 1, "eager")
    torch.testing.assert_close(actual.cpu(), expected)


@pytest.fixture
def without_probe_results() -> Iterator[None]:
    backend._probe.cache_clear()
    yield
    backend._probe.cache_clear()


@pytest.mark.usefixtures("without_probe_results")
@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (RuntimeError("Failed to find C compiler.\nSet CC."), "RuntimeError: Failed to find C compiler."),
        (ImportError("no libcuda"), "ImportError: no libcuda"),
    ],
)
def test_a_kernel_that_fails_makes_the_backend_unavailable(
    error: Exception, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    probed: list[torch.device] = []

    def failing(device: torch.device) -> None:
        probed.append(device)
        raise error

    monkeypatch.setattr(launch, "probe", failing)
    device = torch.device("cuda")
    for _ in range(3):
        status = available_backends(device)[0]
        assert (status.name, status.usable) == ("triton", False)
        assert status.reason == f"cannot compile and run a kernel: {reason}"
    assert probed == [device]
    with pytest.raises(ValueError, match=f"backend='triton' is not usable on device 'cuda': .*{reason}"):
        find_backend("triton", device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert find_backend("auto", device) is not backend


@pytest.mark.usefixtures("without_probe_results")
@pytest.mark.parametrize("stub", [None, ModuleType("triton")])
def test_a_stub_is_not_triton(stub: ModuleType | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", stub)
    device = torch.device("cuda")
    assert backend.unavailable(device) == "needs the package triton, which is not installed"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert find_backend("auto", device) is not backend


@pytest.mark.usefixtures("without_probe_results")
def test_is_not_probed_while_a_graph_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(_: torch.device) -> None:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(launch, "probe", failing)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    device = torch.device("cuda")
    assert backend.unavailable(device) is None
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert backend.unavailable(device) == "cannot compile and run a kernel: RuntimeError: no compiler"
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert backend.unavailable(device) is not None  # known by now


@runs_kernels
@pytest.mark.usefixtures("without_probe_results")
def test_is_probed_with_real_tensors_while_fake_ones_are_traced() -> None:
    with FakeTensorMode():
        affinity = pamr_affinity(torch.rand(1, 3, 4, 5, device=DEVICE), [1], backend="triton")
    assert affinity.shape == (1, 8, 4, 5)


@pytest.mark.skipif(not torch.cuda.is_available() or INTERPRETED, reason="no GPU")
@pytest.mark.parametrize("shape", [(1, 21, 321, 321), (16, 21, 81, 81), (2, 150, 64, 96), (1, 1000, 33, 40)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_backends_agree_on_real_shapes(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    dilations = [1, 2, 4, 8, 12, 24]
    image = torch.rand(shape[0], 3, *shape[2:], device="cuda")
    mask = torch.rand(shape, device="cuda", dtype=dtype)
    affinity = {name: pamr_affinity(image, dilations, backend=name) for name in ("triton", "eager")}
    torch.testing.assert_close(affinity["triton"], affinity["eager"], rtol=1e-5, atol=1e-5)
    refined = {name: pamr_propagate(mask, affinity["eager"], dilations, 10, name) for name in ("triton", "eager")}
    tolerance = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    torch.testing.assert_close(refined["triton"], refined["eager"], rtol=tolerance, atol=tolerance)


@pytest.mark.skipif(not torch.cuda.is_available() or INTERPRETED, reason="no GPU")
def test_runs_in_a_cuda_graph() -> None:
    image, mask = torch.rand(2, 3, 40, 41, device="cuda"), torch.rand(2, 21, 40, 41, device="cuda")
    expected = pamr_propagate(mask, pamr_affinity(image, [1, 2]), [1, 2], 10)  # compiles, too
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        actual = pamr_propagate(mask, pamr_affinity(image, [1, 2]), [1, 2], 10)
    graph.replay()
    torch.testing.assert_close(actual, expected)


@pytest.mark.skipif(not torch.cuda.is_available() or INTERPRETED, reason="no GPU")
def test_more_than_2_to_the_31_values() -> None:
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("less than 24 GiB of GPU memory free")
    mask = torch.rand(2, 1100, 1024, 1024, device="cuda", dtype=torch.float16)  # 2.3e9 values
    affinity = torch.full((2, 8, 1024, 1024), 1 / 8, device="cuda")
    refined = pamr_propagate(mask, affinity, [1], 1)
    corner = torch.nn.functional.avg_pool2d(mask[1:, -1:, -3:, -3:].float(), 3) * 9 - mask[1:, -1:, -2:-1, -2:-1]
    torch.testing.assert_close(refined[1, -1, -2, -2].float(), corner.float().flatten()[0] / 8, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("channels", [1, 2, 4, 5, 19, 21, 60, 81, 150, 182, 1000])
@pytest.mark.parametrize("itemsize", [2, 4, 8])
@pytest.mark.parametrize("warp_size", [32, 64])
def test_a_thread_has_one_vector_and_few_threads_are_idle(channels: int, itemsize: int, warp_size: int) -> None:
    config = propagation.launch_config(channels, itemsize, warp_size)
    assert config["VECTOR"] * itemsize == 16
    threads = config["num_warps"] * warp_size
    assert threads * config["VECTOR"] == config["BLOCK_P"] * config["BLOCK_C"]
    assert threads <= 512
    rounded = -(-channels // config["VECTOR"]) * config["VECTOR"]
    assert -(-channels // config["BLOCK_C"]) * config["BLOCK_C"] <= rounded * 4 / 3


@pytest.mark.parametrize("dilations", [1, 2, 3, 6, 40, 600])
def test_affinity_tiles_hold_all_neighbours(dilations: int) -> None:
    config = affinities.launch_config(dilations, VARIANTS["pamr"])
    assert 8 * dilations <= config["BLOCK_N"] < 16 * dilations + 8
    assert config["BLOCK_P"] >= 1
