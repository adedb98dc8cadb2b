"""The operators `bilateral_filter` and `mean_field`: checks, registration with PyTorch and gradients."""

from typing import Any, NoReturn

import torch
from torch import Tensor

from wsseg_layers._checks import (
    check_count,
    check_flag,
    check_maps,
    check_not_negative,
    check_pixels,
    check_positive,
    check_same_batch,
    check_same_device,
)

from .backends import BackendName, Filter, FilterBackend, find_filters
from .gaussians import Gaussian
from .operators import batch_first, check_backend, is_traced


def bilateral_filter(
    values: Tensor,
    image: Tensor | None,
    sigma_xy: float,
    sigma_rgb: float = 13.0,
    normalise: bool = False,
    backend: BackendName = "auto",
) -> Tensor:
    r"""Replace every pixel by the sum of all pixels, weighted by a Gaussian over position and colour.

    .. math:: y_{:,i} = \sum_j k_{ij} \, x_{:,j}, \qquad
        k_{ij} = \exp\left(-\frac{|p_i - p_j|^2}{2 \sigma_{xy}^2} - \frac{|I_i - I_j|^2}{2 \sigma_{rgb}^2}\right)

    The sum includes the pixel itself, with weight 1. With `normalise`, the weights are
    :math:`k_{ij} / \sqrt{n_i n_j}` with :math:`n_i = \sum_j k_{ij}`.

    "eager" and "triton" compute the sum exactly, in a time that is quadratic in the number of pixels. "cpp", which
    "auto" takes on a CPU where it is usable, approximates it on a permutohedral lattice, in linear time: normalised
    sums differ by 3 to 4 % on photographs. Sums that are not normalised are also lower by 10 to 25 %, because the
    lattice drops the values that it blurs into colours that the image does not have.

    The operator is linear in `values` and differentiable any number of times. No gradient flows to the image.

    Args:
        values: maps to filter, [B, C, H, W], any floating-point dtype. Sums are computed in float32, or in float64 for
            float64 values. A NaN spreads at least to the pixels near it in the same channel.
        image: [B, 3, H, W], or None for weights of position alone. A value that is not finite makes all sums of its
            image NaN.
        sigma_xy: standard deviation of the position, in pixels.
        sigma_rgb: standard deviation of the colour, in the units of the image.
        normalise: whether the weights are normalised symmetrically.
        backend: "auto", "triton", "cpp" or "eager".

    Returns:
        Sums, [B, C, H, W], contiguous and in the dtype of `values`.

    Raises:
        TypeError: a tensor is not floating-point, or a parameter has the wrong type.
        ValueError: sizes or devices differ, a dimension is missing or empty, the image requires a gradient, or a
            parameter is out of range.

    Source:
        Adams, Baek and Davis, Eurographics 2010, for the lattice; Krähenbühl and Koltun, NIPS 2011, for the weights.

    Example:
        >>> import torch
        >>> image, values = torch.rand(1, 3, 32, 48), torch.ones(1, 1, 32, 48)
        >>> bilateral_filter(values, image, sigma_xy=10, sigma_rgb=0.1).shape
        torch.Size([1, 1, 32, 48])
    """
    check_maps("values", values)
    check_pixels("values", values)
    check_positive("sigma_xy", sigma_xy)
    check_positive("sigma_rgb", sigma_rgb)
    check_flag("normalise", normalise)
    check_backend(backend)
    if image is not None:
        check_image(image, ("values", values))
        if image.requires_grad and torch.is_grad_enabled():
            raise ValueError("image must not require a gradient, because none flows to it: pass image.detach()")
        image = image.detach()
    settings = (float(sigma_xy), float(sigma_rgb), normalise, False, backend)
    if is_traced():
        return torch.ops.wsseg_layers.bilateral_filter(values, image, *settings)
    return _BilateralFilter.apply(values, image, *settings)


