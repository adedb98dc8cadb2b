"""Propagation and its transpose in plain PyTorch. No [B, C, N, H, W] tensor is ever built."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ...neighbourhood import fold, neighbour_offsets, pad, shifted_views, within

# With fewer channels, a pixel's neighbours are cheaper as shifted views than as gathered rows (docs/kernels.md).
GATHER_MIN_CHANNELS = 4
# Channels are gathered in chunks whose table stays in the last-level cache; this also bounds the extra memory.
GATHER_TABLE_BYTES = 24 * 2**20
# As many rows of the image at a time as have an index of this size, which all such blocks read from the cache.
GATHER_INDEX_BYTES = 2 * 2**20


def propagate(mask: Tensor, affinity: Tensor, dilations: Sequence[int], num_iter: int) -> Tensor:
    """Return the mask [B, C, H, W] after `num_iter` weighted sums over the neighbours: contiguous, in its own dtype."""
    if mask.device.type == "cpu" and mask.dtype != torch.float64 and mask.shape[1] >= GATHER_MIN_CHANNELS:
        return _propagate_gathered(mask, affinity, dilations, num_iter)
    return _propagate_shifted(mask, affinity, dilations, num_iter)


def _propagate_gathered(mask: Tensor, affinity: Tensor, dilations: Sequence[int], num_iter: int) -> Tensor:
    """Sum rows of a table [H * W, C] as an embedding layer does, N weighted rows a pixel: a compiled gather on CPUs."""
    _, channels, height, width = mask.shape
    neighbours = affinity.shape[1]
    reach = min(max(dilations), height - 1)
    block = min(height, -(-GATHER_INDEX_BYTES // (4 * width * neighbours)))
    index = _neighbour_index(block, width, reach, dilations)
    bags = torch.arange(0, index.numel(), neighbours, dtype=index.dtype)
    result = torch.empty_like(mask, memory_format=torch.contiguous_format)
    chunks = min(channels, -(-channels * height * width * 4 // GATHER_TABLE_BYTES))
    for image_mask, image_affinity, image_result in zip(mask, affinity, result, strict=True):
        weights = image_affinity.permute(1, 2, 0).flatten().float()  # no copy of an affinity made on the CPU
        for chunk, refined in zip(image_mask.chunk(chunks), image_result.chunk(chunks), strict=True):
            # The border is replicated above and below by `reach` rows, to the sides by the index.
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
                        torch.embedding_bag(
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
    """Return every pixel's N neighbours, [rows * width * N], as rows of a table that starts `reach` rows above."""
    offsets = neighbour_offsets(dilations)
    fits = max((rows + 2 * reach) * width, rows * width * len(offsets)) < 2**31
    dtype = torch.int32 if fits else torch.int64
    dy, dx = torch.tensor(offsets).unbind(1)
    row = torch.arange(reach, reach + rows)[:, None] + dy.clamp(-reach, reach)  # beyond it, all is border
    column = (torch.arange(width)[:, None] + dx).clamp_(0, width - 1)
    return (row[:, None] * width + column).to(dtype).flatten()


def _propagate_shifted(mask: Tensor, affinity: Tensor, dilations: Sequence[int], num_iter: int) -> Tensor:
    """Accumulate shifted views of the padded mask."""
    dilations = within(dilations, *mask.shape[2:])
    current, weights = _accumulators(mask, affinity)
    for _ in range(num_iter):
        padded = pad(current, max(dilations))
        current = torch.zeros_like(current)
        for n, neighbour in enumerate(shifted_views(padded, dilations)):
            current.addcmul_(weights[:, n : n + 1], neighbour)
    return current.to(mask.dtype)


def propagate_transposed(grad: Tensor, affinity: Tensor, dilations: Sequence[int], num_iter: int) -> Tensor:
    """Return the transposed propagation of [B, C, H, W]: what turns a gradient of the result into the mask's."""
    current, weights = _accumulators(grad, affinity)
    batch, channels, height, width = grad.shape
    dilations = within(dilations, height, width)
    reach = max(dilations)
    for _ in range(num_iter):
        padded = current.new_zeros(batch, channels, height + 2 * reach, width + 2 * reach)
        for n, neighbour in enumerate(shifted_views(padded, dilations)):
            neighbour.addcmul_(weights[:, n : n + 1], current)
        current = fold(fold(padded, reach, dim=2), reach, dim=3).clone(memory_format=torch.contiguous_format)
    return current.to(grad.dtype)


def _accumulators(x: Tensor, affinity: Tensor) -> tuple[Tensor, Tensor]:
    """Return both in the dtype that sums are taken in, as contiguous planes."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    return x.to(dtype).contiguous(), affinity.to(dtype).contiguous()
