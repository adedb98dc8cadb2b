"""Alternatives to the library's propagation on a CPU, for comparison. None builds a [B, C, N, H, W] stack.

All take masks [B, C, H, W] and the affinity [B, N, H, W], and return the refined masks; the sparse matrix takes one
image.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import published


def offsets(dilations: Sequence[int]) -> list[tuple[int, int]]:
    """Return the neighbours' offsets."""
    return [(dy, dx) for d in dilations for dy in (-d, 0, d) for dx in (-d, 0, d) if (dy, dx) != (0, 0)]


def shifted_views(mask: Tensor, affinity: Tensor, dilations: Sequence[int], num_iter: int) -> Tensor:
    """Add up shifted views of the padded planes in place."""
    height, width = mask.shape[2:]
    reach = max(dilations)
    affinity = affinity.contiguous()
    for _ in range(num_iter):
        padded = F.pad(mask, [reach] * 4, mode="replicate")
        mask = torch.zeros_like(mask)
        for n, (dy, dx) in enumerate(offsets(dilations)):
            rows, columns = slice(reach + dy, reach + dy + height), slice(reach + dx, reach + dx + width)
            mask.addcmul_(affinity[:, n : n + 1], padded[:, :, rows, columns])
    return mask


def sparse_matrix(mask: Tensor, affinity: Tensor, dilations: Sequence[int], num_iter: int) -> Tensor:
    """Multiply a sparse matrix, one row per pixel, with the table of pixels and channels."""
    _, channels, height, width = mask.shape
    dy, dx = torch.tensor(offsets(dilations)).unbind(1)
    row = (torch.arange(height)[:, None] + dy).clamp(0, height - 1)
    column = (torch.arange(width)[:, None] + dx).clamp(0, width - 1)
    index = (row[:, None] * width + column).flatten()
    starts = torch.arange(0, index.numel() + 1, affinity.shape[1])
    values = affinity[0].permute(1, 2, 0).flatten()
    # A neighbour that the border replicates appears more than once in its row; the product adds all of them up.
    matrix = torch.sparse_csr_tensor(starts, index, values, (height * width, height * width), check_invariants=False)
    table = mask[0].flatten(1).t().contiguous()
    for _ in range(num_iter):
        table = matrix @ table
    return table.t().reshape(1, channels, height, width)


def interleaved_rows(mask: Tensor, affinity: Tensor, dilations: Sequence[int], num_iter: int) -> Tensor:
    """Add up shifted views of maps laid out [H, C, W]: the weights of a row stay in the cache for all classes."""
    height, width = mask.shape[2:]
    reach = max(dilations)
    shifts = tuple(offsets(dilations))
    results = []
    for image, image_affinity in zip(mask, affinity, strict=True):
        maps, weights = image.transpose(0, 1).contiguous(), image_affinity.transpose(0, 1).contiguous()
        for _ in range(num_iter):
            padded = F.pad(maps.transpose(0, 1)[None], [reach] * 4, mode="replicate")[0].transpose(0, 1).contiguous()
            maps = interleaved_step(padded, weights, height, width, reach, shifts)
        results.append(maps.transpose(0, 1))
    return torch.stack(results)


@torch.compile(dynamic=False)
def interleaved_step(
    padded: Tensor, weights: Tensor, height: int, width: int, reach: int, shifts: tuple[tuple[int, int], ...]
) -> Tensor:
    """Return one iteration on [H, C, W]."""
    total = torch.zeros((), dtype=padded.dtype)
    for n, (dy, dx) in enumerate(shifts):
        rows, columns = slice(reach + dy, reach + dy + height), slice(reach + dx, reach + dx + width)
        total = total + weights[:, n : n + 1] * padded[rows, :, columns]
    return total


@torch.compile(dynamic=False)
def compiled_affinity(image: Tensor, dilations: Sequence[int]) -> Tensor:
    """Return PAMR's affinity [B, N, H, W] as the published form computes it, compiled."""
    return published.affinity(image, dilations)


def interleaved_pamr(image: Tensor, mask: Tensor, dilations: Sequence[int], num_iter: int) -> Tensor:
    """Return the refined mask, by the fastest form found for `torch.compile` on a CPU."""
    return interleaved_rows(mask, compiled_affinity(image, dilations), dilations, num_iter)
