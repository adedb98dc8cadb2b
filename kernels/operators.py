"""The two operators, `pamr_affinity` and `pamr_propagate`: checks, registration with PyTorch and gradients."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from wsseg_layers._checks import (
    check_choice,
    check_count,
    check_dilations,
    check_flag,
    check_maps,
    check_not_negative,
    check_pixels,
    check_positive,
    check_same_batch,
    check_same_device,
)

from .backends import BACKENDS, find_backend
from .variants import VARIANTS, Variant, VariantName

BackendName = Literal["auto", "triton", "cpp", "eager"]


def pamr_affinity(
    image: Tensor,
    dilations: Sequence[int],
    variant: VariantName | Variant = "pamr",
    backend: BackendName = "auto",
) -> Tensor:
    r"""Compute the similarity of every pixel to its neighbours (eq. 8).

    A pixel has 8 neighbours per dilation d, at the offsets {-d, 0, d} x {-d, 0, d} without (0, 0), row by row. The
    border of the image is replicated. The differences :math:`|I_i - I_n|` are scaled as follows, averaged over the
    channels and passed through a softmax over the neighbours:

    * ``"pamr"``: softmax of :math:`-|I_i - I_n| / (10^{-8} + 0.1 \sigma_i)`, the authors' published form. sigma is the
      unbiased standard deviation of the neighbours and of the pixel itself, which counts once per dilation.
    * ``"paper"``: softmax of :math:`-|I_i - I_n| / (10^{-8} + \sigma_i^2)`, eq. 8 as printed. The paper does not
      mention the 1e-8; it is that of the published form.
    * ``"par"``: softmax of :math:`-(|I_i - I_n| / (10^{-8} + \sigma_i) / 0.3)^2` with sigma of the neighbours alone,
      plus 0.01 times a softmax of the same form over their distances from the pixel.

    Where the image is flat, the weights are uniform. A NaN in the image makes the weights of every pixel NaN that has
    it in its neighbourhood. No gradient flows to the image: the affinity is a constant of the refinement.

    Args:
        image: image, [B, K, H, W], any floating-point dtype and strides. The batch may be empty.
        dilations: positive integers. A dilation may be larger than the image.
        variant: "pamr", "paper", "par", another key of `wsseg_layers.kernels.VARIANTS`, or a `Variant` with your own
            numbers.
        backend: "triton" (CUDA and ROCm), "cpp" (CPUs), "eager" (PyTorch, everywhere), or "auto": the first of them
            that is usable; see `wsseg_layers.kernels.available_backends`.

    Returns:
        Affinity, [B, N, H, W], N = 8 x number of dilations, float32 also under autocast. It sums to 1 over N, or to
        1.01 for "par". Its strides are those that `pamr_propagate` reads fastest.

    Raises:
        TypeError: `image` is no floating-point tensor, or `dilations` or `variant` has the wrong type.
        ValueError: a dimension is missing or empty, a dilation is not positive, `variant` or `backend` is unknown, or
            the backend is not usable.

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
    numbers = check_variant(variant)
    check_backend(backend)
    return torch.ops.wsseg_layers.pamr_affinity(image.detach(), dilations, *numbers, backend)