def mean_field(
    logits: Tensor,
    image: Tensor,
    num_iter: int,
    gaussian_sigma_xy: float,
    gaussian_weight: float,
    bilateral_sigma_xy: float,
    bilateral_sigma_rgb: float,
    bilateral_weight: float,
    backend: BackendName = "auto",
) -> Tensor:
    """Run the mean field of a fully connected CRF; the operator of `wsseg_layers.functional.dense_crf`.

    Args:
        logits: minus the unary energies, [B, C, H, W]. -inf excludes a class; one class per pixel must remain.
        image: [B, 3, H, W].
        num_iter: number of steps; 0 returns the softmax of the logits.
        gaussian_sigma_xy: standard deviation of the term of position alone.
        gaussian_weight: its weight; 0 leaves it out.
        bilateral_sigma_xy: standard deviation of the position in the term of position and colour.
        bilateral_sigma_rgb: that of the colour.
        bilateral_weight: its weight; 0 leaves it out.
        backend: "auto", "triton", "cpp" or "eager".

    Returns:
        Marginals, [B, C, H, W], in the dtype of `logits`. Differentiable once with respect to the logits, in reverse
        mode.
    """
    check_maps("logits", logits)
    check_pixels("logits", logits)
    check_image(image, ("logits", logits))
    check_count("num_iter", num_iter, minimum=0)
    check_positive("gaussian_sigma_xy", gaussian_sigma_xy)
    check_positive("bilateral_sigma_xy", bilateral_sigma_xy)
    check_positive("bilateral_sigma_rgb", bilateral_sigma_rgb)
    check_not_negative("gaussian_weight", gaussian_weight)
    check_not_negative("bilateral_weight", bilateral_weight)
    check_backend(backend)
    numbers = (gaussian_sigma_xy, gaussian_weight, bilateral_sigma_xy, bilateral_sigma_rgb, bilateral_weight)
    settings = (num_iter, *map(float, numbers), backend)
    if is_traced():
        return torch.ops.wsseg_layers.mean_field(logits, image.detach(), *settings)
    return _MeanField.apply(logits, image.detach(), *settings)


def check_image(image: Tensor, named: tuple[str, Tensor], image_name: str = "image") -> None:
    """Refuse anything but an image [B, 3, H, W] for maps [B, C, H, W], given as a pair (name, tensor)."""
    name, maps = named
    named_image = (image_name, image)
    check_maps(*named_image)
    check_same_device(named_image, named)
    check_same_batch(named_image, named)
    if image.shape[1] != 3:
        raise ValueError(f"{image_name} must have 3 channels, got shape {list(image.shape)}")
    if image.shape[2:] != maps.shape[2:]:
        raise ValueError(
            f"{image_name} and {name} must have the same height and width, got {image_name} {list(image.shape)},"
            f" {name} {list(maps.shape)}"
        )


_library = torch.library.Library("wsseg_layers", "FRAGMENT")
_NUMBERS = (
    "int num_iter, float gaussian_sigma_xy, float gaussian_weight, float bilateral_sigma_xy,"
    " float bilateral_sigma_rgb, float bilateral_weight, str backend"
)
for _schema in (
    "bilateral_filter(Tensor values, Tensor? image, float sigma_xy, float sigma_rgb, bool normalise, bool transposed,"
    " str backend) -> Tensor",
    f"mean_field(Tensor logits, Tensor image, {_NUMBERS}) -> Tensor",
    f"mean_field_gradient(Tensor grad, Tensor logits, Tensor image, {_NUMBERS}) -> Tensor",
):
    _library.define(_schema, tags=torch.Tag.pt2_compliant_tag)


def _bilateral_filter(
    values: Tensor,
    image: Tensor | None,
    sigma_xy: float,
    sigma_rgb: float,
    normalise: bool,
    transposed: bool,
    backend: str,
) -> Tensor:
    implementation = find_filters(backend, values.device)
    if values.numel() == 0:
        return torch.empty_like(values, memory_format=torch.contiguous_format)
    real = values.to(torch.promote_types(values.dtype, torch.float32))
    filter_values = implementation.make_filter(image, real, Gaussian(sigma_xy, sigma_rgb), normalise)
    return filter_values(real, transposed).to(values.dtype)


