"""Triton kernels, on NVIDIA and AMD GPUs. Triton is imported at the first call, not with the library."""

import os
from collections.abc import Sequence
from importlib.util import find_spec

import torch
from torch import Tensor

from ...variants import Variant


def unavailable(device: torch.device) -> str | None:
    """Return why the kernels do not run on a device, or None if they do."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if device.type != "cuda" and not interpreted:  # "cuda" is also what PyTorch calls ROCm devices
        return "runs on CUDA and ROCm devices only"
    if find_spec("triton") is None:
        return "needs the package triton, which is not installed"
    return None


def empty_affinity(image: Tensor, neighbours: int) -> Tensor:
    """Return weights [B, N, H, W] for an image [B, K, H, W], contiguous: neighbouring pixels are read together."""
    batch, _, height, width = image.shape
    return image.new_empty((batch, neighbours, height, width), dtype=torch.float32)


def affinity(image: Tensor, dilations: Sequence[int], variant: Variant, out: Tensor) -> None:
    """Fill `out` [B, N, H, W], contiguous, with the affinity of an image [B, K, H, W] (eq. 8)."""
    from . import affinities

    affinities.affinity(image, dilations, variant, out)


def propagate(
    mask: Tensor, affinity: Tensor, dilations: Sequence[int], num_iter: int, counts: Tensor | None = None
) -> Tensor:
    """Return the masks [B, C, H, W] after `num_iter` iterations of eq. 7, contiguous, in their own dtype."""
    from . import propagation

    return propagation.propagate(mask, affinity, dilations, num_iter, counts)


def propagate_transposed(
    grad: Tensor, affinity: Tensor, dilations: Sequence[int], num_iter: int, counts: Tensor | None = None
) -> Tensor:
    """Return the transpose of `propagate`, applied to `grad` [B, C, H, W]: the gradient of the masks."""
    from . import propagation

    return propagation.propagate_transposed(grad, affinity, dilations, num_iter, counts)
