"""The affinity in Triton: the image is read once, moments and softmax stay in registers."""

# mypy: allow-untyped-defs
# Arguments of a jit function have the types that its launch gives them.

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...neighbourhood import limit_dilations, neighbour_offsets
from ...variants import Variant, position_affinity
from .launch import on_device


@triton.jit(do_not_specialize=["channels", "height", "width"])
def affinity_kernel(
    image_ptr,
    out_ptr,
    dilations_ptr,
    position_ptr,
    channels,
    height,
    width,
    NUM_DILATIONS: tl.constexpr,
    WEIGHT: tl.constexpr,
    SIGMA_POWER: tl.constexpr,
    POWER: tl.constexpr,
    GUARD: tl.constexpr,
    WITH_CENTRE: tl.constexpr,
    STEEP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Eq. 8: the softmax over the neighbours n of the mean over the channels of -(|I[i] - I[n]| / scale[i])^POWER.

    scale = GUARD + WEIGHT * sigma^SIGMA_POWER; eq. 8 as printed is sigma^2. A program computes all N weights of BLOCK_P
    consecutive pixels of an image, as a tile [BLOCK_N, BLOCK_P].
    """
    N: tl.constexpr = 8 * NUM_DILATIONS
    pixels = height * width
    blocks = tl.cdiv(pixels, BLOCK_P)
    batch = (tl.program_id(0) // blocks).to(tl.int64)  # so that no product of it overflows
    pixel = (tl.program_id(0) % blocks) * BLOCK_P + tl.arange(0, BLOCK_P)
    is_pixel = pixel < pixels
    y = pixel // width
    x = pixel % width

    n = tl.arange(0, BLOCK_N)
    is_neighbour = n < N
    dilation = tl.load(dilations_ptr + n // 8, mask=is_neighbour, other=0)
    window = n % 8 + (n % 8 > 3).to(tl.int32)  # in the row-major 3x3 window, without its centre
    row = tl.minimum(tl.maximum(y[None, :] + ((window // 3 - 1) * dilation)[:, None], 0), height - 1)
    column = tl.minimum(tl.maximum(x[None, :] + ((window % 3 - 1) * dilation)[:, None], 0), width - 1)
    neighbour = row * width + column
    is_value = is_neighbour[:, None] & is_pixel[None, :]

    distance = tl.zeros([BLOCK_N, BLOCK_P], tl.float32)  # minus the exponents of eq. 8, summed over the channels
    image_ptr += batch * channels * pixels
    for _ in range(channels):
        centre = tl.load(image_ptr + pixel, mask=is_pixel, other=0.0)
        value = tl.load(image_ptr + neighbour, mask=is_value, other=0.0)
        if STEEP:
            nearest, excess, variance = steep_moments(
                value, centre[None, :], is_neighbour[:, None], NUM_DILATIONS, WITH_CENTRE
            )
        else:
            nearest, excess, variance = moments(
                value, centre[None, :], is_neighbour[:, None], NUM_DILATIONS, WITH_CENTRE
            )
        inverse = 1 / (GUARD + WEIGHT * power_of_sigma(variance, SIGMA_POWER))
        # A term that all neighbours share cancels in the softmax. With s = |I[i] - I[n]| / scale, s may be replaced by
        # s - s_min, and s^2 by (s - s_min)(s + s_min).
        scaled = excess * inverse[None, :]
        distance += scaled * (scaled + (2 * nearest * inverse)[None, :]) if POWER == 2 else scaled  # eq. 8
        image_ptr += pixels

    exponent = tl.where(is_neighbour[:, None], -distance / channels, float("-inf"))
    weight = tl.exp(exponent - tl.max(exponent, axis=0)[None, :])
    weight = weight / tl.sum(weight, axis=0)[None, :]
    if position_ptr is not None:
        weight += tl.load(position_ptr + n, mask=is_neighbour, other=0.0)[:, None]
    out_ptr += (batch * N + n)[:, None] * pixels + pixel[None, :]
    tl.store(out_ptr, weight, mask=is_value)


@triton.jit
def moments(value, centre, is_neighbour, NUM_DILATIONS: tl.constexpr, WITH_CENTRE: tl.constexpr):
    """Return 0 as s_min, |I[i] - I[n]| and the variance of one channel, for exponents of at most some tens."""
    difference = tl.where(is_neighbour, value.to(tl.float32) - centre.to(tl.float32), 0.0)
    # Moments about the centre: exactly zero where the image is flat, and no cancellation however large its offset.
    total = tl.sum(difference, axis=0)
    squares = tl.sum(difference * difference, axis=0)
    samples: tl.constexpr = (9 if WITH_CENTRE else 8) * NUM_DILATIONS
    deviations = squares - total * total / samples
    variance = tl.where(deviations < 0, 0.0, deviations) / (samples - 1)  # tl.maximum would drop a NaN
    return tl.zeros_like(total), tl.abs(difference), variance


@triton.jit
def steep_moments(value, centre, is_neighbour, NUM_DILATIONS: tl.constexpr, WITH_CENTRE: tl.constexpr):
    """Return the least |I[i] - I[n]|, the excess of the others, and the variance, to the last digits of float32.

    Where the neighbours of an outlier are nearly equal, exponents reach 10^10 and their differences decide. Rounding
    I[i] - I[n] to float32 would lose them, so the rounding error is kept beside it.
    """
    if value.dtype == tl.float64:
        exact = value - centre
        difference = exact.to(tl.float32)
        error = (exact - difference.to(tl.float64)).to(tl.float32)
    else:
        value = value.to(tl.float32)
        centre = centre.to(tl.float32)
        difference = value - centre
        back = difference - value
        error = (value - (difference - back)) - (centre + back)  # exact: Knuth's sum of two numbers
    error = tl.where(error == error, error, 0.0)  # NaN where the difference is infinite
    error = tl.where(difference < 0, -error, error)
    difference = tl.where(is_neighbour, tl.abs(difference), float("inf"))
    nearest = tl.min(difference, axis=0)
    nearest_error = tl.min(tl.where(difference == nearest[None, :], error, float("inf")), axis=0)
    excess = (difference - nearest[None, :]) + (error - nearest_error[None, :])

    # Moments about the least neighbour, then about the mean.
    least = tl.min(tl.where(is_neighbour, value, float("inf")), axis=0)[None, :]
    offset = tl.where(is_neighbour, value - least, 0.0).to(tl.float32)
    centre_offset = tl.sum((centre - least).to(tl.float32), axis=0)  # [1, BLOCK_P] -> [BLOCK_P]
    total = tl.sum(offset, axis=0)
    samples: tl.constexpr = (9 if WITH_CENTRE else 8) * NUM_DILATIONS
    if WITH_CENTRE:
        total += NUM_DILATIONS * centre_offset
    mean = total / samples
    deviation = tl.where(is_neighbour, offset - mean[None, :], 0.0)
    squares = tl.sum(deviation * deviation, axis=0)
    if WITH_CENTRE:
        squares += NUM_DILATIONS * (centre_offset - mean) * (centre_offset - mean)
    return nearest, excess, squares / (samples - 1)


@triton.jit
def power_of_sigma(variance, SIGMA_POWER: tl.constexpr):
    """Return sigma to the power of 0, 1 or 2; as in PyTorch, the power of 0 is 1 also for NaN."""
    if SIGMA_POWER == 0:
        return tl.zeros_like(variance) + 1
    elif SIGMA_POWER == 1:  # noqa: RET505
        return tl.sqrt(variance)
    else:
        return variance


def launch_config(num_dilations: int, variant: Variant) -> dict[str, Any]:
    """Return the constants: for 6 dilations 8 values of the tile per thread, pixels of a row in neighbouring lanes."""
    block_n = triton.next_power_of_2(8 * num_dilations)
    return {
        "NUM_DILATIONS": num_dilations,
        "WEIGHT": variant.weight,
        "SIGMA_POWER": variant.sigma_power,
        "POWER": variant.power,
        "GUARD": variant.guard,
        "WITH_CENTRE": variant.with_centre,
        "STEEP": variant.is_steep,
        "BLOCK_N": block_n,
        "BLOCK_P": max(1, min(32, 4096 // block_n)),
        "num_warps": 8,
    }


def affinity(image: Tensor, dilations: Sequence[int], variant: Variant, out: Tensor) -> None:
    """Fill `out` [B, N, H, W], contiguous, with the affinity of an image [B, K, H, W] (eq. 8)."""
    image = image.contiguous()
    batch, channels, height, width = image.shape
    config = launch_config(len(dilations), variant)
    table = on_device(tuple(limit_dilations(dilations, height, width)), torch.int32, image.device)
    position = None
    if variant.position_weight > 0:
        weights = position_affinity(neighbour_offsets(dilations), variant)
        position = on_device(tuple(weights.tolist()), torch.float32, image.device)
    grid = (batch * triton.cdiv(height * width, config["BLOCK_P"]),)
    with torch.cuda.device_of(image):
        affinity_kernel[grid](image, out, table, position, channels, height, width, **config)
