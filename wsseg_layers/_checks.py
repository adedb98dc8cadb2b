"""Checks at the library's boundary: every message names the argument, what it should be and what it was."""

import math
from collections.abc import Sequence
from numbers import Integral, Real

from torch import Tensor


def check_real(name: str, value: float) -> None:
    """Refuse anything but a finite number."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value}")


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Refuse a value that is not one of `choices`."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def check_count(name: str, value: int, minimum: int) -> None:
    """Refuse anything but an integer of at least `minimum`."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if value < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {value}")


def check_dilations(dilations: Sequence[int]) -> tuple[int, ...]:
    """Return the dilations as a tuple of positive integers, at least one."""
    if isinstance(dilations, (str, bytes)) or not isinstance(dilations, Sequence):
        raise TypeError(f"dilations must be a sequence of integers, got {dilations!r}")
    if not dilations:
        raise ValueError("dilations must hold at least one dilation, got none")
    for index, dilation in enumerate(dilations):
        check_count(f"dilations[{index}]", dilation, minimum=1)
    return tuple(int(dilation) for dilation in dilations)


def check_floating(name: str, tensor: Tensor) -> None:
    """Refuse anything but a real floating-point tensor."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    if not tensor.is_floating_point():
        raise TypeError(f"{name} must be a floating-point tensor, got {tensor.dtype}")


def check_maps(name: str, tensor: Tensor) -> None:
    """Refuse anything but a floating-point tensor [B, C, h, w]."""
    check_floating(name, tensor)
    if tensor.ndim != 4:
        raise ValueError(f"{name} must have 4 dimensions [B, C, h, w], got shape {list(tensor.shape)}")


def check_same_device(**tensors: Tensor) -> None:
    """Refuse tensors on different devices."""
    if len({tensor.device for tensor in tensors.values()}) > 1:
        placed = ", ".join(f"{name} on {tensor.device}" for name, tensor in tensors.items())
        raise ValueError(f"{' and '.join(tensors)} must be on one device, got {placed}")


def check_same_batch(**tensors: Tensor) -> None:
    """Refuse tensors of different batch sizes."""
    if len({tensor.shape[0] for tensor in tensors.values()}) > 1:
        sizes = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in tensors.items())
        raise ValueError(f"{' and '.join(tensors)} must have the same batch size, got {sizes}")
