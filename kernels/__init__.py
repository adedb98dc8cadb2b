"""The dilated affinity and its propagation: the two operators that PAMR and PAR are made of.

Both are registered with PyTorch (`torch.ops.wsseg_layers`), so that `torch.compile` takes them without a graph break:
Triton kernels on NVIDIA and AMD GPUs, C++ on CPUs, plain PyTorch on every device.
"""

import os
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.autograd import forward_ad

from wsseg_layers._checks import (
    check_choice,
    check_count,
    check_dilations,
    check_maps,
    check_pixels,
    check_same_batch,
    check_same_device,
)

from . import cpp_library, cpp_refine, torch_affinity, torch_propagate
from .variants import VARIANTS

__all__ = ["BACKENDS", "VARIANTS", "Backend", "pamr_affinity", "pamr_propagate"]

Backend = Literal["auto", "triton", "cpp", "torch"]
BACKENDS = get_args(Backend)

_TRITON_INSTALLED = find_spec("triton") is not None
_TRITON_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def pamr_affinity(image: Tensor, dilations: Sequence[int], variant: str = "pamr", backend: str = "auto") -> Tensor:
    r"""Compute how much every pixel resembles its neighbours.

    A pixel's neighbours are the 8 at offsets {-d, 0, d} for every dilation d, row by row, the border replicated. With
    their differences :math:`|I_i - I_n|`, averaged over the channels before the softmax over the neighbours:

    * ``"pamr"``: softmax of :math:`-|I_i - I_n| / (10^{-8} + 0.1 \sigma_i)`, the authors' published form. sigma is the
      unbiased standard deviation of the neighbours and of the pixel itself, once for every dilation.
    * ``"paper"``: softmax of :math:`-|I_i - I_n| / (10^{-8} + \sigma_i^2)`, eq. 8 as printed. The guard, on which the
      paper is silent, is that of the published form.
    * ``"par"``: softmax of :math:`-(|I_i - I_n| / (10^{-8} + \sigma_i) / 0.3)^2` with sigma of the neighbours alone,
      plus 0.01 times a softmax of the same form over their distances from the pixel.

    Where the image is flat, the weights are uniform. A NaN in the image makes the weights of every pixel that has it in
    its neighbourhood NaN. No gradient flows to the image: the affinity is a constant of the refinement.

    Args:
        image: image, [B, K, H, W], any floating-point dtype and strides. The batch may be empty.
        dilations: positive integers. A dilation may be larger than the image.
        variant: "pamr", "paper", "par", or another form of `kernels/variants.py`.
        backend: "triton" (CUDA and ROCm), "cpp" (CPUs), "torch" (everywhere), or "auto": the first of them that runs.

    Returns:
        Affinity, [B, N, H, W], N = 8 x number of dilations, float32 also under autocast. It sums to 1 over N, or to
        1.01 for "par". Its strides are those that `pamr_propagate` reads fastest.

    Raises:
        TypeError: `image` is no floating-point tensor, or `dilations` holds something else than integers.
        ValueError: a dimension is missing or empty, a dilation is not positive, `variant` or `backend` is unknown, or
            the backend is not available.

    Source:
        Araslanov and Roth, CVPR 2020, eq. 8; "par": Ru et al., CVPR 2022, section 3.4.

    Example:
        >>> import torch
        >>> pamr_affinity(torch.zeros(1, 3, 4, 5), dilations=[1, 2])[0, :, 0, 0].mul(16).tolist() == [1.0] * 16
        True
    """
    check_maps("image", image)
    check_pixels("image", image)
    dilations = check_dilations(dilations)
    check_choice("variant", variant, tuple(VARIANTS))
    _check_backend(backend, image=image)
    return _affinity(image.detach(), dilations, variant, backend)


def pamr_propagate(
    mask: Tensor, affinity: Tensor, dilations: Sequence[int], num_iter: int, backend: str = "auto"
) -> Tensor:
    r"""Replace every pixel of the masks by the weighted sum of its neighbours, `num_iter` times.

    .. math:: m^t_{:,i} = \sum_{n \in N(i)} \alpha_{i,n} \, m^{t-1}_{:,n}

    Sums are taken in float32 (float64 for float64 masks), also under autocast. The operator is differentiable in the
    masks, any number of times; the affinity is a constant.

    Args:
        mask: masks, [B, C, H, W], any floating-point dtype and strides. The batch may be empty.
        affinity: weights, [B, N, H, W], as `pamr_affinity` returns them for the same dilations.
        dilations: positive integers.
        num_iter: number of iterations; 0 copies the masks.
        backend: "triton" (CUDA and ROCm), "cpp" (CPUs), "torch" (everywhere), or "auto": the first of them that runs.

    Returns:
        Masks, [B, C, H, W], contiguous and in the dtype of `mask`.

    Raises:
        TypeError: `mask` or `affinity` is no floating-point tensor, `dilations` or `num_iter` is not made of integers.
        ValueError: sizes or devices differ, a dimension is missing or empty, a number is out of range, the affinity
            requires a gradient, `backend` is unknown or not available.

    Source:
        Araslanov and Roth, CVPR 2020, eq. 7.

    Example:
        >>> import torch
        >>> affinity = pamr_affinity(torch.rand(1, 3, 6, 7), dilations=[1, 2])
        >>> ones = torch.ones(1, 21, 6, 7)
        >>> torch.allclose(pamr_propagate(ones, affinity, dilations=[1, 2], num_iter=10), ones)
        True
    """
    for name, maps in {"mask": mask, "affinity": affinity}.items():
        check_maps(name, maps)
        check_pixels(name, maps)
    dilations = check_dilations(dilations)
    check_count("num_iter", num_iter, minimum=0)
    check_same_batch(mask=mask, affinity=affinity)
    check_same_device(mask=mask, affinity=affinity)
    if mask.shape[2:] != affinity.shape[2:]:
        raise ValueError(
            f"mask and affinity must have the same height and width, got mask {list(mask.shape)},"
            f" affinity {list(affinity.shape)}"
        )
    if affinity.shape[1] != 8 * len(dilations):
        raise ValueError(
            f"affinity must have 8 channels for each of {len(dilations)} dilations, got shape {list(affinity.shape)}"
        )
    if affinity.requires_grad and torch.is_grad_enabled():
        raise ValueError("affinity must not require a gradient, for none flows to it: pass affinity.detach()")
    _check_backend(backend, mask=mask)
    mask, tangent = forward_ad.unpack_dual(mask)
    refined = _propagate(mask, affinity, dilations, num_iter, backend)
    if tangent is None:
        return refined
    # A custom operator would drop the tangent in silence. It is linear: the tangent is propagated like the masks.
    return forward_ad.make_dual(refined, pamr_propagate(tangent, affinity, dilations, num_iter, backend))


