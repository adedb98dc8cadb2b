"""Propagation and its transpose in Triton: a gather of rows of channels, without atomics.

Between iterations the masks are stored as rows [B, H, W, C'], where C' is C rounded up to 16 bytes: the channels of any
neighbour are then read by wide, aligned loads. A program sums a tile of pixels x channels in registers. Sizes and
dilations are arguments, not constants, so a kernel is compiled once per dtype and tile.
"""

# mypy: allow-untyped-defs
# Arguments of a jit function have the types that its launch gives them.

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...neighbourhood import limit_dilations
from .launch import on_device, warp_size


@triton.jit(do_not_specialize=["num_dilations", "vectors", "height", "width"])
def propagate_kernel(
    rows_ptr,
    affinity_ptr,
    out_ptr,
    dilations_ptr,
    counts_ptr,
    num_dilations,
    vectors,
    height,
    width,
    DTYPE: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One iteration of eq. 7: m[c, i] = sum over the neighbours n of i of affinity[n, i] * m[c, n].

    A program sums BLOCK_P consecutive pixels x BLOCK_C channels of an image. The blocks of channels come first in the
    grid: programs that run together share the affinity of their pixels. The border is replicated by clamped indices.
    """
    pixels = height * width
    channels = vectors * VECTOR  # C'; the compiler sees that it is a multiple of 16 bytes
    channel_blocks = tl.cdiv(channels, BLOCK_C)
    pixel_blocks = tl.cdiv(pixels, BLOCK_P)
    block = tl.program_id(0) // channel_blocks
    batch = (block // pixel_blocks).to(tl.int64)  # so that no product of it overflows
    pixel = (block % pixel_blocks) * BLOCK_P + tl.arange(0, BLOCK_P)
    first_channel = (tl.program_id(0) % channel_blocks) * BLOCK_C
    channel = first_channel + tl.arange(0, BLOCK_C)
    is_pixel = pixel < pixels
    is_value = is_pixel[:, None] & (channel < channels)[None, :]
    count = channels if counts_ptr is None else tl.load(counts_ptr + batch).to(tl.int32)
    y = pixel // width
    x = pixel % width

    rows_ptr += batch * pixels * channels + channel[None, :]
    affinity_ptr += batch * num_dilations * 8 * pixels + pixel
    total = tl.zeros([BLOCK_P, BLOCK_C], DTYPE)
    # Not unrolled: with the loads of 48 neighbours in flight, registers spill.
    for i in range(tl.where(first_channel < count, num_dilations, 0)):
        dilation = tl.load(dilations_ptr + i)
        for window in tl.static_range(9):
            if window != 4:
                row = tl.minimum(tl.maximum(y + (window // 3 - 1) * dilation, 0), height - 1)
                column = tl.minimum(tl.maximum(x + (window % 3 - 1) * dilation, 0), width - 1)
                neighbour = (row * width + column).to(tl.int64) * channels
                weight = tl.load(affinity_ptr, mask=is_pixel, other=0.0).to(DTYPE)
                value = tl.load(rows_ptr + neighbour[:, None], mask=is_value, other=0.0).to(DTYPE)
                total += weight[:, None] * value  # eq. 7
                affinity_ptr += pixels
    total = tl.where(channel[None, :] < count, total, 0.0)
    out_ptr += (batch * pixels + pixel)[:, None] * channels + channel[None, :]
    tl.store(out_ptr, total.to(out_ptr.dtype.element_ty), mask=is_value)


@triton.jit(do_not_specialize=["num_dilations", "reach", "vectors", "height", "width"])
def transposed_kernel(
    rows_ptr,
    affinity_ptr,
    out_ptr,
    dilations_ptr,
    counts_ptr,
    num_dilations,
    reach,
    vectors,
    height,
    width,
    DTYPE: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The transpose of one iteration of eq. 7: g[c, n] = sum over the readers i of n of affinity[n, i] * g[c, i].

    A pixel i reads n at the offset o if clamp(i + o) = n. Pixel i is then a reader of n. A pixel inside the map has one
    reader per offset. A pixel of the border also has the readers that o leads out of the map: a range of rows and
    columns.

    A program computes a part of one row of the map. The first two programs of a row compute its ends: their lanes are
    the columns of readers, and are summed at the end. The lanes of the other programs are BLOCK_P pixels between them.
    """
    channels = vectors * VECTOR  # C'; the compiler sees that it is a multiple of 16 bytes
    channel_blocks = tl.cdiv(channels, BLOCK_C)
    ends = tl.minimum(width, 2)
    parts = ends + tl.cdiv(width - ends, BLOCK_P)
    block = tl.program_id(0) // channel_blocks
    part = block % parts
    y = (block // parts) % height
    batch = (block // parts // height).to(tl.int64)  # so that no product of it overflows
    lane = tl.arange(0, BLOCK_P)
    first_channel = (tl.program_id(0) % channel_blocks) * BLOCK_C
    channel = first_channel + tl.arange(0, BLOCK_C)
    count = channels if counts_ptr is None else tl.load(counts_ptr + batch).to(tl.int32)
    steps = tl.where(first_channel < count, 3 * num_dilations, 0)

    is_end = part < ends
    x = tl.where(is_end, part * (width - 1), 1 + (part - ends) * BLOCK_P + lane)
    first_column = tl.where(part == 0, 0, tl.maximum(width - 1 - reach, 0))
    columns = tl.where(is_end, tl.minimum(reach + 1, width), 1)

    pixels = height * width
    rows_ptr += batch * pixels * channels + channel[None, :]
    affinity_ptr += batch * num_dilations * 8 * pixels
    is_channel = (channel < channels)[None, :]
    total = tl.zeros([BLOCK_P, BLOCK_C], DTYPE)
    for start in range(0, columns, BLOCK_P):  # once, unless the largest dilation exceeds BLOCK_P
        reader = first_column + start + lane
        for i in range(steps):
            dilation = tl.load(dilations_ptr + i // 3)
            dy = i % 3 - 1
            down = dy * dilation
            # The rows r with clamp(r + down) = y.
            first_row = tl.where((down < 0) & (y == 0), 0, tl.maximum(y - down, 0))
            last_row = tl.where((down > 0) & (y == height - 1), y, tl.minimum(y - down, height - 1))
            for row in range(first_row, last_row + 1):
                for dx in tl.static_range(-1, 2):
                    right = dx * dilation
                    column = tl.where(is_end, reader, x - right)
                    target = tl.minimum(tl.maximum(column + right, 0), width - 1)
                    target = tl.where((down == 0) & (right == 0), -1, target)  # no pixel is its own neighbour
                    is_reader = (column >= 0) & (column < width) & (target == x)
                    pixel = row * width + column
                    n = 8 * (i // 3) + 3 * dy + dx + tl.where(3 * dy + dx < 0, 4, 3)
                    weight = tl.load(affinity_ptr + n.to(tl.int64) * pixels + pixel, mask=is_reader, other=0.0)
                    value = tl.load(
                        rows_ptr + (pixel.to(tl.int64) * channels)[:, None],
                        mask=is_reader[:, None] & is_channel,
                        other=0.0,
                    )
                    total += weight.to(DTYPE)[:, None] * value.to(DTYPE)  # eq. 7, transposed
    if is_end:
        total = tl.where(lane[:, None] == 0, tl.sum(total, axis=0)[None, :], 0.0)
    if counts_ptr is not None:
        total = tl.where(channel[None, :] < tl.load(counts_ptr + batch), total, 0.0)
    is_target = tl.where(is_end, lane, x) < tl.where(is_end, 1, width - 1)
    out_ptr += ((batch * height + y) * width + x)[:, None] * channels + channel[None, :]
    tl.store(out_ptr, total.to(out_ptr.dtype.element_ty), mask=is_target[:, None] & is_channel)


def launch_config(channels: int, itemsize: int, warp_size: int) -> dict[str, int]:
    """Return tile and warps for masks of `channels` values of `itemsize` bytes.

    A program has 64 pixels, and every thread one vector of 16 bytes. With more vectors per thread, the weights may be
    loaded by other threads than those that use them, and go through shared memory. Up to 8 vectors of a pixel lie in
    one program, so that its weights are read once, as long as at most a quarter of them lies beyond C'.
    """
    vector = 16 // itemsize
    vectors = triton.cdiv(channels, vector)
    lanes = next(lanes for lanes in (8, 4, 2, 1) if triton.cdiv(vectors, lanes) * lanes * 3 <= vectors * 4)
    return {"VECTOR": vector, "BLOCK_P": 64, "BLOCK_C": lanes * vector, "num_warps": 64 * lanes // warp_size}


def propagate(
    mask: Tensor, affinity: Tensor, dilations: Sequence[int], num_iter: int, counts: Tensor | None = None
) -> Tensor:
    """Return the masks [B, C, H, W] after `num_iter` iterations of eq. 7, contiguous, in their own dtype."""
    return _iterate(propagate_kernel, mask, affinity, dilations, num_iter, counts)


def propagate_transposed(
    grad: Tensor, affinity: Tensor, dilations: Sequence[int], num_iter: int, counts: Tensor | None = None
) -> Tensor:
    """Return the transpose of `propagate`, applied to `grad` [B, C, H, W]: the gradient of the masks."""
    return _iterate(transposed_kernel, grad, affinity, dilations, num_iter, counts)


def _iterate(
    kernel: Any, mask: Tensor, affinity: Tensor, dilations: Sequence[int], num_iter: int, counts: Tensor | None
) -> Tensor:
    batch, channels, height, width = mask.shape
    config = launch_config(channels, mask.itemsize, warp_size(mask.device))
    vectors = triton.cdiv(channels, config["VECTOR"])
    rows = mask.new_empty(batch, height, width, vectors * config["VECTOR"])
    rows[..., :channels] = mask.permute(0, 2, 3, 1)  # channels beyond C are never read back
    other = torch.empty_like(rows)
    affinity = affinity.contiguous()
    counts = None if counts is None else counts.contiguous()
    near = limit_dilations(dilations, height, width)
    table = on_device(tuple(near), torch.int32, mask.device)
    sizes = {"num_dilations": len(near), "vectors": vectors, "height": height, "width": width}
    if kernel is transposed_kernel:
        sizes["reach"] = max(near)
        ends = min(width, 2)
        blocks = height * (ends + triton.cdiv(width - ends, config["BLOCK_P"]))
    else:
        blocks = triton.cdiv(height * width, config["BLOCK_P"])
    grid = (batch * blocks * triton.cdiv(rows.shape[3], config["BLOCK_C"]),)
    sums = tl.float64 if mask.dtype == torch.float64 else tl.float32
    with torch.cuda.device_of(mask):
        for _ in range(num_iter):
            kernel[grid](rows, affinity, other, table, counts, **sizes, DTYPE=sums, **config)
            rows, other = other, rows
    return rows[..., :channels].permute(0, 3, 1, 2).contiguous()  # [B, H, W, C'] -> [B, C, H, W]
