"""Pixel-adaptive mask refinement (PAMR): aligns masks with the edges of the image.

Araslanov and Roth, "Single-Stage Semantic Segmentation from Image Labels", CVPR 2020, section 3.3.
https://arxiv.org/abs/2005.08104
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ._refinement import (
    DILATIONS,
    Absent,
    Resize,
    StatelessRefinement,
    check_affinity_dtype,
    check_settings,
    match_image,
    pack_classes,
    unpack_classes,
)
from .kernels import BackendName, Variant, VariantName, pamr_affinity, pamr_propagate
from .kernels.operators import check_variant


def pamr(
    image: Tensor,
    mask: Tensor,
    num_iter: int = 10,
    dilations: Sequence[int] = DILATIONS,
    variant: VariantName | Variant = "pamr",
    resize: Resize = "mask",
    backend: BackendName = "auto",
    affinity_dtype: torch.dtype = torch.float32,
    classes: Tensor | None = None,
    absent: Absent = "zero",
) -> Tensor:
    r"""Replace every pixel of the masks by a weighted mean of its neighbours, `num_iter` times (eq. 7).

    .. math:: m^t_{:,i} = \sum_{n \in N(i)} \alpha_{i,n} \, m^{t-1}_{:,n}

    A pixel has 8 neighbours per dilation d, at the offsets {-d, 0, d} x {-d, 0, d} without (0, 0); the border is
    replicated. The weights alpha are the softmax over the neighbours of the kernel k (eq. 8), averaged over the
    channels of the image:

    .. math:: k(I_i, I_n) = - \frac{|I_i - I_n|}{10^{-8} + 0.1 \, \sigma_i}

    sigma is the unbiased standard deviation over the neighbours and the pixel itself, which counts once per dilation.
    This is the variant "pamr", the authors' published code. The variant "paper" divides by sigma squared, as eq. 8 is
    printed. "pamr" does not change when a channel of the image is scaled or shifted, so the image needs no particular
    normalisation.

    Weights are computed in at least float32 and are constants: the result is differentiable with respect to the masks
    only. A NaN in the image or in the masks spreads to all pixels that it can reach within `num_iter` iterations.

    Args:
        image: image, [B, K, H, W], any number of channels.
        mask: masks, [B, C, h, w]. Each channel is refined by itself. With [B * V, C, h, w], V masks in a row belong to
            one image and share its affinity.
        num_iter: number of iterations, at least 0.
        dilations: positive integers. A dilation may be larger than the image.
        variant: "pamr", "paper", or "par" for the weights of `par`; or a `wsseg_layers.kernels.Variant` with your own
            numbers, such as `Variant(weight=0.2)` for 0.2 instead of 0.1.
        resize: what is resized (bilinearly, corners aligned) if the sizes differ: "mask" to the size of the image,
            "image" to the size of the masks, or "none" to make it an error.
        backend: "auto", "triton", "cpp" or "eager"; see `wsseg_layers.kernels.pamr_propagate`.
        affinity_dtype: dtype in which the weights are stored. float16 halves the memory of weights that
            are kept. Each weight then has a relative error of at most 2^-11, or an absolute one of 3e-8 below 6e-5.
        classes: bool, [B, C], or [B * V, C] for V masks per image: the channels to refine, such as the classes in an
            image-level label and the background. The others cost no iterations.
        absent: the result in channels that are not in `classes`: "zero", or "keep" for the given masks.

    Returns:
        Refined masks, [B, C, H, W], or [B, C, h, w] with `resize="image"`, in the dtype of `mask`.

    Raises:
        TypeError: `image` or `mask` is no floating-point tensor, or a parameter has the wrong type.
        ValueError: batch sizes or devices differ, a dimension is missing or empty, or a parameter is out of range.

    Source:
        Araslanov and Roth, CVPR 2020, eq. 7 and 8.

    Example:
        >>> import torch
        >>> image, mask = torch.rand(1, 3, 64, 48), torch.rand(1, 21, 16, 12).softmax(dim=1)
        >>> pamr(image, mask, num_iter=2, dilations=[1, 2, 4]).shape
        torch.Size([1, 21, 64, 48])
    """
    check_affinity_dtype(affinity_dtype)
    image = match_image(("image", image), ("mask", mask), resize)
    packed = pack_classes(("mask", mask), classes, image, absent)
    affinity = pamr_affinity(image, dilations, variant, backend).to(affinity_dtype)  # eq. 8
    refined = pamr_propagate(packed.masks, affinity, dilations, num_iter, backend, packed.counts)  # eq. 7
    return unpack_classes(refined, packed, mask, classes, absent)


class PAMR(StatelessRefinement):
    """Pixel-adaptive mask refinement: the module of `pamr` (eq. 7 and 8).

    It has no parameters and no buffers. The buffers that the published class saves (`aff_x.kernel`, `aff_m.kernel`,
    `aff_std.kernel`) are ignored when a state_dict is loaded.

    Args:
        num_iter: number of iterations; 10 in the paper.
        dilations: dilations of the 3x3 neighbourhoods.
        variant: "pamr" for the authors' published code, "paper" for eq. 8 as printed; see `pamr` for others.
        resize: what is resized if the sizes differ: "mask" (to the size of the image), "image" or "none".
        backend: "auto", "triton", "cpp" or "eager"; see `wsseg_layers.kernels.pamr_propagate`.
        affinity_dtype: dtype in which the weights are stored; see `pamr`.

    Example:
        >>> import torch
        >>> image, mask = torch.rand(1, 3, 64, 48), torch.rand(1, 21, 64, 48)
        >>> refine = PAMR(num_iter=2, dilations=[1, 2, 4])
        >>> refined = refine(image, mask)

        One affinity serves many masks of the same image:

        >>> affinity = refine.affinity(image)
        >>> chunks = [refine.propagate(chunk, affinity) for chunk in mask.split(7, dim=1)]
        >>> torch.allclose(torch.cat(chunks, dim=1), refined)
        True
    """

    old_buffers = ("aff_x.kernel", "aff_m.kernel", "aff_std.kernel")
    old_attributes = ("aff_x", "aff_m", "aff_std")

    def __init__(
        self,
        num_iter: int = 10,
        dilations: Sequence[int] = DILATIONS,
        variant: VariantName | Variant = "pamr",
        resize: Resize = "mask",
        backend: BackendName = "auto",
        affinity_dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        check_variant(variant)
        self.num_iter = num_iter
        self.dilations = check_settings(num_iter, dilations, resize, backend, affinity_dtype)
        self.variant = variant
        self.resize: Resize = resize
        self.backend: BackendName = backend
        self.affinity_dtype = affinity_dtype

    def forward(self, image: Tensor, mask: Tensor, classes: Tensor | None = None, absent: Absent = "zero") -> Tensor:
        """Return the masks [B, C, h, w], refined by the image [B, K, H, W]; see `pamr`."""
        return pamr(
            image,
            mask,
            self.num_iter,
            self.dilations,
            self.variant,
            self.resize,
            self.backend,
            self.affinity_dtype,
            classes,
            absent,
        )

    def affinity(self, image: Tensor) -> Tensor:
        """Return the weights [B, N, H, W] of an image [B, K, H, W]; N = 8 x number of dilations."""
        check_affinity_dtype(self.affinity_dtype)
        return pamr_affinity(image, self.dilations, self.variant, self.backend).to(self.affinity_dtype)

    def propagate(self, mask: Tensor, affinity: Tensor, counts: Tensor | None = None) -> Tensor:
        """Return the masks [B, C, H, W], refined by the weights [B, N, H, W] that `affinity` gave.

        With `counts`, int64 [B], only the first `counts[b]` channels of image b are refined; the others are 0.
        """
        return pamr_propagate(mask, affinity, self.dilations, self.num_iter, self.backend, counts)

    def _sum_of_weights(self) -> float:
        """Return the sum of the weights of a pixel."""
        return 1 + check_variant(self.variant).position_weight

    def extra_repr(self) -> str:
        """Return the arguments for `print(module)`."""
        return (
            f"num_iter={self.num_iter}, dilations={self.dilations}, variant={self.variant!r},"
            f" resize={self.resize!r}, backend={self.backend!r}, affinity_dtype={self.affinity_dtype}"
        )
