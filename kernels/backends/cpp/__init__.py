"""Affinity and propagation in C++ (kernels.cpp), for CPUs: image by image, maps laid out as the C++ reads them."""

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from ...neighbourhood import neighbour_offsets
from ...variants import Variant, position_affinity
from ..eager import mean_field_gradient, propagate_transposed
from . import library
from .lattice import make_filter, mean_field

__all__ = [
    "affinity",
    "empty_affinity",
    "make_filter",
    "mean_field",
    "mean_field_gradient",
    "propagate",
    "propagate_transposed",
    "unavailable",
]

# The narrowest map that kernels.cpp reads without a look at the width.
MIN_WIDTH = 32
# Weights up to this size stay in the last-level cache from one iteration to the next, beside small chunks of channels.
# Larger ones come from memory every time, and as many channels should share them as the extra memory may hold.
CACHED_WEIGHTS_BYTES = 24 * 2**20
CHUNK_BYTES, CHUNK_BYTES_FROM_MEMORY = 4 * 2**20, 24 * 2**20


def unavailable(device: torch.device) -> str | None:
    """Return why the C++ does not run on a device, or None if it does."""
    if device.type != "cpu":
        return "runs on CPUs only"
    if library.load() is None:
        return "needs Linux and a C++ compiler: c++, or the one that the environment variable CXX names"
    return None


def empty_affinity(image: Tensor, neighbours: int) -> Tensor:
    """Return weights [B, N, H, W] for an image [B, K, H, W]. In memory [B, H, N, W]: a row's weights lie together."""
    batch, _, height, width = image.shape
    return image.new_empty((batch, height, neighbours, width), dtype=torch.float32).transpose(1, 2)


def affinity(image: Tensor, dilations: Sequence[int], variant: Variant, out: Tensor) -> None:
    """Fill `out`, of `empty_affinity`, with the affinity of an image [B, K, H, W]."""
    reach, neighbours = _neighbours(dilations, image.shape[3])
    position = (ctypes.c_double * neighbours.count)()
    if variant.position_weight:
        position[:] = position_affinity(neighbour_offsets(dilations), variant).tolist()
    parameters = library.Variant(
        variant.guard, variant.weight, variant.samples(len(dilations)), variant.sigma_power, variant.power, position
    )
    dtype = torch.float64 if variant.in_double else torch.float32
    compute = getattr(library.load(), f"affinity_{library.REALS[dtype]}")
    for one, weights in zip(image, out, strict=True):
        padded, size = _padded(one, reach, dtype)
        compute(padded.data_ptr(), weights.data_ptr(), size, neighbours, parameters, torch.get_num_threads())


def propagate(mask: Tensor, affinity: Tensor, dilations: Sequence[int], num_iter: int) -> Tensor:
    """Return the mask [B, C, H, W] after `num_iter` weighted sums over the neighbours: contiguous, in its own dtype."""
    _, channels, height, width = mask.shape
    reach, neighbours = _neighbours(dilations, width)
    dtype = torch.promote_types(mask.dtype, torch.float32)
    compute = getattr(library.load(), f"propagate_{library.REALS[dtype]}")
    result = torch.empty_like(mask, memory_format=torch.contiguous_format)
    rows = affinity.transpose(1, 2).to(dtype).contiguous()  # no copy of what `affinity` above has made
    chunk_bytes = CHUNK_BYTES if rows[0].nbytes <= CACHED_WEIGHTS_BYTES else CHUNK_BYTES_FROM_MEMORY
    chunks = min(channels, -(-channels * height * width * dtype.itemsize // chunk_bytes))
    for image_mask, weights, image_result in zip(mask, rows, result, strict=True):
        for chunk, refined in zip(image_mask.chunk(chunks), image_result.chunk(chunks), strict=True):
            padded, size = _padded(chunk, reach, dtype)
            tables = [padded, torch.empty_like(padded)]
            compute(
                *(table.data_ptr() for table in tables),
                weights.data_ptr(),
                size,
                neighbours,
                num_iter,
                torch.get_num_threads(),
            )
            refined.copy_(tables[num_iter % 2][:, :, reach : reach + width].transpose(0, 1))
    return result


def _neighbours(dilations: Sequence[int], width: int) -> tuple[int, library.Neighbours]:
    """Return how far neighbours are to the sides, and their offsets. Farther than the width, all is border."""
    reach = min(max(dilations), width)
    dy, dx = zip(*neighbour_offsets(dilations), strict=True)
    array = ctypes.c_int64 * len(dy)
    return reach, library.Neighbours(len(dy), array(*dy), array(*(max(-reach, min(x, reach)) for x in dx)))


def _padded(maps: Tensor, reach: int, dtype: torch.dtype) -> tuple[Tensor, library.Map]:
    """Return maps [C, H, W] as kernels.cpp stores them, [H, C, pitch], the border replicated to both sides."""
    channels, height, width = maps.shape
    padded = maps.new_empty(height, channels, 2 * reach + max(width, MIN_WIDTH), dtype=dtype)
    left, image, right = padded.tensor_split((reach, reach + width), dim=2)
    image.copy_(maps.transpose(0, 1))
    left.copy_(image[:, :, :1].expand_as(left))
    right.copy_(image[:, :, -1:].expand_as(right))
    return padded, library.Map(channels, height, width, reach, padded.shape[2])