def pamr_propagate(
    mask: Tensor, affinity: Tensor, dilations: Sequence[int], num_iter: int, backend: BackendName = "auto"
) -> Tensor:
    r"""Replace every pixel of the masks by the weighted sum of its neighbours, `num_iter` times (eq. 7).

    .. math:: m^t_{:,i} = \sum_{n \in N(i)} \alpha_{i,n} \, m^{t-1}_{:,n}

    Sums are computed in float32 (float64 for float64 masks), also under autocast. The operator is differentiable with
    respect to the masks, any number of times, in reverse and forward mode; the affinity is a constant.

    Args:
        mask: masks, [B, C, H, W], any floating-point dtype and strides. The batch may be empty.
        affinity: weights, [B, N, H, W], as `pamr_affinity` returns them for the same dilations.
        dilations: positive integers.
        num_iter: number of iterations; 0 copies the masks.
        backend: "triton" (CUDA and ROCm), "cpp" (CPUs), "eager" (PyTorch, everywhere), or "auto": the first of them
            that is usable.

    Returns:
        Masks, [B, C, H, W], contiguous and in the dtype of `mask`.

    Raises:
        TypeError: `mask` or `affinity` is no floating-point tensor, or `dilations` or `num_iter` has the wrong type.
        ValueError: sizes or devices differ, a dimension is missing or empty, a number is out of range, the affinity
            requires a gradient, or `backend` is unknown or not usable.

    Source:
        Araslanov and Roth, CVPR 2020, eq. 7.

    Example:
        >>> import torch
        >>> affinity = pamr_affinity(torch.rand(1, 3, 6, 7), dilations=[1, 2])
        >>> ones = torch.ones(1, 21, 6, 7)
        >>> torch.allclose(pamr_propagate(ones, affinity, dilations=[1, 2], num_iter=10), ones)
        True
    """
    for name, maps in (("mask", mask), ("affinity", affinity)):
        check_maps(name, maps)
        check_pixels(name, maps)
    dilations = check_dilations(dilations)
    check_count("num_iter", num_iter, minimum=0)
    check_same_batch(("mask", mask), ("affinity", affinity))
    check_same_device(("mask", mask), ("affinity", affinity))
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
        raise ValueError("affinity must not require a gradient, because none flows to it: pass affinity.detach()")
    check_backend(backend)
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return torch.ops.wsseg_layers.pamr_propagate(mask, affinity, dilations, num_iter, backend)
    return _Propagate.apply(mask, affinity, dilations, num_iter, False, backend)


def check_backend(backend: str) -> None:
    """Refuse a name that is neither "auto" nor in the table of backends."""
    check_choice("backend", backend, ("auto", *BACKENDS))


def check_variant(variant: str | Variant) -> Variant:
    """Return the numbers of a variant, given by its name or as they are."""
    if not isinstance(variant, Variant):
        check_choice("variant", variant, tuple(VARIANTS))
        return VARIANTS[variant]
    check_positive("variant.weight", variant.weight)
    for name, power, choices in (
        ("sigma_power", variant.sigma_power, (0, 1, 2)),
        ("power", variant.power, (1, 2)),
    ):
        if power not in choices or isinstance(power, bool):
            raise ValueError(f"variant.{name} must be one of {', '.join(map(str, choices))}, got {power!r}")
    check_not_negative("variant.guard", variant.guard)
    check_not_negative("variant.position_weight", variant.position_weight)
    check_flag("variant.with_centre", variant.with_centre)
    return variant


