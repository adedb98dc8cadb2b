"""PAMR as its published users write it: the peer that every benchmark stands beside.

Replicate padding, a depthwise convolution with fixed one-hot filters for every dilation, a [B, C, N, H, W] stack,
standard deviation, softmax, product and sum. Written from the definition, for clarity and not for speed.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def one_hot_filters(positions: Sequence[int]) -> Tensor:
    """Return 3x3 filters [len(positions), 1, 3, 3], each picking one position of the window (row-major)."""
    filters = torch.zeros(len(positions), 9)
    filters[torch.arange(len(positions)), torch.tensor(positions)] = 1
    return filters.view(-1, 1, 3, 3)


CENTRE = 4
WINDOW = one_hot_filters(range(9))
NEIGHBOURS = one_hot_filters([position for position in range(9) if position != CENTRE])


def stack(x: Tensor, filters: Tensor, dilations: Sequence[int]) -> Tensor:
    """Return the filters' outputs for every dilation, [B, C, len(filters) * len(dilations), H, W]."""
    batch, channels, height, width = x.shape
    maps = x.reshape(batch * channels, 1, height, width)
    filters = filters.to(x)
    shifted = [F.conv2d(F.pad(maps, [d] * 4, mode="replicate"), filters, dilation=d) for d in dilations]
    return torch.cat([s.view(batch, channels, -1, height, width) for s in shifted], dim=2)


def affinity(image: Tensor, dilations: Sequence[int]) -> Tensor:
    """Return PAMR's affinity [B, N, H, W] in its published form."""
    difference = (image[:, :, None] - stack(image, NEIGHBOURS, dilations)).abs()
    sigma = stack(image, WINDOW, dilations).std(dim=2, keepdim=True)
    similarity = -difference / (1e-8 + 0.1 * sigma)
    return similarity.mean(dim=1).softmax(dim=1)


def propagate(mask: Tensor, weights: Tensor, dilations: Sequence[int], num_iter: int) -> Tensor:
    """Return the mask after `num_iter` weighted means over the neighbours."""
    for _ in range(num_iter):
        mask = (stack(mask, NEIGHBOURS, dilations) * weights[:, None]).sum(dim=2)
    return mask


def pamr(image: Tensor, mask: Tensor, dilations: Sequence[int], num_iter: int) -> Tensor:
    """Return the refined mask [B, C, H, W]."""
    return propagate(mask, affinity(image, dilations), dilations, num_iter)
