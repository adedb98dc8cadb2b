"""The affinity in plain PyTorch, for every device: running sums over shifted views of the image."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ...neighbourhood import neighbour_offsets, pad, shifted_views, within
from ...variants import Variant, position_affinity

# On the CPU, the softmax is taken of so many pixels at a time and stored pixel by pixel while it is in the cache.
SOFTMAX_PIXELS = 8192


def affinity(image: Tensor, dilations: Sequence[int], variant: Variant, out: Tensor) -> None:
    """Fill `out` [B, N, H, W], of any strides, with the affinity of an image [B, K, H, W]."""
    in_double = variant.in_double and image.device.type != "mps"  # which has no float64
    similarity = _similarity(image.double() if in_double else image.float(), dilations, variant)
    position = None
    if variant.position_weight:
        position = position_affinity(neighbour_offsets(dilations), variant).to(similarity)[:, None, None]
    rows = max(1, SOFTMAX_PIXELS // image.shape[3]) if image.device.type == "cpu" else image.shape[2]
    for block, weights in zip(similarity.split(rows, dim=2), out.split(rows, dim=2), strict=True):
        weights.copy_(block.softmax(dim=1) if position is None else block.softmax(dim=1) + position)


def _similarity(image: Tensor, dilations: Sequence[int], variant: Variant) -> Tensor:
    """Return the exponents [B, N, H, W] of the softmax."""
    batch, channels, height, width = image.shape
    near = within(dilations, height, width)
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
