"""The two operators, `pamr_affinity` and `pamr_propagate`: checks, registration with PyTorch and gradients."""

from collections.abc import Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

from wsseg_layers._checks import (
    check_choice,
    check_count,
    check_dense,
    check_dilations,
    check_flag,
    check_maps,
    check_multiple_batch,
    check_not_negative,
    check_pixels,
    check_positive,
    check_same_device,
)

from .backends import BACKENDS, BackendName, find_backend, find_decomposition
from .neighbourhood import keep_first
from .variants import VARIANTS, Variant, VariantName


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

    Where the image is flat, the weights are uniform, or NaN for a `Variant` with `guard=0` and a `sigma_power` above 0.
    A NaN in the image makes the weights NaN at every pixel that has it in its neighbourhood. No gradient flows to the
    image: the affinity is a constant of the refinement.

    Args:
        image: image, [B, K, H, W], any floating-point dtype and strides. The batch may be empty.
        dilations: positive integers. A dilation may be larger than the image.
        variant: "pamr", "paper", "par", another key of `wsseg_layers.kernels.VARIANTS`, or a `Variant` with your own
            numbers.
        backend: "auto" for the first usable backend, or the name of one; see `available_backends`.

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
    decomposition = find_decomposition(backend)
    if decomposition is not None:
        return decomposition.affinity(image.detach(), dilations, numbers)
    return torch.ops.wsseg_layers.pamr_affinity(image.detach(), dilations, *numbers, backend)


def pamr_propagate(
    mask: Tensor,
    affinity: Tensor,
    dilations: Sequence[int],
    num_iter: int,
    backend: BackendName = "auto",
    counts: Tensor | None = None,
) -> Tensor:
    r"""Replace every pixel of the masks by the weighted sum of its neighbours, `num_iter` times (eq. 7).

    .. math:: m^t_{:,i} = \sum_{n \in N(i)} \alpha_{i,n} \, m^{t-1}_{:,n}

    Sums are computed in float32 (float64 for float64 masks), also under autocast. The operator is differentiable with
    respect to the masks, any number of times, in reverse and forward mode; the affinity is a constant.

    Args:
        mask: masks, [B, C, H, W], any floating-point dtype and strides. The batch may be empty. With [B * V, C, H, W],
            the V masks `mask[b * V : (b + 1) * V]` share the affinity of image b.
        affinity: weights, [B, N, H, W], as `pamr_affinity` returns them for the same dilations.
        dilations: positive integers.
        num_iter: number of iterations; 0 copies the masks.
        backend: "auto" for the first usable backend, or the name of one; see `available_backends`.
        counts: int64, [B], on the device of `mask`: image b has only `counts[b]` channels, the first ones. The others
            are 0 in the result, and cost no iterations, except in plain PyTorch on a GPU. Each count is in 0 to C. This
            is checked in eager mode on a CPU only: elsewhere the check would wait for the device, or the values are not
            known yet. Default: all channels of all images.

    Returns:
        Masks in the shape of `mask`, contiguous and in its dtype.

    Raises:
        TypeError: `mask` or `affinity` is no floating-point tensor, or `dilations` or `num_iter` has the wrong type.
        ValueError: sizes or devices differ, a dimension is missing or empty, a number is out of range, the affinity
            requires a gradient, `counts` is given for V > 1, or `backend` is unknown or not usable.

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
    check_same_device(("mask", mask), ("affinity", affinity))
    check_multiple_batch(("mask", mask), ("affinity", affinity))
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
    if counts is not None:
        _check_counts(counts, mask, affinity)
    if mask.shape[0] != affinity.shape[0]:  # [B * V, C, H, W] -> [B, V * C, H, W]: views are channels
        joined = mask.reshape(affinity.shape[0], -1, *mask.shape[2:])
        return pamr_propagate(joined, affinity, dilations, num_iter, backend).reshape(mask.shape)
    decomposition = find_decomposition(backend)
    if decomposition is not None:
        return decomposition.propagate(mask, affinity, dilations, num_iter, counts)
    if not _is_transformed(mask):
        return torch.ops.wsseg_layers.pamr_propagate(mask, affinity, dilations, num_iter, backend, counts)
    return _Propagate.apply(mask, affinity, counts, dilations, num_iter, backend, False)


def _is_transformed(mask: Tensor) -> bool:
    """Return whether an eager call needs `_Propagate`: for a gradient, a forward derivative or torch.func.

    Without it a call costs 50 us less.
    """
    if is_traced():
        return False
    return (mask.requires_grad and torch.is_grad_enabled()) or has_transforms()


def has_transforms() -> bool:
    """Return whether a transform of torch.func or forward-mode AD is active."""
    return torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0


def _check_counts(counts: Tensor, mask: Tensor, affinity: Tensor) -> None:
    if not isinstance(counts, Tensor) or counts.dtype != torch.int64:
        given = counts.dtype if isinstance(counts, Tensor) else type(counts).__name__
        raise TypeError(f"counts must be a torch.int64 tensor, got {given}")
    check_dense("counts", counts)
    if counts.shape != mask.shape[:1] or mask.shape[0] != affinity.shape[0]:
        raise ValueError(
            f"counts must hold one number per image of mask {list(mask.shape)} and affinity {list(affinity.shape)},"
            f" got shape {list(counts.shape)}"
        )
    check_same_device(("mask", mask), ("counts", counts))
    if (
        counts.device.type == "cpu"
        and not hides_values(counts)
        and not ((counts >= 0) & (counts <= mask.shape[1])).all()
    ):
        raise ValueError(f"counts must be in 0 to {mask.shape[1]}, the channels of mask, got {counts.tolist()}")


def is_traced() -> bool:
    """Return whether torch.compile, torch.export or torch.jit.trace records the call: these record the operators."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def is_mapped(tensor: Tensor) -> bool:
    """Return whether torch.vmap, or another part of torch.func, has wrapped a tensor. It cannot be traced."""
    return torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def hides_values(tensor: Tensor) -> bool:
    """Return whether Python cannot read a tensor's values: it is traced, mapped by torch.vmap, or fake."""
    return is_traced() or is_mapped(tensor) or is_fake(tensor)


