"""Dense energy loss: neighbours of similar colour should have the same class.

Tang, Perazzi, Djelouah, Ben Ayed, Schroers and Boykov, "On Regularized Losses for Weakly-supervised CNN Segmentation",
ECCV 2018. https://arxiv.org/abs/1803.09569
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._checks import (
    check_dense,
    check_integer,
    check_maps,
    check_not_negative,
    check_pixels,
    check_positive,
    check_same_device,
)
from ._dtypes import cast, working_dtype
from ._label_checks import IGNORE_INDEX, check_range
from .kernels import BackendName, bilateral_filter
from .kernels.filters import check_image
from .kernels.operators import check_backend, has_transforms, is_traced

# The filter of the published extension is scaled so that a vertex of its lattice has the weight 1. `bilateral_filter`
# uses the Gaussian of the same integral, which is larger.
EXTENSION_SCALE = 2**6 / (1 + 2**-5) / ((4 * math.pi / 3) ** 2.5 * math.sqrt(6))


def dense_energy_loss(
    images: Tensor,
    segmentations: Tensor,
    rois: Tensor,
    unlabelled: Tensor,
    sigma_rgb: float,
    sigma_xy: float,
    backend: BackendName = "auto",
) -> Tensor:
    r"""Return the energy of a segmentation: minus the agreement of every pixel with similar ones.

    .. math:: L = - \frac{s}{B} \sum_b \sum_c \sum_i g_i S_{c,i} \sum_j k_{ij} S_{c,j}

    S are the probabilities inside the region of interest (ROI), and 0 outside. k is the Gaussian over position and
    colour of `bilateral_filter`, not normalised. The gate g is 1 where a pixel is not labelled. Elsewhere it is the ROI
    minus the largest probability, at least 0: the more certain the prediction of a labelled pixel, the less it counts.

    With the backend "cpp", value and gradient follow the published code; the other backends sum exactly. The gradient
    is :math:`-2 s g_i \sum_j k_{ij} S_{c,j} / B`: the gate is a constant. The factor s = 0.7055 is the scale of the
    filter in that code.

    Args:
        images: images, [B, 3, H, W], floating-point. `sigma_rgb` is in the units of their values, usually 0 to 255.
        segmentations: class probabilities, [B, C, H, W].
        rois: region of interest, [B, H, W], floating-point: 1 inside, 0 outside.
        unlabelled: bool, [B, H, W]: pixels without a label.
        sigma_rgb: standard deviation of the colour.
        sigma_xy: standard deviation of the position, in pixels.
        backend: "auto", "triton", "cpp" or "eager"; see `wsseg_layers.kernels.bilateral_filter`.

    Returns:
        Loss, a scalar, in at least float32. Differentiable with respect to `segmentations`; second derivatives take
        the gate as a constant, too.

    Raises:
        TypeError: a tensor has the wrong dtype, or a parameter the wrong type.
        ValueError: sizes or devices differ, a dimension is missing or empty, or a parameter is out of range.

    Source:
        Tang et al., ECCV 2018, section 3.

    Example:
        >>> import torch
        >>> images, segmentations = 255 * torch.rand(1, 3, 32, 48), torch.rand(1, 21, 32, 48).softmax(dim=1)
        >>> rois, unlabelled = torch.ones(1, 32, 48), torch.rand(1, 32, 48) > 0.5
        >>> bool(dense_energy_loss(images, segmentations, rois, unlabelled, sigma_rgb=15, sigma_xy=50) < 0)
        True
    """
    check_maps("segmentations", segmentations)
    check_pixels("segmentations", segmentations)
    check_image(images, ("segmentations", segmentations), "images")
    _check_region("rois", rois, segmentations)
    _check_region("unlabelled", unlabelled, segmentations)
    if not rois.is_floating_point():
        raise TypeError(f"rois must be a floating-point tensor, got {rois.dtype}")
    if unlabelled.dtype != torch.bool:
        raise TypeError(f"unlabelled must be a torch.bool tensor, got {unlabelled.dtype}")
    probabilities = cast(segmentations, working_dtype(segmentations))
    inside = rois.detach().to(probabilities.dtype)
    gate = (inside - probabilities.detach().amax(dim=1)).clamp(min=0).masked_fill(unlabelled, 1)
    probabilities = probabilities * inside[:, None]
    constant = probabilities.detach()
    sums = bilateral_filter(
        constant if is_traced() else probabilities, images.detach(), sigma_xy, sigma_rgb, backend=backend
    )
    similar = EXTENSION_SCALE * gate[:, None] * sums
    # This has the value of S * similar but twice its gradient, because S is also in the sums.
    energy = (2 * probabilities - constant) * similar.detach()
    if not is_traced():  # torch.compile has no second derivatives
        # This term is 0, and so is its gradient. It adds the second derivative of S * similar.
        energy = energy + _multiply_zeros(probabilities - constant, similar - similar.detach())
    # Not len(images): torch.jit.trace and torch.export would keep it, and max(1, size) keeps a traced batch of 1.
    return -energy.sum() / max(images.shape[0], 1)


def _multiply_zeros(x: Tensor, y: Tensor) -> Tensor:
    """Return x * y, given zeros that have derivatives."""
    if has_transforms():
        return x * y
    return _ProductOfZeros.apply(x, y)


class _ProductOfZeros(torch.autograd.Function):
    """The product of two zeros, in reverse mode.

    The gradient to y is 0. It is computed only where it is differentiated itself (`create_graph=True`). Elsewhere it is
    left out: the backward pass would filter these zeros, which takes as long as the loss itself.
    """

    @staticmethod
    def forward(x: Tensor, y: Tensor) -> Tensor:
        return x * y

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG004
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, y = ctx.saved_tensors
        return grad * y, grad * x if torch.is_grad_enabled() else None


def _check_region(name: str, region: Tensor, segmentations: Tensor) -> None:
    if not isinstance(region, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(region).__name__}")
    check_dense(name, region)
    expected = (segmentations.shape[0], *segmentations.shape[2:])
    if region.shape != expected:
        raise ValueError(
            f"{name} must be [B, H, W] for segmentations {list(segmentations.shape)}, got shape {list(region.shape)}"
        )
    check_same_device((name, region), ("segmentations", segmentations))


class DenseEnergyLoss(nn.Module):
    """Dense energy loss: `dense_energy_loss` at a smaller size, as weakly supervised methods call it.

    Images, regions and labels are resized by `scale_factor` (nearest neighbour), segmentations bilinearly. The unit of
    `sigma_xy` is a pixel of the given images.

    Args:
        weight: factor of the loss; 1e-7 in AFA and ToCo.
        sigma_rgb: standard deviation of the colour, in the units of the images; 15 in AFA and ToCo.
        sigma_xy: standard deviation of the position, in pixels; 100 in AFA and ToCo.
        scale_factor: factor of height and width, at most 1; 0.5 in AFA and ToCo.
        backend: "auto", "triton", "cpp" or "eager"; see `wsseg_layers.kernels.bilateral_filter`.
        ignore_index: label of pixels without a class.

    Example:
        >>> import torch
        >>> images, segmentations = 255 * torch.rand(2, 3, 32, 48), torch.rand(2, 21, 32, 48).softmax(dim=1)
        >>> rois, labels = torch.ones(2, 32, 48), torch.full((2, 1, 32, 48), 255, dtype=torch.uint8)
        >>> loss = DenseEnergyLoss(weight=1e-7, sigma_rgb=15, sigma_xy=100, scale_factor=0.5)
        >>> bool(loss(images, segmentations, rois, labels) < 0)
        True
    """

    def __init__(
        self,
        weight: float = 1e-7,
        sigma_rgb: float = 15.0,
        sigma_xy: float = 100.0,
        scale_factor: float = 0.5,
        backend: BackendName = "auto",
        ignore_index: int = IGNORE_INDEX,
    ) -> None:
        super().__init__()
        check_not_negative("weight", weight)
        check_positive("sigma_rgb", sigma_rgb)
        check_positive("sigma_xy", sigma_xy)
        check_positive("scale_factor", scale_factor)
        if scale_factor > 1:
            raise ValueError(f"scale_factor must be at most 1, got {scale_factor}")
        check_backend(backend)
        check_integer("ignore_index", ignore_index)
        self.weight = weight
        self.sigma_rgb = sigma_rgb
        self.sigma_xy = sigma_xy
        self.scale_factor = scale_factor
        self.backend: BackendName = backend
        self.ignore_index = ignore_index

    def forward(self, images: Tensor, segmentations: Tensor, ROIs: Tensor, seg_label: Tensor) -> Tensor:
        """Return the weighted loss, a scalar.

        Args:
            images: images, [B, 3, H, W], floating-point, usually in 0 to 255.
            segmentations: class probabilities, [B, C, H, W].
            ROIs: region of interest, [B, H, W]: 1 inside, 0 outside.
            seg_label: labels, [B, 1, H, W], of any dtype; `ignore_index` marks pixels without a label.
        """
        check_maps("segmentations", segmentations)
        check_pixels("segmentations", segmentations)
        check_image(images, ("segmentations", segmentations), "images")
        _check_region("ROIs", ROIs, segmentations)
        if not isinstance(seg_label, Tensor):
            raise TypeError(f"seg_label must be a torch.Tensor, got {type(seg_label).__name__}")
        check_dense("seg_label", seg_label)
        if seg_label.shape != (images.shape[0], 1, *images.shape[2:]):
            raise ValueError(
                f"seg_label must be [B, 1, H, W] for images {list(images.shape)}, got shape {list(seg_label.shape)}"
            )
        check_same_device(("images", images), ("seg_label", seg_label))
        if not (seg_label.is_floating_point() or seg_label.dtype == torch.bool):
            check_range(self.ignore_index, seg_label.dtype)
        height, width = images.shape[2:]
        if min(height, width) * self.scale_factor < 1:
            raise ValueError(
                f"scale_factor must leave at least one pixel of images {height} x {width}, got {self.scale_factor}"
            )
        unlabelled = seg_label.detach() == self.ignore_index
        regions = torch.cat([ROIs[:, None].to(images.dtype), unlabelled.to(images.dtype)], dim=1)  # [B, 2, H, W]
        scaled_rois, ignored = self._resize(regions).unbind(1)
        scaled = F.interpolate(
            segmentations,
            scale_factor=self.scale_factor,
            mode="bilinear",
            align_corners=False,
            recompute_scale_factor=True,
        )
        loss = dense_energy_loss(
            self._resize(images),
            scaled,
            scaled_rois,
            ignored > 0,
            self.sigma_rgb,
            self.sigma_xy * self.scale_factor,
            self.backend,
        )
        return float(self.weight) * loss

    def _resize(self, maps: Tensor) -> Tensor:
        return F.interpolate(maps, scale_factor=self.scale_factor, recompute_scale_factor=True)

    def extra_repr(self) -> str:
        """Return the arguments for `print(module)`."""
        return (
            f"weight={self.weight}, sigma_rgb={self.sigma_rgb}, sigma_xy={self.sigma_xy},"
            f" scale_factor={self.scale_factor}, backend={self.backend!r}, ignore_index={self.ignore_index}"
        )
