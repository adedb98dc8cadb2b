"""Other ways to propagate on a CPU without a [B, C, N, H, W] stack: what the library's two ways were chosen over.

All take masks [1, C, H, W] and the affinity [1, N, H, W], and return the refined masks.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


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
    """Multiply a sparse matrix, a row a pixel, with the pixels' rows of channels."""
    _, channels, height, width = mask.shape
    dy, dx = torch.tensor(offsets(dilations)).unbind(1)
    row = (torch.arange(height)[:, None] + dy).clamp(0, height - 1)
    column = (torch.arange(width)[:, None] + dx).clamp(0, width - 1)
    index = (row[:, None] * width + column).flatten()
    starts = torch.arange(0, index.numel() + 1, affinity.shape[1])
    values = affinity[0].permute(1, 2, 0).flatten()
    # A neighbour that the border replicates stands more than once in its row, which the product does not mind.
    matrix = torch.sparse_csr_tensor(starts, index, values, (height * width, height * width), check_invariants=False)
    table = mask[0].flatten(1).t().contiguous()
    for _ in range(num_iter):
        table = matrix @ table
    return table.t().reshape(1, channels, height, width)


def interleaved_rows(mask: Tensor, affinity: Tensor, dilations: Sequence[int], num_iter: int) -> Tensor:
    """Add up shifted views of maps laid out [H, C, W], so that all classes of a row find its weights in the cache."""
    height = mask.shape[2]
    width = mask.shape[3]
    reach = max(dilations)
    maps, weights = mask[0].transpose(0, 1).contiguous(), affinity[0].transpose(0, 1).contiguous()
    for _ in range(num_iter):
        padded = F.pad(maps.transpose(0, 1)[None], [reach] * 4, mode="replicate")[0].transpose(0, 1).contiguous()
        maps = interleaved_step(padded, weights, height, width, reach, tuple(offsets(dilations)))
    return maps.transpose(0, 1)[None]


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