def batch_first(x: Tensor, dim: int | None, size: int) -> Tensor:
    """Return an operand of torch.vmap with the mapped dimension first; it is expanded if it has no mapped dimension."""
    return x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)


def check_backend(backend: str) -> None:
    """Refuse a name that is neither "auto" nor in the table of backends."""
    check_choice("backend", backend, ("auto", *BACKENDS))


def check_variant(variant: str | Variant) -> Variant:
    """Check a variant, given by its name or as a `Variant`, and return it as a `Variant`."""
    if not isinstance(variant, Variant):
        check_choice("variant", variant, tuple(VARIANTS))
        variant = VARIANTS[variant]  # users add their own
    check_positive("variant.weight", variant.weight)
    for name, power, choices in (
        ("sigma_power", variant.sigma_power, (0, 1, 2)),
        ("power", variant.power, (1, 2)),
    ):
        if power not in choices or not isinstance(power, Integral) or isinstance(power, bool):
            raise ValueError(f"variant.{name} must be one of {', '.join(map(str, choices))}, got {power!r}")
    check_not_negative("variant.guard", variant.guard)
    check_not_negative("variant.position_weight", variant.position_weight)
    check_flag("variant.with_centre", variant.with_centre)
    return variant


# torch.library.custom_op would do the same, but its first call imports torch._dynamo, which takes 2 s.
_library = torch.library.Library("wsseg_layers", "DEF")
_PROPAGATE = "(Tensor x, Tensor affinity, int[] dilations, int num_iter, str backend, Tensor? counts=None) -> Tensor"
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