# torch.library.custom_op would do the same, but its first call imports torch._dynamo, which takes 2 s.
_library = torch.library.Library("wsseg_layers", "DEF")
_PROPAGATE = "(Tensor x, Tensor affinity, int[] dilations, int num_iter, str backend) -> Tensor"
_library.define(
    "pamr_affinity(Tensor image, int[] dilations, float weight, int sigma_power, int power, float guard,"
    " bool with_centre, float position_weight, str backend) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)
_library.define(f"pamr_propagate{_PROPAGATE}", tags=torch.Tag.pt2_compliant_tag)
_library.define(f"pamr_propagate_transposed{_PROPAGATE}", tags=torch.Tag.pt2_compliant_tag)


def _affinity(image: Tensor, dilations: Sequence[int], *numbers_and_backend: Any) -> Tensor:
    *numbers, backend = numbers_and_backend
    implementation = find_backend(backend, image.device)
    out = implementation.empty_affinity(image, 8 * len(dilations))
    if out.numel() > 0:
        implementation.affinity(image, dilations, Variant(*numbers), out)
    return out


def _fake_affinity(image: Tensor, dilations: Sequence[int], *numbers_and_backend: Any) -> Tensor:
    backend = numbers_and_backend[-1]
    return find_backend(backend, image.device).empty_affinity(image, 8 * len(dilations))


def _propagate(x: Tensor, affinity: Tensor, dilations: Sequence[int], num_iter: int, backend: str) -> Tensor:
    implementation = find_backend(backend, x.device)
    if num_iter == 0 or x.numel() == 0:
        return x.clone(memory_format=torch.contiguous_format)
    return implementation.propagate(x, affinity, dilations, num_iter)


def _propagate_transposed(x: Tensor, affinity: Tensor, dilations: Sequence[int], num_iter: int, backend: str) -> Tensor:
    implementation = find_backend(backend, x.device)
    if num_iter == 0 or x.numel() == 0:
        return x.clone(memory_format=torch.contiguous_format)
    return implementation.propagate_transposed(x, affinity, dilations, num_iter)


def _fake_propagate(x: Tensor, affinity: Tensor, dilations: Sequence[int], num_iter: int, backend: str) -> Tensor:  # noqa: ARG001
    find_backend(backend, x.device)
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _save_operands(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    _, affinity, *ctx.settings = inputs
    ctx.save_for_backward(affinity)


# Eq. 7 is linear in the masks: the operator and its transpose are each other's gradient.
def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (affinity,) = ctx.saved_tensors
    return torch.ops.wsseg_layers.pamr_propagate_transposed(grad, affinity, *ctx.settings), None, None, None, None


def _backward_of_transposed(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (affinity,) = ctx.saved_tensors
    return torch.ops.wsseg_layers.pamr_propagate(grad, affinity, *ctx.settings), None, None, None, None


for _name, _kernel, _fake in (
    ("pamr_affinity", _affinity, _fake_affinity),
    ("pamr_propagate", _propagate, _fake_propagate),
    ("pamr_propagate_transposed", _propagate_transposed, _fake_propagate),
):
    _library.impl(_name, _kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"wsseg_layers::{_name}", _fake, lib=_library)
for _name, _formula in (("pamr_propagate", _backward), ("pamr_propagate_transposed", _backward_of_transposed)):
    torch.library.register_autograd(f"wsseg_layers::{_name}", _formula, setup_context=_save_operands, lib=_library)


class _Propagate(torch.autograd.Function):
    """`pamr_propagate` for eager mode, where torch.func and forward-mode AD need more than an operator can register.

    torch.compile and torch.export use the operator and the gradient registered with it.
    """

    @staticmethod
    def forward(
        x: Tensor, affinity: Tensor, dilations: Sequence[int], num_iter: int, transposed: bool, backend: str
    ) -> Tensor:
        operators = torch.ops.wsseg_layers
        operator = operators.pamr_propagate_transposed if transposed else operators.pamr_propagate
        return operator(x, affinity, dilations, num_iter, backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG004
        _, affinity, *ctx.settings = inputs
        ctx.save_for_backward(affinity)
        ctx.save_for_forward(affinity)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (affinity,) = ctx.saved_tensors
        dilations, num_iter, transposed, backend = ctx.settings
        gradient = _Propagate.apply(grad, affinity, dilations, num_iter, not transposed, backend)
        return gradient, None, None, None, None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
        (affinity,) = ctx.saved_tensors
        return _Propagate.apply(tangent, affinity, *ctx.settings)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], x: Tensor, affinity: Tensor, *settings: Any) -> Any:
        """Return the propagation of [V, B, C, H, W]: V joins the batch, or the channels if they share an affinity."""
        x_dim, affinity_dim, *_ = in_dims
        x = x.movedim(x_dim, 0) if x_dim is not None else x.expand(info.batch_size, *x.shape)
        if affinity_dim is None:
            joined = x.transpose(0, 1).flatten(1, 2)  # [V, B, C, H, W] -> [B, V * C, H, W]
            result = _Propagate.apply(joined, affinity, *settings)
            return result.unflatten(1, (info.batch_size, x.shape[2])).transpose(0, 1), 0
        affinity = affinity.movedim(affinity_dim, 0).flatten(0, 1)  # [V, B, N, H, W] -> [V * B, N, H, W]
        result = _Propagate.apply(x.flatten(0, 1), affinity, *settings)
        return result.unflatten(0, (info.batch_size, x.shape[1])), 0
