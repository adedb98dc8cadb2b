"""The affinity in Triton: the image is read once, moments and softmax stay in registers."""

# mypy: allow-untyped-defs
# Arguments of a jit function have the types that its launch gives them.

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...variants import Variant


@triton.jit
def affinity_kernel(
    image,
    out,
    channels,
    height,
    width,
    DILATIONS: tl.constexpr,
    WEIGHT: tl.constexpr,
    SIGMA_POWER: tl.constexpr,
    POWER: tl.constexpr,
    GUARD: tl.constexpr,
    SAMPLES: tl.constexpr,
    POSITION_WEIGHT: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """A program computes all N weights of BLOCK_P consecutive pixels of one image, as a tile [BLOCK_N, BLOCK_P]."""
    N: tl.constexpr = 8 * len(DILATIONS)
    pixels = height * width
    blocks = tl.cdiv(pixels, BLOCK_P)
    batch = (tl.program_id(0) // blocks).to(tl.int64)
    pixel = (tl.program_id(0) % blocks) * BLOCK_P + tl.arange(0, BLOCK_P)
    is_pixel = pixel < pixels
    y = pixel // width
    x = pixel % width

    n = tl.arange(0, BLOCK_N)
    is_neighbour = n < N
    dilation = tl.zeros([BLOCK_N], tl.int32)
    for i in tl.static_range(len(DILATIONS)):
        dilation = tl.where(n // 8 == i, DILATIONS[i], dilation)
    position = n % 8 + (n % 8 > 3).to(tl.int32)  # in the row-major 3x3 window, without its centre
    row = tl.minimum(tl.maximum(y[None, :] + ((position // 3 - 1) * dilation)[:, None], 0), height - 1)
    column = tl.minimum(tl.maximum(x[None, :] + ((position % 3 - 1) * dilation)[:, None], 0), width - 1)
    neighbour = row * width + column
    is_value = is_neighbour[:, None] & is_pixel[None, :]

    similarity = tl.zeros([BLOCK_N, BLOCK_P], DTYPE)
    plane = image + batch * channels * pixels
    for _ in range(channels):
        centre = tl.load(plane + pixel, mask=is_pixel, other=0.0).to(DTYPE)
        value = tl.load(plane + neighbour, mask=is_value, other=0.0).to(DTYPE)
        # Moments about the centre: exactly zero where the image is flat, and no cancellation however large its offset.
        difference = tl.where(is_neighbour[:, None], value - centre[None, :], 0.0)
        total = tl.sum(difference, axis=0)
        squares = tl.sum(difference * difference, axis=0)
        variance = tl.maximum(squares - total * total / SAMPLES, 0.0) / (SAMPLES - 1)
        sigma = power_of_sigma(variance, SIGMA_POWER)
        scaled = tl.abs(difference) / (GUARD + WEIGHT * sigma)[None, :]
        similarity -= scaled * scaled if POWER == 2 else scaled
        plane += pixels

    similarity = tl.where(is_neighbour[:, None], similarity / channels, float("-inf"))
    weight = tl.exp(similarity - tl.max(similarity, axis=0)[None, :])
    weight = weight / tl.sum(weight, axis=0)[None, :]
    if POSITION_WEIGHT > 0:
        position_term = position_weight(dilation, position, is_neighbour, N, WEIGHT, SIGMA_POWER, POWER, GUARD)
        weight += (POSITION_WEIGHT * position_term)[:, None]
    target = out + (batch * N + n)[:, None] * pixels + pixel[None, :]
    tl.store(target, weight.to(tl.float32), mask=is_value)


@triton.jit
def power_of_sigma(variance, SIGMA_POWER: tl.constexpr):
    """Return sigma to the power of 0, 1 or 2."""
    if SIGMA_POWER == 0:
        return variance * 0 + 1
    elif SIGMA_POWER == 1:  # noqa: RET505
        return tl.sqrt(variance)
    else:
        return variance


@triton.jit
def position_weight(
    dilation,
    position,
    is_neighbour,
    N: tl.constexpr,
    WEIGHT: tl.constexpr,
    SIGMA_POWER: tl.constexpr,
    POWER: tl.constexpr,
    GUARD: tl.constexpr,
):
    """The position term of every neighbour: a softmax over the distances from the pixel."""
    on_diagonal = position % 2 == 0
    distance = tl.where(is_neighbour, dilation.to(tl.float64) * tl.where(on_diagonal, 2**0.5, 1.0), 0.0)
    deviation = tl.where(is_neighbour, distance - tl.sum(distance, axis=0) / N, 0.0)
    variance = tl.sum(deviation * deviation, axis=0) / (N - 1)
    scaled = distance / (GUARD + WEIGHT * power_of_sigma(variance, SIGMA_POWER))
    exponent = tl.where(is_neighbour, -(scaled * scaled if POWER == 2 else scaled), float("-inf"))
    term = tl.exp(exponent - tl.max(exponent, axis=0))
    return term / tl.sum(term, axis=0)


def launch_config(dilations: Sequence[int], variant: Variant) -> dict[str, Any]:
    """Return the constants: about 16 values of the tile a thread, the pixels of a row in neighbouring lanes."""
    block_n = triton.next_power_of_2(8 * len(dilations))
    return {
        "DILATIONS": tuple(dilations),
        "WEIGHT": variant.weight,
        "SIGMA_POWER": variant.sigma_power,
        "POWER": variant.power,
        "GUARD": variant.guard,
        "SAMPLES": variant.samples(len(dilations)),
        "POSITION_WEIGHT": variant.position_weight,
        "DTYPE": tl.float64 if variant.in_double else tl.float32,
        "BLOCK_N": block_n,
        "BLOCK_P": max(1, min(32, 4096 // block_n)),
        "num_warps": 4,
    }


def affinity(image: Tensor, dilations: Sequence[int], variant: Variant, out: Tensor) -> None:
    """Fill `out` [B, N, H, W], contiguous, with the affinity of an image [B, K, H, W]."""
    image = image.contiguous()
    batch, channels, height, width = image.shape
    config = launch_config(dilations, variant)
    grid = (batch * triton.cdiv(height * width, config["BLOCK_P"]),)
    with torch.cuda.device_of(image):
        affinity_kernel[grid](image, out, channels, height, width, **config)
