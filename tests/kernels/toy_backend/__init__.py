"""A backend as somebody else would write it: five functions in a folder. It keeps a list of the calls it gets."""

from collections.abc import Sequence

import torch
from torch import Tensor

from wsseg_layers.kernels.backends import eager
from wsseg_layers.kernels.backends.eager import empty_affinity, propagate_transposed
from wsseg_layers.kernels.variants import Variant

__all__ = ["affinity", "empty_affinity", "propagate", "propagate_transposed", "unavailable"]

calls: list[str] = []


def unavailable(device: torch.device) -> str | None:
    """Return why it does not run on a device."""
    return None if device.type == "cpu" else "is a toy for CPUs"


def affinity(image: Tensor, dilations: Sequence[int], variant: Variant, out: Tensor) -> None:
    """Fill `out` with the affinity."""
    calls.append("affinity")
    eager.affinity(image, dilations, variant, out)


def propagate(
    mask: Tensor, affinity: Tensor, dilations: Sequence[int], num_iter: int, counts: Tensor | None = None
) -> Tensor:
    """Return the masks after `num_iter` iterations."""
    calls.append("propagate")
    return eager.propagate(mask, affinity, dilations, num_iter, counts)
