"""What hypothesis draws: shapes, dtypes, memory layouts and tensors; how close a result must be; the backends."""

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from wsseg_layers.kernels import BackendName
from wsseg_layers.kernels.backends.cpp import library

# One table for all tests, relative and absolute: a few roundings of the dtype in which the result is returned.
TOLERANCES = {
    torch.float64: 1e-10,
    torch.float32: 1e-5,
    torch.float16: 4e-3,
    torch.bfloat16: 3e-2,
}
DTYPES = tuple(TOLERANCES)
LAYOUTS = ("contiguous", "channels_last", "transposed", "sliced")

needs_compiler = pytest.mark.skipif(library.load() is None, reason="no C++ compiler")
CPU_BACKENDS: tuple[BackendName, ...] = ("cpp", "eager") if library.load() else ("eager",)

backends = st.sampled_from(CPU_BACKENDS)
dtypes = st.sampled_from(DTYPES)
layouts = st.sampled_from(LAYOUTS)
seeds = st.integers(0, 2**32 - 1)


@st.composite
def map_shapes(draw: st.DrawFn, max_batch: int = 2, max_channels: int = 5, max_side: int = 9) -> tuple[int, ...]:
    """Shapes [B, C, h, w], square or not, down to a single pixel."""
    return (
        draw(st.integers(1, max_batch)),
        draw(st.integers(1, max_channels)),
        draw(st.integers(1, max_side)),
        draw(st.integers(1, max_side)),
    )


def lay_out(tensor: Tensor, layout: str) -> Tensor:
    """Return equal values [B, C, h, w] in another memory layout."""
    if layout == "channels_last":
        return tensor.contiguous(memory_format=torch.channels_last)
    if layout == "transposed":
        return tensor.transpose(2, 3).contiguous().transpose(2, 3)
    if layout == "sliced":
        # Every second row of a larger tensor whose other values are NaN, so that reading one of them shows.
        batch, channels, height, width = tensor.shape
        larger = tensor.new_full((batch, channels, 2 * height, width + 2), torch.nan)
        view = larger[:, :, ::2, 1:-1]
        view.copy_(tensor)
        return view
    return tensor.contiguous()


def uniform(shape: tuple[int, ...], dtype: torch.dtype, layout: str, seed: int) -> Tensor:
    """Values in [0, 1), as masks and images have them."""
    values = np.random.default_rng(seed).random(shape)
    return lay_out(torch.from_numpy(values).to(dtype), layout)


def normal(shape: tuple[int, ...], dtype: torch.dtype, layout: str, seed: int) -> Tensor:
    """Normal values, as scores and features have them."""
    values = np.random.default_rng(seed).normal(size=shape)
    return lay_out(torch.from_numpy(values).to(dtype), layout)


def exact(tensor: Tensor) -> NDArray[np.float64]:
    """Return the very values of a tensor, of any dtype, for the reference."""
    return tensor.detach().cpu().double().numpy()


def assert_close(actual: Tensor, expected: NDArray[np.float64], dtype: torch.dtype, precision: torch.dtype) -> None:
    """Compare a result with the reference: its dtype exactly, its values as closely as `precision` allows."""
    assert actual.dtype == dtype
    tolerance = TOLERANCES[precision]
    torch.testing.assert_close(actual.cpu().double(), torch.from_numpy(expected), rtol=tolerance, atol=tolerance)
