"""Affinity and propagation as plain PyTorch operations without side effects, for exporters.

`torch.export` and ONNX cannot export a registered operator to other runtimes. They get these functions instead, which
are slower in PyTorch than the operators: every neighbour is a slice of the padded maps.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ...neighbourhood import keep_first, neighbour_offsets, pad, shifted_views
from ...variants import Variant, position_affinity
from .affinities import affinity_dtype


def affinity(image: Tensor, dilations: Sequence[int], variant: Variant) -> Tensor:
    """Return the affinity [B, N, H, W] of an image [B, K, H, W], float32 (eq. 8)."""
    image = image.to(affinity_dtype(variant, image.device))
    neighbours = shifted_views(pad(image, max(dilations)), dilations)
    difference = torch.stack([neighbour - image for neighbour in neighbours], dim=2)  # [B, K, N, H, W]
    # Moments about the centre, whose own differences are 0 whether it is among the samples or not.
    samples = variant.samples(len(dilations))
    variance = (difference.square().sum(2) - difference.sum(2).square() / samples).clamp(min=0) / (samples - 1)
    scale = variant.guard + variant.weight * variance.pow(variant.sigma_power / 2)
    similarity = -(difference.abs() / scale[:, :, None]).pow(variant.power).mean(1)
    weights = similarity.softmax(dim=1)  # [B, N, H, W]
    if variant.position_weight:
        position = position_affinity(neighbour_offsets(dilations), variant)
        weights = weights + position.to(weights)[:, None, None]
    return weights.float()


def propagate(
    mask: Tensor, affinity: Tensor, dilations: Sequence[int], num_iter: int, counts: Tensor | None = None
) -> Tensor:
    """Return the masks [B, C, H, W] after `num_iter` iterations of eq. 7, in their own dtype."""
    dtype = torch.promote_types(mask.dtype, torch.float32)
    current, weights = mask.to(dtype), affinity.to(dtype)
    for _ in range(num_iter):
        neighbours = shifted_views(pad(current, max(dilations)), dilations)
        current = torch.zeros_like(current)
        for n, neighbour in enumerate(neighbours):
            current = current + weights[:, n : n + 1] * neighbour  # eq. 7
    result = current.to(mask.dtype)
    return result if counts is None else keep_first(result, counts)