def _mean_field(logits: Tensor, image: Tensor, num_iter: int, *numbers_and_backend: Any) -> Tensor:
    *numbers, backend = numbers_and_backend
    implementation = find_filters(backend, logits.device)
    if logits.numel() == 0:
        return torch.empty_like(logits, memory_format=torch.contiguous_format)
    real = logits.to(torch.promote_types(logits.dtype, torch.float32))
    filters = _make_filters(implementation, real, image, *numbers) if num_iter > 0 else []
    marginals = implementation.mean_field(real, filters, num_iter)
    return marginals.to(logits.dtype, memory_format=torch.contiguous_format)


def _mean_field_gradient(
    grad: Tensor, logits: Tensor, image: Tensor, num_iter: int, *numbers_and_backend: Any
) -> Tensor:
    *numbers, backend = numbers_and_backend
    implementation = find_filters(backend, logits.device)
    if logits.numel() == 0:
        return torch.empty_like(logits, memory_format=torch.contiguous_format)
    dtype = torch.promote_types(logits.dtype, torch.float32)
    real = logits.to(dtype)
    filters = _make_filters(implementation, real, image, *numbers) if num_iter > 0 else []
    gradient = implementation.mean_field_gradient(grad.to(dtype), real, filters, num_iter)
    return gradient.to(logits.dtype, memory_format=torch.contiguous_format)


def _make_filters(
    implementation: FilterBackend,
    like: Tensor,
    image: Tensor,
    gaussian_sigma_xy: float,
    gaussian_weight: float,
    bilateral_sigma_xy: float,
    bilateral_sigma_rgb: float,
    bilateral_weight: float,
) -> list[tuple[float, Filter]]:
    """Return the filters of the two terms, symmetrically normalised, with their weights."""
    filters: list[tuple[float, Filter]] = []
    if gaussian_weight > 0:
        gaussian = Gaussian(gaussian_sigma_xy)
        filters.append((gaussian_weight, implementation.make_filter(None, like, gaussian, True)))
    if bilateral_weight > 0:
        gaussian = Gaussian(bilateral_sigma_xy, bilateral_sigma_rgb)
        filters.append((bilateral_weight, implementation.make_filter(image, like, gaussian, True)))
    return filters


def _fake_bilateral_filter(values: Tensor, image: Tensor | None, *settings: Any) -> Tensor:  # noqa: ARG001
    find_filters(settings[-1], values.device)
    return torch.empty_like(values, memory_format=torch.contiguous_format)


def _fake_mean_field(logits: Tensor, image: Tensor, *settings: Any) -> Tensor:  # noqa: ARG001
    find_filters(settings[-1], logits.device)
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _fake_mean_field_gradient(grad: Tensor, logits: Tensor, image: Tensor, *settings: Any) -> Tensor:  # noqa: ARG001
    return _fake_mean_field(logits, image, *settings)


for _name, _kernel, _fake in (
    ("bilateral_filter", _bilateral_filter, _fake_bilateral_filter),
    ("mean_field", _mean_field, _fake_mean_field),
    ("mean_field_gradient", _mean_field_gradient, _fake_mean_field_gradient),
):
    _library.impl(_name, _kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"wsseg_layers::{_name}", _fake, lib=_library)


