"""The dtypes in which the layers compute and return their results."""

from functools import reduce

import torch
from torch import Tensor


def working_dtype(*tensors: Tensor) -> torch.dtype:
    """Return the common dtype of the inputs, but at least float32."""
    return reduce(torch.promote_types, (tensor.dtype for tensor in tensors), torch.float32)


def autocasts(device: torch.device) -> bool:
    """Return whether autocast is on for a device."""
    return torch.amp.autocast_mode.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)


def result_dtype(*tensors: Tensor) -> torch.dtype:
    """Return the common dtype of the inputs; under autocast the working dtype, as in reductions of PyTorch."""
    if autocasts(tensors[0].device):
        return working_dtype(*tensors)
    return reduce(torch.promote_types, (tensor.dtype for tensor in tensors))
