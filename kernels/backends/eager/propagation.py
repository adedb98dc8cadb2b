"""Propagation and its transpose in plain PyTorch, without a [B, C, N, H, W] tensor."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ...neighbourhood import fold, keep_first, limit_dilations, neighbour_offsets, pad, shifted_views

# With fewer channels, sums over shifted views are faster than gathered rows (docs/kernels.md).
GATHER_MIN_CHANNELS = 4
# Channels are gathered in chunks whose table stays in the last-level cache; this also bounds the extra memory.
GATHER_TABLE_BYTES = 24 * 2**20
# Rows of the image are processed in blocks. All blocks share one index of about this size, which stays in the cache.
GATHER_INDEX_BYTES = 2 * 2**20


def propagate(
    mask: Tensor, affinity: Tensor, dilations: Sequence[int], num_iter: int, counts: Tensor | None = None
) -> Tensor:
    """Return the masks [B, C, H, W] after `num_iter` iterations of eq. 7, contiguous, in their own dtype."""
    if counts is not None:
        return _ragged(propagate, mask, affinity, dilations, num_iter, counts)
    if mask.device.type == "cpu" and mask.dtype != torch.float64 and mask.shape[1] >= GATHER_MIN_CHANNELS:
        return _propagate_gathered(mask, affinity, dilations, num_iter)
    return _propagate_shifted(mask, affinity, dilations, num_iter)


def _ragged(
    function: Callable[[Tensor, Tensor, Sequence[int], int], Tensor],
    x: Tensor,
    affinity: Tensor,
    dilations: Sequence[int],
    num_iter: int,
    counts: Tensor,
) -> Tensor:
    """Apply `function` to the first counts[b] channels of every image, and set the others to 0."""
    if x.device.type != "cpu":  # refine all channels: reading the counts would wait for the device
        return keep_first(function(x, affinity, dilations, num_iter), counts)
    result = torch.zeros_like(x, memory_format=torch.contiguous_format)
    for b, count in enumerate(counts.tolist()):
        if count > 0:
            result[b, :count] = function(x[b : b + 1, :count], affinity[b : b + 1], dilations, num_iter)[0]
    return result


def _propagate_gathered(mask: Tensor, affinity: Tensor, dilations: Sequence[int], num_iter: int) -> Tensor:
    """Compute eq. 7 as an embedding lookup: every pixel is the weighted sum of N rows of a table [H * W, C]."""
    _, channels, height, width = mask.shape
    neighbours = affinity.shape[1]
    reach = min(max(dilations), height - 1)
    block = min(height, -(-GATHER_INDEX_BYTES // (4 * width * neighbours)))
    index = _neighbour_index(block, width, reach, dilations)
    bags = torch.arange(0, index.numel(), neighbours, dtype=index.dtype)
    result = torch.empty_like(mask, memory_format=torch.contiguous_format)
    chunks = min(channels, -(-channels * height * width * 4 // GATHER_TABLE_BYTES))
    for image_mask, image_affinity, image_result in zip(mask, affinity, result, strict=True):
        weights = image_affinity.permute(1, 2, 0).flatten().float()  # [N, H, W] -> [H * W * N], a view if channels-last
        for chunk, refined in zip(image_mask.chunk(chunks), image_result.chunk(chunks), strict=True):
            # `reach` more rows above and below replicate the border; the index replicates it on the left and right.
            table = weights.new_empty(height + 2 * reach, width, len(chunk))
            table[reach : reach + height] = chunk.permute(1, 2, 0)
            sums = torch.empty_like(table)
            for _ in range(num_iter):
                table[:reach] = table[reach]
                table[reach + height :] = table[reach + height - 1]
                for top in range(0, height, block):
                    rows = min(block, height - top)
                    first, count = top * width * neighbours, rows * width * neighbours
                    sums[reach + top : reach + top + rows].flatten(0, 1).copy_(
                        torch.embedding_bag(  # eq. 7
                            table[top:].flatten(0, 1),
                            index[:count],
                            bags[: rows * width],
                            mode=0,
                            per_sample_weights=weights[first : first + count],
                        )[0]
                    )
                table, sums = sums, table
            refined.copy_(table[reach : reach + height].permute(2, 0, 1))
    return result


def _neighbour_index(rows: int, width: int, reach: int, dilations: Sequence[int]) -> Tensor:
    """Return the N neighbours of every pixel, [rows * width * N]: rows of a table that starts `reach` rows above."""
    offsets = neighbour_offsets(dilations)
    fits = max((rows + 2 * reach) * width, rows * width * len(offsets)) < 2**31
    dtype = torch.int32 if fits else torch.int64
    dy, dx = torch.tensor(offsets).unbind(1)
    row = torch.arange(reach, reach + rows)[:, None] + dy.clamp(-reach, reach)  # rows further out equal the border
    column = (torch.arange(width)[:, None] + dx).clamp_(0, width - 1)
    return (row[:, None] * width + column).to(dtype).flatten()


def _propagate_shifted(mask: Tensor, affinity: Tensor, dilations: Sequence[int], num_iter: int) -> Tensor:
    """Compute eq. 7 as a sum over shifted views of the padded mask."""
    dilations = limit_dilations(dilations, *mask.shape[2:])
    current, weights = _accumulators(mask, affinity)
    for _ in range(num_iter):
        padded = pad(current, max(dilations))
        current = torch.zeros_like(current)
        for n, neighbour in enumerate(shifted_views(padded, dilations)):
            current.addcmul_(weights[:, n : n + 1], neighbour)  # eq. 7
    return current.to(mask.dtype)


def propagate_transposed(
    grad: Tensor, affinity: Tensor, dilations: Sequence[int], num_iter: int, counts: Tensor | None = None
) -> Tensor:
    """Return the transpose of `propagate`, applied to `grad` [B, C, H, W]."""
    if counts is not None:
        return _ragged(propagate_transposed, grad, affinity, dilations, num_iter, counts)
    current, weights = _accumulators(grad, affinity)
    batch, channels, height, width = grad.shape
    dilations = limit_dilations(dilations, height, width)
    reach = max(dilations)
    for _ in range(num_iter):
        padded = current.new_zeros(batch, channels, height + 2 * reach, width + 2 * reach)
        for n, neighbour in enumerate(shifted_views(padded, dilations)):
            neighbour.addcmul_(weights[:, n : n + 1], current)  # transpose of eq. 7
        current = fold(fold(padded, reach, dim=2), reach, dim=3).clone(memory_format=torch.contiguous_format)
    return current.to(grad.dtype)


def _accumulators(x: Tensor, affinity: Tensor) -> tuple[Tensor, Tensor]:
    """Return masks and weights as contiguous planes, in the dtype of the sums."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    return x.to(dtype).contiguous(), affinity.to(dtype).contiguous()