def _propagate(
    x: Tensor, affinity: Tensor, dilations: Sequence[int], num_iter: int, backend: str, counts: Tensor | None = None
) -> Tensor:
    implementation = find_backend(backend, x.device)
    if num_iter == 0 or x.numel() == 0:
        return _copy(x, counts)
    # Passed only if given, so that a backend without this argument works for all other calls.
    return implementation.propagate(x, affinity, dilations, num_iter, *([] if counts is None else [counts]))


def _propagate_transposed(
    x: Tensor, affinity: Tensor, dilations: Sequence[int], num_iter: int, backend: str, counts: Tensor | None = None
) -> Tensor:
    implementation = find_backend(backend, x.device)
    if num_iter == 0 or x.numel() == 0:
        return _copy(x, counts)
    return implementation.propagate_transposed(x, affinity, dilations, num_iter, *([] if counts is None else [counts]))


def _copy(x: Tensor, counts: Tensor | None) -> Tensor:
    if counts is None:
        return x.clone(memory_format=torch.contiguous_format)
    return keep_first(x, counts).contiguous()


def _fake_propagate(
    x: Tensor,
    affinity: Tensor,  # noqa: ARG001
    dilations: Sequence[int],  # noqa: ARG001
    num_iter: int,  # noqa: ARG001
    backend: str,
    counts: Tensor | None = None,  # noqa: ARG001
) -> Tensor:
    find_backend(backend, x.device)
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _save_operands(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    _, affinity, *ctx.settings, counts = inputs
    ctx.save_for_backward(affinity, counts)


# Eq. 7 is linear in the masks: the operator and its transpose are each other's gradient.
def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    affinity, counts = ctx.saved_tensors
    gradient = torch.ops.wsseg_layers.pamr_propagate_transposed(grad, affinity, *ctx.settings, counts)
    return gradient, None, None, None, None, None


def _backward_of_transposed(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    affinity, counts = ctx.saved_tensors
    gradient = torch.ops.wsseg_layers.pamr_propagate(grad, affinity, *ctx.settings, counts)
    return gradient, None, None, None, None, None


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
        x: Tensor,
        affinity: Tensor,
        counts: Tensor | None,
        dilations: Sequence[int],
        num_iter: int,
        backend: str,
        transposed: bool,
    ) -> Tensor:
        operators = torch.ops.wsseg_layers
        operator = operators.pamr_propagate_transposed if transposed else operators.pamr_propagate
        return operator(x, affinity, dilations, num_iter, backend, counts)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG004
        _, affinity, counts, *ctx.settings = inputs
        ctx.save_for_backward(affinity, counts)
        ctx.save_for_forward(affinity, counts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *settings, transposed = ctx.settings
        gradient = _Propagate.apply(grad, *ctx.saved_tensors, *settings, not transposed)
        return gradient, None, None, None, None, None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
        return _Propagate.apply(tangent, *ctx.saved_tensors, *ctx.settings)

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], x: Tensor, affinity: Tensor, counts: Tensor | None, *settings: Any
    ) -> tuple[Tensor, int]:
        """Propagate [V, B, C, H, W]: V joins the channels where all share an affinity, and the batch elsewhere."""
        x_dim, affinity_dim, counts_dim, *_ = in_dims
        size = info.batch_size
        x = batch_first(x, x_dim, size)
        if affinity_dim is None and counts is None:
            joined = x.transpose(0, 1).flatten(1, 2)  # [V, B, C, H, W] -> [B, V * C, H, W]
            result = _Propagate.apply(joined, affinity, None, *settings)
            return result.unflatten(1, (size, x.shape[2])).transpose(0, 1), 0
        affinity = batch_first(affinity, affinity_dim, size).flatten(0, 1)  # [V, B, N, H, W] -> [V * B, N, H, W]
        counts = counts if counts is None else batch_first(counts, counts_dim, size).flatten()  # [V, B] -> [V * B]
        result = _Propagate.apply(x.flatten(0, 1), affinity, counts, *settings)
        return result.unflatten(0, (size, x.shape[1])), 0