def _save_image(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    _, image, *ctx.settings = inputs
    ctx.save_for_backward(image)


# The filter is linear: it and its transpose are each other's gradient.
def _backward_of_filter(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (image,) = ctx.saved_tensors
    *settings, transposed, backend = ctx.settings
    gradient = torch.ops.wsseg_layers.bilateral_filter(grad, image, *settings, not transposed, backend)
    return gradient, None, None, None, None, None, None


def _save_logits(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    logits, image, *ctx.settings = inputs
    ctx.save_for_backward(logits, image)


def _backward_of_mean_field(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    gradient = torch.ops.wsseg_layers.mean_field_gradient(grad, *ctx.saved_tensors, *ctx.settings)
    return gradient, None, *(None for _ in ctx.settings)


def _refuse(what: str) -> NoReturn:
    raise NotImplementedError(f"dense_crf and DenseCRF are differentiable once, in reverse mode, and {what}")


def _refuse_second_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ARG001
    _refuse("a second gradient was asked for")


torch.library.register_autograd("wsseg_layers::mean_field_gradient", _refuse_second_gradient, lib=_library)
torch.library.register_autograd(
    "wsseg_layers::bilateral_filter", _backward_of_filter, setup_context=_save_image, lib=_library
)
torch.library.register_autograd(
    "wsseg_layers::mean_field", _backward_of_mean_field, setup_context=_save_logits, lib=_library
)


# As `_Propagate` in operators.py, for eager mode: torch.func and forward-mode AD need more than an operator can
# register.
class _BilateralFilter(torch.autograd.Function):
    """`bilateral_filter` in eager mode."""

    @staticmethod
    def forward(values: Tensor, image: Tensor | None, *settings: Any) -> Tensor:
        return torch.ops.wsseg_layers.bilateral_filter(values, image, *settings)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG004
        _, image, *ctx.settings = inputs
        ctx.save_for_backward(image)
        ctx.save_for_forward(image)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None:  # the sums are used, but not their gradient: filtering zeros would take as long
            return (None,) * 7
        *settings, transposed, backend = ctx.settings
        gradient = _BilateralFilter.apply(grad, *ctx.saved_tensors, *settings, not transposed, backend)
        return gradient, None, None, None, None, None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
        return _BilateralFilter.apply(tangent, *ctx.saved_tensors, *ctx.settings)

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], values: Tensor, image: Tensor | None, *settings: Any
    ) -> tuple[Tensor, int]:
        """Filter [V, B, C, H, W]: V joins the channels where all share an image, and the batch elsewhere."""
        values = batch_first(values, in_dims[0], info.batch_size)
        if image is None or in_dims[1] is None:
            joined = values.transpose(0, 1).flatten(1, 2)  # [V, B, C, H, W] -> [B, V * C, H, W]
            result = _BilateralFilter.apply(joined, image, *settings)
            return result.unflatten(1, (info.batch_size, values.shape[2])).transpose(0, 1), 0
        images = batch_first(image, in_dims[1], info.batch_size).flatten(0, 1)  # [V, B, 3, H, W] -> [V * B, 3, H, W]
        result = _BilateralFilter.apply(values.flatten(0, 1), images, *settings)
        return result.unflatten(0, values.shape[:2]), 0


class _MeanField(torch.autograd.Function):
    """`mean_field` in eager mode."""

    @staticmethod
    def forward(logits: Tensor, image: Tensor, *settings: Any) -> Tensor:
        return torch.ops.wsseg_layers.mean_field(logits, image, *settings)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG004
        logits, image, *ctx.settings = inputs
        ctx.save_for_backward(logits, image)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gradient = _MeanFieldGradient.apply(grad, *ctx.saved_tensors, *ctx.settings)
        return gradient, None, *(None for _ in ctx.settings)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:  # noqa: ARG004
        _refuse("a forward derivative was asked for")

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], logits: Tensor, image: Tensor, *settings: Any
    ) -> tuple[Tensor, int]:
        """Join the batch [V, B, C, H, W]."""
        stacked = [batch_first(x, dim, info.batch_size) for x, dim in zip((logits, image), in_dims, strict=False)]
        result = _MeanField.apply(*(x.flatten(0, 1) for x in stacked), *settings)
        return result.unflatten(0, stacked[0].shape[:2]), 0


class _MeanFieldGradient(torch.autograd.Function):
    """`mean_field_gradient` in eager mode."""

    @staticmethod
    def forward(grad: Tensor, logits: Tensor, image: Tensor, *settings: Any) -> Tensor:
        return torch.ops.wsseg_layers.mean_field_gradient(grad, logits, image, *settings)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ARG004
        _refuse("a second gradient was asked for")

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:  # noqa: ARG004
        _refuse("a forward derivative was asked for")

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], grad: Tensor, logits: Tensor, image: Tensor, *settings: Any
    ) -> tuple[Tensor, int]:
        """Join the batch [V, B, C, H, W]."""
        stacked = [batch_first(x, dim, info.batch_size) for x, dim in zip((grad, logits, image), in_dims, strict=False)]
        result = _MeanFieldGradient.apply(*(x.flatten(0, 1) for x in stacked), *settings)
        return result.unflatten(0, stacked[0].shape[:2]), 0
