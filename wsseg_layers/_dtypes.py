"""The dtypes in which the layers compute and return their results."""

import torch
from torch import Tensor

# Computed at import, because old versions of torch.compile cannot trace `is_autocast_available`.
AUTOCAST_DEVICES = frozenset(
    device_type
    for device_type in ("cpu", "cuda", "hpu", "ipu", "maia", "mps", "mtia", "xla", "xpu")
    if torch.amp.autocast_mode.is_autocast_available(device_type)
)


def common_dtype(*tensors: Tensor) -> torch.dtype:
    """Return the dtype that the dtypes of all inputs are promoted to."""
    dtype, *others = (tensor.dtype for tensor in tensors)
    for other in others:
        if other != dtype:
            dtype = torch.promote_types(dtype, other)
    return dtype


def working_dtype(*tensors: Tensor) -> torch.dtype:
    """Return the common dtype of the inputs, but at least float32."""
    dtype = common_dtype(*tensors)
    return dtype if dtype.itemsize >= 4 else torch.float32


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a tensor in a dtype. `Tensor.to` does the same, but takes a microsecond even if there is nothing to do."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def autocasts(device: torch.device) -> bool:
    """Return whether autocast is on for a device."""
    return device.type in AUTOCAST_DEVICES and torch.is_autocast_enabled(device.type)


def result_dtype(*tensors: Tensor) -> torch.dtype:
    """Return the common dtype of the inputs; under autocast the working dtype, as in reductions of PyTorch."""
    dtype = common_dtype(*tensors)
    if dtype.itemsize < 4 and autocasts(tensors[0].device):
        return torch.float32
    return dtype