def _check_backend(backend: str, **argument: Tensor) -> None:
    check_choice("backend", backend, BACKENDS)
    ((name, tensor),) = argument.items()
    device = tensor.device.type
    if backend == "triton" and not _TRITON_INSTALLED:
        raise ValueError("backend='triton' needs the package triton, which is not installed")
    if backend == "triton" and not (device == "cuda" or _TRITON_INTERPRETED):  # which is ROCm's name too
        raise ValueError(f"backend='triton' needs tensors on a CUDA or ROCm device, got {name} on {tensor.device}")
    if backend == "cpp" and device != "cpu":
        raise ValueError(f"backend='cpp' needs tensors on the CPU, got {name} on {tensor.device}")


def _implementation(backend: str, device: torch.device) -> str:
    """Return what "auto" is on a device. Operators ask for themselves: a trace cannot wait for a C++ compiler."""
    if backend == "auto":
        if device.type == "cuda" and _TRITON_INSTALLED:
            return "triton"
        return "cpp" if device.type == "cpu" and cpp_library.load() else "torch"
    if backend == "cpp" and not cpp_library.load():
        raise ValueError("backend='cpp' needs Linux and a C++ compiler: c++, or what the variable CXX names")
    return backend


@torch.library.custom_op("wsseg_layers::pamr_affinity", mutates_args=())
def _affinity(image: Tensor, dilations: Sequence[int], variant: str, backend: str) -> Tensor:
    affinity = _empty_affinity(image, dilations, variant, backend)
    if affinity.numel() == 0:
        return affinity
    implementation = _implementation(backend, image.device)
    if implementation == "triton":
        from . import triton_affinity

        triton_affinity.affinity(image, dilations, variant, out=affinity)
    elif implementation == "cpp":
        cpp_refine.affinity(image, dilations, variant, out=affinity)
    else:
        torch_affinity.affinity(image, dilations, variant, out=affinity)
    return affinity


@_affinity.register_fake
def _empty_affinity(image: Tensor, dilations: Sequence[int], variant: str, backend: str) -> Tensor:  # noqa: ARG001
    batch, _, height, width = image.shape
    implementation = _implementation(backend, image.device)
    if implementation == "cpp":
        return cpp_refine.empty_affinity(batch, 8 * len(dilations), height, width)
    # PyTorch's propagation reads a pixel's N weights together, Triton's those of neighbouring pixels.
    together = implementation == "torch" and image.device.type == "cpu"
    return torch.empty(
        (batch, 8 * len(dilations), height, width),
        dtype=torch.float32,
        device=image.device,
        memory_format=torch.channels_last if together else torch.contiguous_format,
    )


@torch.library.custom_op("wsseg_layers::pamr_propagate", mutates_args=())
def _propagate(mask: Tensor, affinity: Tensor, dilations: Sequence[int], num_iter: int, backend: str) -> Tensor:
    if num_iter == 0 or mask.numel() == 0:
        return mask.clone(memory_format=torch.contiguous_format)
    implementation = _implementation(backend, mask.device)
    if implementation == "triton":
        from . import triton_propagate

        return triton_propagate.propagate(mask, affinity, dilations, num_iter)
    if implementation == "cpp":
        return cpp_refine.propagate(mask, affinity, dilations, num_iter)
    return torch_propagate.propagate(mask, affinity, dilations, num_iter)


@torch.library.custom_op("wsseg_layers::pamr_propagate_transposed", mutates_args=())
def _propagate_transposed(
    grad: Tensor, affinity: Tensor, dilations: Sequence[int], num_iter: int, backend: str
) -> Tensor:
    if num_iter == 0 or grad.numel() == 0:
        return grad.clone(memory_format=torch.contiguous_format)
    if _implementation(backend, grad.device) == "triton":
        from . import triton_propagate

        return triton_propagate.propagate_transposed(grad, affinity, dilations, num_iter)
    return torch_propagate.propagate_transposed(grad, affinity, dilations, num_iter)


@_propagate.register_fake
@_propagate_transposed.register_fake
def _empty_result(x: Tensor, affinity: Tensor, dilations: Sequence[int], num_iter: int, backend: str) -> Tensor:  # noqa: ARG001
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _save_operands(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    _, affinity, *ctx.settings = inputs
    ctx.save_for_backward(affinity)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return _propagate_transposed(grad, *ctx.saved_tensors, *ctx.settings), None, None, None, None


def _backward_of_transposed(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return _propagate(grad, *ctx.saved_tensors, *ctx.settings), None, None, None, None


# The operator is linear in the mask: it and its transpose are each other's gradient.
_propagate.register_autograd(_backward, setup_context=_save_operands)
_propagate_transposed.register_autograd(_backward_of_transposed, setup_context=_save_operands)
