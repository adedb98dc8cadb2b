"""The affinity in plain PyTorch, for every device: running sums over shifted views of the image."""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from ...neighbourhood import limit_dilations, neighbour_offsets, pad, shifted_views
from ...variants import Variant, position_affinity

# On CPUs the softmax runs on blocks of this many pixels, which stay in the cache until they are stored channels-last.
SOFTMAX_PIXELS = 8192


def affinity(image: Tensor, dilations: Sequence[int], variant: Variant, out: Tensor) -> None:
    """Fill `out` [B, N, H, W], of any strides, with the affinity of an image [B, K, H, W] (eq. 8)."""
    similarity = _similarity(image.to(affinity_dtype(variant, image.device)), dilations, variant)
    position = None
    if variant.position_weight:
        position = position_affinity(neighbour_offsets(dilations), variant).to(similarity)[:, None, None]
    rows = max(1, SOFTMAX_PIXELS // image.shape[3]) if image.device.type == "cpu" else image.shape[2]
    for block, weights in zip(similarity.split(rows, dim=2), out.split(rows, dim=2), strict=True):
        alpha = block.softmax(dim=1)  # eq. 8: alpha of the kernel k
        weights.copy_(alpha if position is None else alpha + position)


def affinity_dtype(variant: Variant, device: torch.device) -> torch.dtype:
    """Return the dtype that a variant is computed in on a device."""
    return torch.float64 if variant.is_steep and _has_float64(device.type) else torch.float32


@functools.cache
def _has_float64(device_type: str) -> bool:
    try:
        torch.zeros(1, dtype=torch.float64, device=device_type)
    except (TypeError, RuntimeError, NotImplementedError):  # MPS raises a TypeError, others a RuntimeError
        return False
    return True


def _similarity(image: Tensor, dilations: Sequence[int], variant: Variant) -> Tensor:
    """Return the exponents [B, N, H, W] of the softmax."""
    batch, channels, height, width = image.shape
    near = limit_dilations(dilations, height, width)
    neighbours = list(shifted_views(pad(image, max(near)), near))
    difference = torch.empty_like(image)
    # Moments about the centre: exactly zero where the image is flat, and no cancellation however large its offset.
    total, squares = torch.zeros_like(image), torch.zeros_like(image)
    for neighbour in neighbours:
        torch.sub(neighbour, image, out=difference)
        total += difference
        squares.addcmul_(difference, difference)
    samples = variant.samples(len(dilations))
    variance = squares.addcmul_(total, total, value=-1 / samples).clamp_(min=0).div_(samples - 1)
    sigma = variance.pow_(variant.sigma_power / 2)
    scale = 1 / (variant.guard + variant.weight * sigma)  # eq. 8

    similarity = image.new_empty(batch, 8 * len(dilations), height, width)
    for n, neighbour in enumerate(neighbours):
        torch.sub(neighbour, image, out=difference)
        difference.mul_(scale)
        difference = difference.square_() if variant.power == 2 else difference.abs_()
        torch.sum(difference, dim=1, out=similarity[:, n])
    return similarity.div_(-channels)
