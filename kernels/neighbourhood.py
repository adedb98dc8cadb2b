"""The neighbours of a pixel: 8 per dilation d, at the offsets {-d, 0, d} x {-d, 0, d} without (0, 0)."""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def neighbour_offsets(dilations: Sequence[int]) -> list[tuple[int, int]]:
    """Return the offsets (dy, dx) of the neighbours: dilations in the given order, then row-major."""
    return [(dy, dx) for d in dilations for dy in (-d, 0, d) for dx in (-d, 0, d) if (dy, dx) != (0, 0)]


def limit_dilations(dilations: Sequence[int], height: int, width: int) -> list[int]:
    """Limit dilations to the longer side of the map; the neighbours stay the same, because the border is replicated."""
    return [min(d, max(height, width)) for d in dilations]


def keep_first(x: Tensor, counts: Tensor) -> Tensor:
    """Return [B, C, H, W] with zeros from channel `counts[b]` of image b on, without waiting for the device."""
    channel = torch.arange(x.shape[1], device=x.device)
    return x.masked_fill((channel >= counts[:, None])[:, :, None, None], 0)


def pad(x: Tensor, reach: int) -> Tensor:
    """Replicate the border of maps [B, C, H, W] by `reach` pixels on every side."""
    return F.pad(x, (reach, reach, reach, reach), mode="replicate")


def fold(padded: Tensor, reach: int, dim: int) -> Tensor:
    """Add the padding of one dimension to the border that it replicates: the transpose of `pad`."""
    inner = padded.narrow(dim, reach, padded.shape[dim] - 2 * reach)
    inner.narrow(dim, 0, 1).add_(padded.narrow(dim, 0, reach).sum(dim, keepdim=True))
    last = inner.shape[dim] - 1
    inner.narrow(dim, last, 1).add_(padded.narrow(dim, padded.shape[dim] - reach, reach).sum(dim, keepdim=True))
    return inner


def shifted_views(padded: Tensor, dilations: Sequence[int]) -> Iterator[Tensor]:
    """Yield one view [B, C, H, W] per neighbour of maps that are padded by the largest dilation."""
    reach = max(dilations)
    height, width = padded.shape[2] - 2 * reach, padded.shape[3] - 2 * reach
    for dy, dx in neighbour_offsets(dilations):
        yield padded[:, :, reach + dy : reach + dy + height, reach + dx : reach + dx + width]
