"""The Triton kernels against the float64 reference: on a GPU where there is one, in Triton's interpreter elsewhere.

The interpreter must be chosen before the kernels are imported, so that it takes a pytest process of its own; it is
slow, so that shapes are tiny. What a compiler makes of the kernels: test_triton_compiled.py.
"""

import os
import subprocess
import sys
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from tests import reference
from tests.strategies import assert_close, exact, layouts, map_shapes, seeds, uniform
from wsseg_layers.kernels import VARIANTS, VariantName, bilateral_filter, pamr_affinity, pamr_propagate
from wsseg_layers.kernels.filters import mean_field

pytest.importorskip("triton", reason="triton is not installed")
from wsseg_layers.kernels.backends.triton import affinities, propagation
from wsseg_layers.kernels.variants import Variant

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
runs_kernels = pytest.mark.skipif(
    not INTERPRETED and not torch.cuda.is_available(), reason="no GPU: run by test_in_the_interpreter"
)
pytestmark = pytest.mark.usefixtures("one_thread")

few = settings(max_examples=6 if INTERPRETED else 60)
# Not square, not a multiple of anything, the border within reach of every pixel, a repeated dilation.
dilation_lists = st.sampled_from([[1], [2, 5], [3, 3]])
dtypes = st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16])


@pytest.mark.skipif(INTERPRETED, reason="already in the interpreter")
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

    def empty_like_nan(*args: Any, **kwargs: Any) -> torch.Tensor:
        return empty_like(*args, **kwargs).fill_(torch.nan)

    def new_empty_nan(*args: Any, **kwargs: Any) -> torch.Tensor:
        return new_empty(*args, **kwargs).fill_(torch.nan)

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
@given(map_shapes(max_channels=5, max_side=5), dilation_lists, st.integers(1, 2), seeds)
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
def test_tiles_waste_little(channels: int, itemsize: int) -> None:
    config = propagation.launch_config(channels, itemsize)
    vector = 16 // itemsize
    blocks = -(-config["CHANNELS"] // config["BLOCK_C"])
    assert channels <= config["CHANNELS"] < channels + vector
    assert config["CHANNELS"] % vector == 0
    assert blocks * config["BLOCK_C"] < 1.125 * channels + vector
    assert 512 <= config["BLOCK_P"] * config["BLOCK_C"] <= 2048


@pytest.mark.parametrize("dilations", [1, 2, 3, 6, 40, 600])
def test_affinity_tiles_hold_all_neighbours(dilations: int) -> None:
    config = affinities.launch_config(range(1, dilations + 1), VARIANTS["pamr"])
    assert 8 * dilations <= config["BLOCK_N"] < 16 * dilations + 8
    assert config["BLOCK_P"] >= 1
