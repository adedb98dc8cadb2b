"""Affinity and propagation in C++ (affinity.cpp, propagation.cpp), for CPUs."""

import ctypes
import functools
import os
from collections.abc import Sequence

import torch
from torch import Tensor

from ...neighbourhood import neighbour_offsets
from ...variants import Variant, position_affinity
from ..eager import mean_field_gradient
from . import interface, library
from .labels import choose_labels, resize
from .lattice import make_filter, mean_field

__all__ = [
    "affinity",
    "choose_labels",
    "empty_affinity",
    "make_filter",
    "mean_field",
    "mean_field_gradient",
    "propagate",
    "propagate_transposed",
    "resize",
    "unavailable",
]

# Weights up to this size stay in the last-level cache from one iteration to the next, beside small chunks of channels.
# Larger ones come from memory in every iteration, so a chunk has as many channels as the extra memory allows.
CACHED_WEIGHTS_BYTES = 24 * 2**20
CHUNK_BYTES, CHUNK_BYTES_FROM_MEMORY = 4 * 2**20, 24 * 2**20

# A row of pixels reads 13 rows (6 dilations). For 12 channels, they and the weights fit a first-level cache of 48 KiB.
GROUP, GROUP_OF_SMALL_CACHE, GROUP_CACHE_BYTES = 12, 6, 48 * 2**10

# Below this factor of sigma, squares of float32 are not exact enough.
LEAST_WEIGHT = 0.1

# The numbers of the types of weights in propagation.cpp.
TYPES = {torch.float64: 0, torch.float32: 1, torch.float16: 2, torch.bfloat16: 3}


def unavailable(device: torch.device) -> str | None:
    """Return why the C++ does not run on a device, or None if it does."""
    if device.type != "cpu":
        return "runs on CPUs only"
    return library.problem()


def empty_affinity(image: Tensor, neighbours: int) -> Tensor:
    """Return weights [B, N, H, W] for an image [B, K, H, W]. In memory [B, H, N, W]: a row's weights lie together."""
    batch, _, height, width = image.shape
    return image.new_empty((batch, height, neighbours, width), dtype=torch.float32).transpose(1, 2)


def affinity(image: Tensor, dilations: Sequence[int], variant: Variant, out: Tensor) -> None:
    """Fill `out`, of `empty_affinity`, with the affinity of an image [B, K, H, W]."""
    in_double = _in_double(variant, image.dtype)
    image = image.to(torch.float64 if in_double else torch.float32).resolve_neg()
    task = interface.Affinity(
        image.data_ptr(),
        image.stride(),
        *image.shape,
        out.data_ptr(),
        _neighbours(tuple(dilations), *image.shape[2:]),
        _variant_struct(tuple(dilations), variant),
        torch.get_num_threads(),
    )
    library.run("affinity_double" if in_double else "affinity_float", task)


def _in_double(variant: Variant, dtype: torch.dtype) -> bool:
    """Return whether the weights of an image of this dtype must be computed in float64.

    Differences that matter are at most some tens after the division by sigma, so float32 is exact enough for squares.
    """
    exact_squares = variant.power == 2 and variant.sigma_power == 1 and variant.weight >= LEAST_WEIGHT
    return variant.is_steep and not (exact_squares and dtype != torch.float64)


def propagate(
    mask: Tensor, affinity: Tensor, dilations: Sequence[int], num_iter: int, counts: Tensor | None = None
) -> Tensor:
    """Return the mask [B, C, H, W] after `num_iter` weighted sums over the neighbours: contiguous, in its own dtype.

    Only the first `counts[b]` channels of image b are propagated; the others are zero in the result. `counts` [B] is
    int64, on the CPU.
    """
    return _propagate(mask, affinity, dilations, num_iter, counts, transposed=False)


def propagate_transposed(
    grad: Tensor, affinity: Tensor, dilations: Sequence[int], num_iter: int, counts: Tensor | None = None
) -> Tensor:
    """Return the transpose of `propagate`, applied to `grad` [B, C, H, W]."""
    return _propagate(grad, affinity, dilations, num_iter, counts, transposed=True)


def _propagate(
    mask: Tensor, affinity: Tensor, dilations: Sequence[int], num_iter: int, counts: Tensor | None, transposed: bool
) -> Tensor:
    dtype = torch.promote_types(mask.dtype, torch.float32)
    rows = affinity.transpose(1, 2).contiguous().resolve_neg()  # no copy if `affinity` above made it
    masks = mask.to(dtype).resolve_neg()
    if counts is None:
        result = masks.new_empty(masks.shape)
    else:
        # Compiled and mapped calls do not check the counts. The C++ would read and write beyond the maps.
        counts, result = counts.clamp(0, masks.shape[1]).contiguous(), masks.new_zeros(masks.shape)
    _, neighbours, height, width = affinity.shape
    weights_bytes = neighbours * height * width * rows.itemsize
    chunk_bytes = CHUNK_BYTES if weights_bytes <= CACHED_WEIGHTS_BYTES else CHUNK_BYTES_FROM_MEMORY
    task = interface.Propagation(
        masks.data_ptr(),
        masks.stride(),
        *masks.shape,
        result.data_ptr(),
        None if counts is None else counts.data_ptr(),
        rows.data_ptr(),
        TYPES[rows.dtype],
        _neighbours(tuple(dilations), height, width),
        num_iter,
        transposed,
        torch.get_num_threads(),
        _channels_per_group(),
        chunk_bytes,
    )
    library.run("propagate_double" if dtype == torch.float64 else "propagate_float", task)
    return result.to(mask.dtype)


@functools.cache
def _channels_per_group() -> int:
    """Return how many channels are summed together, so that their neighbours stay in the first-level cache."""
    return GROUP if _first_level_cache() >= GROUP_CACHE_BYTES else GROUP_OF_SMALL_CACHE


def _first_level_cache() -> int:
    try:
        return os.sysconf("SC_LEVEL1_DCACHE_SIZE")
    except (ValueError, OSError):  # another C library
        return 0


@functools.lru_cache(maxsize=64)
def _neighbours(dilations: tuple[int, ...], height: int, width: int) -> interface.Neighbours:
    """Return the neighbours' offsets, limited to the size of the map, because the border is replicated beyond it."""
    offsets = neighbour_offsets(dilations)
    dy = [max(-height, min(y, height)) for y, _ in offsets]
    dx = [max(-width, min(x, width)) for _, x in offsets]
    array = ctypes.c_int64 * len(offsets)
    by_dx = sorted(range(len(offsets)), key=dx.__getitem__)
    return interface.Neighbours(len(offsets), max(dx), array(*dy), array(*dx), array(*by_dx))


@functools.lru_cache(maxsize=64)
def _variant_struct(dilations: tuple[int, ...], variant: Variant) -> interface.Variant:
    """Return the numbers of a variant, with the position term of every neighbour."""
    position = (ctypes.c_double * (8 * len(dilations)))()
    if variant.position_weight:
        position[:] = position_affinity(neighbour_offsets(dilations), variant).tolist()
    samples = variant.samples(len(dilations))
    return interface.Variant(variant.guard, variant.weight, samples, variant.sigma_power, variant.power, position)
