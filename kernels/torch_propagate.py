"""Propagation and its transpose in plain PyTorch. No [B, C, N, H, W] tensor is ever built."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .neighbourhood import fold, neighbour_offsets, pad, shifted_views

# With fewer channels, a pixel's neighbours are cheaper as shifted views than as gathered rows (docs/kernels.md).
GATHER_MIN_CHANNELS = 4
# Channels are gathered in chunks whose table stays in the last-level cache; this also bounds the extra memory.
GATHER_TABLE_BYTES = 24 * 2**20


def propagate(mask: Tensor, affinity: Tensor, dilations: Sequence[int], num_iter: int) -> Tensor:
    """Return the mask [B, C, H, W] after `num_iter` weighted sums over the neighbours: contiguous, in its own dtype."""
    if mask.device.type == "cpu" and mask.dtype != torch.float64 and mask.shape[1] >= GATHER_MIN_CHANNELS:
        return _propagate_gathered(mask, affinity, dilations, num_iter)
    return _propagate_shifted(mask, affinity, dilations, num_iter)


def _propagate_gathered(mask: Tensor, affinity: Tensor, dilations: Sequence[int], num_iter: int) -> Tensor:
    """Sum rows of a table [H * W, C] as an embedding layer does, N weighted rows a pixel: a compiled gather on CPUs."""
    _, channels, height, width = mask.shape
    index = _neighbour_index(height, width, dilations)
    bags = torch.arange(0, index.numel(), affinity.shape[1], dtype=index.dtype)
    result = torch.empty_like(mask, memory_format=torch.contiguous_format)
    chunks = min(channels, -(-channels * height * width * 4 // GATHER_TABLE_BYTES))
    for image_mask, image_affinity, image_result in zip(mask, affinity, result, strict=True):
        weights = image_affinity.permute(1, 2, 0).flatten().float()  # no copy of an affinity made on the CPU
        for chunk, refined in zip(image_mask.chunk(chunks), image_result.chunk(chunks), strict=True):
            table = chunk.flatten(1).t().float().contiguous()
            for _ in range(num_iter):
                table = torch.embedding_bag(table, index, bags, mode=0, per_sample_weights=weights)[0]
            refined.copy_(table.t().view(chunk.shape))
    return result


def _neighbour_index(height: int, width: int, dilations: Sequence[int]) -> Tensor:
    """Return every pixel's N neighbours as rows of the table, [H * W * N]: clamped, which replicates the border."""
    offsets = neighbour_offsets(dilations)
    dtype = torch.int32 if height * width * len(offsets) < 2**31 else torch.int64
    dy, dx = torch.tensor(offsets, dtype=dtype).unbind(1)
    rows = (torch.arange(height, dtype=dtype)[:, None] + dy).clamp_(0, height - 1) * width
    columns = (torch.arange(width, dtype=dtype)[:, None] + dx).clamp_(0, width - 1)
    return (rows[:, None] + columns).flatten()


def _propagate_shifted(mask: Tensor, affinity: Tensor, dilations: Sequence[int], num_iter: int) -> Tensor:
    """Accumulate shifted views of the padded mask."""
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
