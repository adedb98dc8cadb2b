"""Checks of arguments. Every message names the argument, what is expected and what was given."""

import math
from collections.abc import Sequence
from numbers import Integral, Real

import torch
from torch import Tensor

INT32_MAX = 2**31 - 1
# Numbers, because old versions of torch.compile cannot read the attributes of finfo.
FLOAT32_MAX, FLOAT32_TINY = torch.finfo(torch.float32).max, torch.finfo(torch.float32).tiny
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def check_real(name: str, value: float) -> None:
    """Refuse anything but a number that float32 can hold."""
    if type(value) is float and -FLOAT32_MAX <= value <= FLOAT32_MAX:
        return  # the checks below take some microseconds
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    # A large integer does not fit a float, and NumPy's float16 compares correctly only as a Python float.
    magnitude = abs(value if isinstance(value, Integral) else float(value))
    if not magnitude < math.inf:
        raise ValueError(f"{name} must be finite, got {value}")
    if magnitude > FLOAT32_MAX:
        raise ValueError(f"{name} must be at most {FLOAT32_MAX:.3g}, the largest float32, got {value}")


def check_positive(name: str, value: float) -> None:
    """Refuse anything but a positive number that is not 0 in float32."""
    check_real(name, value)
    if value <= 0:
        raise ValueError(f"{name} must be positive, got {value}")
    if value < FLOAT32_TINY:
        raise ValueError(f"{name} must be at least {FLOAT32_TINY:.3g}, below which it is 0 in float32, got {value}")


def check_not_negative(name: str, value: float) -> None:
    """Refuse anything but a number of at least 0."""
    check_real(name, value)
    if value < 0:
        raise ValueError(f"{name} must be at least 0, got {value}")


def check_flag(name: str, value: bool) -> None:
    """Refuse anything but True and False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Refuse a value that is not one of `choices`."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def check_integer(name: str, value: int) -> None:
    """Refuse anything but an integer."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an integer, got {value!r}")


def check_count(name: str, value: int, minimum: int) -> None:
    """Refuse anything but an integer of 32 bits of at least `minimum`."""
    check_integer(name, value)
    if value < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {value}")
    if value > INT32_MAX:
        raise ValueError(f"{name} must be at most {INT32_MAX}, got {value}")


def check_dilations(dilations: Sequence[int]) -> tuple[int, ...]:
    """Return the dilations as a tuple of positive integers, at least one."""
    if type(dilations) is tuple and dilations and all(type(d) is int and 0 < d <= INT32_MAX for d in dilations):
        return dilations  # PAMR and PAR pass a checked tuple; the checks below take 10 us
    if isinstance(dilations, (str, bytes)) or not isinstance(dilations, Sequence):
        raise TypeError(f"dilations must be a sequence of integers, got {dilations!r}")
    if not dilations:
        raise ValueError("dilations must hold at least one dilation, got none")
    for index, dilation in enumerate(dilations):
        check_count(f"dilations[{index}]", dilation, minimum=1)
    return tuple(int(dilation) for dilation in dilations)


def check_floating(name: str, tensor: Tensor) -> None:
    """Refuse anything but a dense tensor of float16, bfloat16, float32 or float64."""
    if type(tensor) is Tensor and tensor.dtype in DTYPES and tensor.layout is torch.strided and not tensor.is_nested:
        return
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    if not tensor.is_floating_point():
        raise TypeError(f"{name} must be a floating-point tensor, got {tensor.dtype}")
    if tensor.dtype not in DTYPES:
        raise TypeError(f"{name} must have dtype {', '.join(map(str, DTYPES))}, got {tensor.dtype}")
    check_dense(name, tensor)


def check_dense(name: str, tensor: Tensor) -> None:
    """Refuse a sparse or nested tensor."""
    if tensor.is_nested or tensor.layout is not torch.strided:
        layout = "a nested tensor" if tensor.is_nested else f"layout {tensor.layout}"
        raise TypeError(f"{name} must be a dense tensor, got {layout}")


def check_integers(name: str, tensor: Tensor) -> None:
    """Refuse anything but a dense integer tensor."""
    if not isinstance(tensor, Tensor) or tensor.dtype not in INTEGERS:
        given = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
        raise TypeError(f"{name} must be an integer tensor ({', '.join(map(str, INTEGERS))}), got {given}")
    check_dense(name, tensor)


def check_maps(name: str, tensor: Tensor) -> None:
    """Refuse anything but a floating-point tensor [B, C, h, w]."""
    check_floating(name, tensor)
    if tensor.ndim != 4:
        raise ValueError(f"{name} must have 4 dimensions [B, C, h, w], got shape {list(tensor.shape)}")


def check_pixels(name: str, tensor: Tensor) -> None:
    """Refuse maps [B, C, h, w] without a channel or without a pixel; the batch may be empty."""
    if 0 in tensor.shape[1:]:
        raise ValueError(f"{name} must have at least one channel and one pixel, got shape {list(tensor.shape)}")


def check_same_device(*named: tuple[str, Tensor]) -> None:
    """Refuse tensors, given as pairs (name, tensor), that are not all on one device."""
    (_, first), *others = named
    if any(tensor.device != first.device for _, tensor in others):
        placed = ", ".join(f"{name} on {tensor.device}" for name, tensor in named)
        raise ValueError(f"{_names(named)} must be on one device, got {placed}")


def check_same_batch(*named: tuple[str, Tensor]) -> None:
    """Refuse tensors, given as pairs (name, tensor), of different batch sizes."""
    (_, first), *others = named
    # Compared one by one: a set of sizes would make torch.compile and torch.export fix a dynamic batch size.
    if any(tensor.shape[0] != first.shape[0] for _, tensor in others):
        sizes = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in named)
        raise ValueError(f"{_names(named)} must have the same batch size, got {sizes}")


def check_multiple_batch(named: tuple[str, Tensor], named_other: tuple[str, Tensor]) -> None:
    """Refuse a tensor whose batch size is not a multiple of the other's; both are given as pairs (name, tensor)."""
    (name, tensor), (other_name, other) = named, named_other
    if tensor.shape[0] == other.shape[0]:
        return
    if other.shape[0] == 0 or tensor.shape[0] == 0 or tensor.shape[0] % other.shape[0]:
        raise ValueError(
            f"{name} must have the same batch size as {other_name}, or a multiple of it,"
            f" got {name} {list(tensor.shape)}, {other_name} {list(other.shape)}"
        )


def _names(named: Sequence[tuple[str, Tensor]]) -> str:
    return " and ".join(name for name, _ in named)
