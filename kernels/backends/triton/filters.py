"""Sums weighted by a Gaussian over position and colour in Triton: exact, and the weights stay in registers."""

# mypy: allow-untyped-defs
# Arguments of a jit function have the types that its launch gives them.

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2_E = 1.4426950408889634


@triton.jit
def gaussian_sum_kernel(
    values_ptr,
    image_ptr,
    out_ptr,
    channels,
    height,
    width,
    scale_xy,
    scale_rgb,
    BLOCK_P: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """A program sums all pixels for BLOCK_P pixels of one image in BLOCK_C channels, BLOCK_Q pixels at a time.

    The scales are such that the weight is 2 to the power of minus the squared distance.
    """
    pixels = height * width
    channel_blocks = tl.cdiv(channels, BLOCK_C)
    pixel_blocks = tl.cdiv(pixels, BLOCK_P)
    block = tl.program_id(0) // channel_blocks
    batch = (block // pixel_blocks).to(tl.int64)
    channel = (tl.program_id(0) % channel_blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    is_channel = channel < channels
    pixel = (block % pixel_blocks) * BLOCK_P + tl.arange(0, BLOCK_P)
    is_pixel = pixel < pixels
    image = image_ptr + batch * 3 * pixels
    values = values_ptr + (batch * channels + channel).to(tl.int64)[None, :] * pixels

    x = (pixel % width).to(tl.float32) * scale_xy
    y = (pixel // width).to(tl.float32) * scale_xy
    red = tl.load(image + pixel, mask=is_pixel, other=0.0) * scale_rgb
    green = tl.load(image + pixels + pixel, mask=is_pixel, other=0.0) * scale_rgb
    blue = tl.load(image + 2 * pixels + pixel, mask=is_pixel, other=0.0) * scale_rgb

    total = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for first in range(0, pixels, BLOCK_Q):
        other = first + tl.arange(0, BLOCK_Q)
        is_other = other < pixels
        distance = squared_difference(x, (other % width).to(tl.float32) * scale_xy)
        distance += squared_difference(y, (other // width).to(tl.float32) * scale_xy)
        distance += squared_difference(red, tl.load(image + other, mask=is_other, other=0.0) * scale_rgb)
        distance += squared_difference(green, tl.load(image + pixels + other, mask=is_other, other=0.0) * scale_rgb)
        distance += squared_difference(blue, tl.load(image + 2 * pixels + other, mask=is_other, other=0.0) * scale_rgb)
        weight = tl.exp2(-distance)
        value = tl.load(values + other[:, None], mask=is_other[:, None] & is_channel[None, :], other=0.0)
        total += tl.dot(weight, value, input_precision="ieee")
    target = out_ptr + (batch * channels + channel).to(tl.int64)[None, :] * pixels + pixel[:, None]
    tl.store(target, total, mask=is_pixel[:, None] & is_channel[None, :])


@triton.jit
def squared_difference(here, there):
    """Return the squared differences of [BLOCK_P] and [BLOCK_Q] numbers, [BLOCK_P, BLOCK_Q]."""
    difference = here[:, None] - there[None, :]
    return difference * difference


def launch_config(channels: int) -> dict[str, int]:
    """Return the tile. The distances are computed once per block of channels, so few blocks are better."""
    return {
        "BLOCK_P": 64,
        "BLOCK_Q": 32,
        "BLOCK_C": 16 if channels <= 16 else 32,
        "num_warps": 4,
    }


def gaussian_sum(values: Tensor, image: Tensor, sigma_xy: float, sigma_rgb: float) -> Tensor:
    """Return the sums of values [B, C, H, W], given the image [B, 3, H, W]; both are float32 and contiguous."""
    batch, channels, height, width = values.shape
    out = torch.empty_like(values)
    config = launch_config(channels)
    blocks = triton.cdiv(height * width, config["BLOCK_P"]) * triton.cdiv(channels, config["BLOCK_C"])
    unit = (LOG2_E / 2) ** 0.5
    with torch.cuda.device_of(values):
        gaussian_sum_kernel[(batch * blocks,)](
            values, image, out, channels, height, width, unit / sigma_xy, unit / sigma_rgb, **config
        )
    return out
