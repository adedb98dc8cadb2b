"""Triton kernels, on NVIDIA and AMD GPUs. Triton is imported at the first call, not with the library."""

import functools
import os
from collections.abc import Sequence
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from ...gaussians import Gaussian
from ...variants import Variant
from ..eager import filters as eager
from ..eager import mean_field, mean_field_gradient
from ..eager.filters import Filter

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


def interpreted() -> bool:
    """Return whether the kernels run in Triton's interpreter, which takes tensors on any device."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def unavailable(device: torch.device) -> str | None:
    """Return why the kernels do not run on a device, or None if they do."""
    if device.type != "cuda" and not interpreted():  # "cuda" is also what PyTorch calls ROCm devices
        return "runs on CUDA and ROCm devices only"
    try:
        return _probe(device)
    except _CapturingError:
        return None


class _CapturingError(Exception):
    """No kernel can be tried while the work of the device is captured in a CUDA graph."""


@functools.cache  # an exception is not kept: the device is probed after the capture
def _probe(device: torch.device) -> str | None:
    """Return why a small kernel does not compile and run on a device, or None if it does."""
    if not _is_installed():
        return "needs the package triton, which is not installed"
    if device.type == "cuda" and torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise _CapturingError
    try:
        from . import launch

        with _disable_current_modes():  # PyTorch also asks while it traces with fake tensors
            launch.probe(device)
    except Exception as error:  # no C compiler, no assembler, a driver that is too old, ...
        first_line = str(error).strip().partition("\n")[0]
        return f"cannot compile and run a kernel: {type(error).__name__}: {first_line}"
    return None


def _is_installed() -> bool:
    try:
        return find_spec("triton") is not None
    except ValueError:  # an empty module stands in for it, as some programs put into sys.modules
        return False


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


def make_filter(image: Tensor | None, like: Tensor, gaussian: Gaussian, normalise: bool) -> Filter:
    """Return the filter of a Gaussian for values [B, C, H, W] like `like`.

    The eager filter serves position alone, which is two products of matrices, and float64, where speed does not matter.
    """
    if image is None or like.dtype != torch.float32:
        return eager.make_filter(image, like, gaussian, normalise)
    from . import filters

    image = eager.finite_or_nan(image).to(torch.float32).contiguous()

    def filter_exactly(values: Tensor, transposed: bool = False) -> Tensor:  # noqa: ARG001
        return filters.gaussian_sum(values.contiguous(), image, *gaussian)

    return eager.normalised(filter_exactly, like[:, :1], normalise)
