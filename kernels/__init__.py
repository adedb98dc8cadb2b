"""Dilated affinity and its propagation: the two operators behind PAMR and PAR."""

from collections.abc import Sequence

from torch import Tensor

from . import torch_pamr


def pamr_affinity(image: Tensor, dilations: Sequence[int], variant: str = "pamr", backend: str = "auto") -> Tensor:
    """Return the affinity [B, 8 x number of dilations, H, W] of an image [B, K, H, W], float32."""
    return torch_pamr.affinity(image.detach(), tuple(dilations), variant)


def pamr_propagate(
    mask: Tensor, affinity: Tensor, dilations: Sequence[int], num_iter: int, backend: str = "auto"
) -> Tensor:
    """Return the mask [B, C, H, W] propagated `num_iter` times, in its own dtype."""
    return torch_pamr.propagate(mask, affinity.detach(), tuple(dilations), num_iter)
