"""Propagation and its transpose in Triton: a gather of rows of channels, without atomics.

Between iterations the masks lie as rows [B, H * W, C'], C' being C rounded up to 16 bytes: a neighbour's channels are
read by wide, aligned loads, whatever its offset. A program sums a tile of pixels x channels in registers.
"""

# mypy: allow-untyped-defs
# Arguments of a jit function have the types that its launch gives them.

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...neighbourhood import fold, within


@triton.jit
def propagate_kernel(
    rows,
    affinity,
    out,
    height,
    width,
    DILATIONS: tl.constexpr,
    CHANNELS: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One iteration. The border is replicated by clamped indices."""
    pixels = height * width
    batch, pixel, channel = tile(pixels, CHANNELS, BLOCK_P, BLOCK_C)
    is_pixel = pixel < pixels
    is_channel = channel[None, :] < CHANNELS
    y = pixel // width
    x = pixel % width
    rows += batch * pixels * CHANNELS + channel[None, :]
    affinity += batch * (8 * len(DILATIONS)) * pixels + pixel
    total = tl.zeros([BLOCK_P, BLOCK_C], DTYPE)
    for i in range(len(DILATIONS)):  # not unrolled: with the loads of 48 neighbours in flight, registers spill
        dilation = dilation_at(i, DILATIONS)
        for window in tl.static_range(9):
            if window != 4:
                row = tl.minimum(tl.maximum(y + (window // 3 - 1) * dilation, 0), height - 1)
                column = tl.minimum(tl.maximum(x + (window % 3 - 1) * dilation, 0), width - 1)
                source = (row * width + column).to(tl.int64) * CHANNELS
                weight = tl.load(affinity, mask=is_pixel, other=0.0).to(DTYPE)
                value = tl.load(rows + source[:, None], mask=is_pixel[:, None] & is_channel, other=0.0).to(DTYPE)
                total += weight[:, None] * value
                affinity += pixels
    out += (batch * pixels + pixel)[:, None] * CHANNELS + channel[None, :]
    tl.store(out, total.to(out.dtype.element_ty), mask=is_pixel[:, None] & is_channel)


@triton.jit
def transposed_kernel(
    rows,
    affinity,
    out,
    height,
    width,
    DILATIONS: tl.constexpr,
    REACH: tl.constexpr,
    CHANNELS: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Transpose of one iteration, onto the map padded by REACH: every padded pixel gathers from where it was read."""
    padded_width = width + 2 * REACH
    padded_pixels = (height + 2 * REACH) * padded_width
    batch, pixel, channel = tile(padded_pixels, CHANNELS, BLOCK_P, BLOCK_C)
    is_pixel = pixel < padded_pixels
    is_channel = channel[None, :] < CHANNELS
    y = pixel // padded_width - REACH
    x = pixel % padded_width - REACH
    pixels = height * width
    rows += batch * pixels * CHANNELS + channel[None, :]
    affinity += batch * (8 * len(DILATIONS)) * pixels
    total = tl.zeros([BLOCK_P, BLOCK_C], DTYPE)
    for i in range(len(DILATIONS)):  # not unrolled: with the loads of 48 neighbours in flight, registers spill
        dilation = dilation_at(i, DILATIONS)
        for window in tl.static_range(9):
            if window != 4:
                row = y - (window // 3 - 1) * dilation
                column = x - (window % 3 - 1) * dilation
                is_reader = is_pixel & (row >= 0) & (row < height) & (column >= 0) & (column < width)
                reader = (row * width + column).to(tl.int64)
                weight = tl.load(affinity + reader, mask=is_reader, other=0.0).to(DTYPE)
                value = tl.load(
                    rows + (reader * CHANNELS)[:, None], mask=is_reader[:, None] & is_channel, other=0.0
                ).to(DTYPE)
                total += weight[:, None] * value
                affinity += pixels
    out += (batch * padded_pixels + pixel)[:, None] * CHANNELS + channel[None, :]
    tl.store(out, total.to(out.dtype.element_ty), mask=is_pixel[:, None] & is_channel)


@triton.jit
def dilation_at(i, DILATIONS: tl.constexpr):
    """Return DILATIONS[i] for an `i` that is known at run time only."""
    dilation = i * 0
    for j in tl.static_range(len(DILATIONS)):
        dilation = tl.where(i == j, DILATIONS[j], dilation)
    return dilation


@triton.jit
def tile(pixels, CHANNELS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """Return this program's image (int64, so that no product of it overflows), pixels and channels.

    The blocks of channels come first: programs that run together share the affinity of their pixels.
    """
    channel_blocks: tl.constexpr = (CHANNELS + BLOCK_C - 1) // BLOCK_C
    pixel_blocks = tl.cdiv(pixels, BLOCK_P)
    block = tl.program_id(0) // channel_blocks
    batch = (block // pixel_blocks).to(tl.int64)
    pixel = (block % pixel_blocks) * BLOCK_P + tl.arange(0, BLOCK_P)
    channel = (tl.program_id(0) % channel_blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    return batch, pixel, channel


def launch_config(channels: int, itemsize: int) -> dict[str, int]:
    """Return C', tile and warps for rows of `channels` values of `itemsize` bytes.

    The block of channels is the widest that leaves at most an eighth of its lanes idle: 8 for 21 classes, 32 for 150.
    A tile is 4 KiB: a load of 16 bytes a thread where 4 warps have 256 threads (AMD), two where they have 128.
    """
    vector = 16 // itemsize
    rounded = triton.cdiv(channels, vector) * vector
    block_c = next(
        (block for block in (32, 16, 8) if block >= vector and triton.cdiv(rounded, block) * block <= rounded * 9 / 8),
        vector,
    )
    return {"CHANNELS": rounded, "BLOCK_P": 4096 // itemsize // block_c, "BLOCK_C": block_c, "num_warps": 4}


def propagate(mask: Tensor, affinity: Tensor, dilations: Sequence[int], num_iter: int) -> Tensor:
    """Return the mask [B, C, H, W] after `num_iter` weighted sums over the neighbours: contiguous, in its own dtype."""
    height, width = mask.shape[2:]
    dilations = within(dilations, height, width)
    config = _config(mask)
    affinity = affinity.contiguous()
    rows, other = _rows(mask, config["CHANNELS"]), None
    with torch.cuda.device_of(mask):
        for _ in range(num_iter):
            other = torch.empty_like(rows) if other is None else other
            propagate_kernel[_grid(other, config)](
                rows, affinity, other, height, width, DILATIONS=tuple(dilations), **config
            )
            rows, other = other, rows
    return _planes(rows, mask)


def propagate_transposed(grad: Tensor, affinity: Tensor, dilations: Sequence[int], num_iter: int) -> Tensor:
    """Return the transposed propagation of [B, C, H, W]: what turns a gradient of the result into the mask's."""
    batch, _, height, width = grad.shape
    dilations = within(dilations, height, width)
    config = _config(grad)
    affinity = affinity.contiguous()
    reach = max(dilations)
    rows = _rows(grad, config["CHANNELS"])
    padded = rows.new_empty(batch, height + 2 * reach, width + 2 * reach, config["CHANNELS"])
    with torch.cuda.device_of(grad):
        for _ in range(num_iter):
            transposed_kernel[_grid(padded, config)](
                rows, affinity, padded, height, width, DILATIONS=tuple(dilations), REACH=reach, **config
            )
            rows = fold(fold(padded, reach, dim=1), reach, dim=2).contiguous()
    return _planes(rows, grad)


def _config(mask: Tensor) -> dict[str, Any]:
    accumulated = tl.float64 if mask.dtype == torch.float64 else tl.float32
    return {"DTYPE": accumulated, **launch_config(mask.shape[1], mask.itemsize)}


def _grid(out: Tensor, config: dict[str, Any]) -> tuple[int]:
    batch, height, width, channels = out.shape
    return (batch * triton.cdiv(height * width, config["BLOCK_P"]) * triton.cdiv(channels, config["BLOCK_C"]),)


def _rows(mask: Tensor, channels: int) -> Tensor:
    """Return [B, C, H, W] as rows [B, H, W, C']. What lies beyond C is never read back."""
    batch, given, height, width = mask.shape
    rows = mask.new_empty(batch, height, width, channels)
    rows[..., :given] = mask.permute(0, 2, 3, 1)
    return rows


def _planes(rows: Tensor, like: Tensor) -> Tensor:
    return rows[..., : like.shape[1]].permute(0, 3, 1, 2).contiguous()
