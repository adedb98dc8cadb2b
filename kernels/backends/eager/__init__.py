"""Plain PyTorch, on every device. The other backends are tested against the same float64 reference as this one."""

import torch
from torch import Tensor

from .affinities import affinity
from .filters import make_filter, mean_field, mean_field_gradient
from .propagation import propagate, propagate_transposed

__all__ = [
    "affinity",
    "empty_affinity",
    "make_filter",
    "mean_field",
    "mean_field_gradient",
    "propagate",
    "propagate_transposed",
    "unavailable",
]


def unavailable(device: torch.device) -> str | None:  # noqa: ARG001
    """Return None: PyTorch runs on every device."""
    return None


def empty_affinity(image: Tensor, neighbours: int) -> Tensor:
    """Return weights [B, N, H, W] for an image [B, K, H, W]; channels-last on CPUs, for the embedding lookup."""
    batch, _, height, width = image.shape
    return torch.empty(
        (batch, neighbours, height, width),
        dtype=torch.float32,
        device=image.device,
        memory_format=torch.channels_last if image.device.type == "cpu" else torch.contiguous_format,
    )
