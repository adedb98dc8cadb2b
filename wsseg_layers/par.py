"""Pixel-adaptive refinement (PAR): the propagation of PAMR with an affinity of colour and position.

Ru et al., "Learning Affinity from Attention: End-to-End Weakly-Supervised Semantic Segmentation with Transformers",
CVPR 2022. https://arxiv.org/abs/2203.02664
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ._checks import check_flag, check_maps, check_not_negative, check_pixels, check_positive
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
from .kernels import BackendName, pamr_affinity, pamr_propagate
from .kernels.variants import GUARD, PAR_W1, PAR_W2, par_variant


def par(
    imgs: Tensor,
    masks: Tensor,
    dilations: Sequence[int] = DILATIONS,
    num_iter: int = 10,
    renormalise: bool = False,
    resize: Resize = "mask",
    backend: BackendName = "auto",
    w1: float = PAR_W1,
    w2: float = PAR_W2,
    guard: float = GUARD,
    affinity_dtype: torch.dtype = torch.float32,
    classes: Tensor | None = None,
    absent: Absent = "zero",
) -> Tensor:
    r"""Replace every pixel of the masks by a weighted sum of its neighbours, `num_iter` times.

    Neighbours and iteration are those of `pamr`. The weights are the sum of a colour term and a position term, each a
    softmax over the neighbours:

    .. math::
        \mathrm{softmax}\left(-\left(\frac{|I_i - I_n|}{w_1 \sigma_i}\right)^2\right)
        + w_2 \, \mathrm{softmax}\left(-\left(\frac{|p_i - p_n|}{w_1 \sigma_p}\right)^2\right)

    The colour term is averaged over the channels of the image before the softmax. sigma is the unbiased standard
    deviation over the neighbours; `guard` is added to it. The weights sum to 1 + w2, so that with the published w2 of
    0.01 the masks grow by 1 % per iteration.

    Weights are computed in at least float32 and are constants: the result is differentiable with respect to the masks
    only.

    Args:
        imgs: images, [B, K, H, W].
        masks: masks, [B, C, h, w]. With [B * V, C, h, w], V masks in a row belong to one image and share its affinity.
        dilations: positive integers. A dilation may be larger than the image.
        num_iter: number of iterations, at least 0.
        renormalise: divide the weights by 1 + w2, so that the masks keep their range.
        resize: what is resized (bilinearly, corners aligned) if the sizes differ: "mask" to the size of the images,
            "image" to the size of the masks, or "none" to make it an error.
        backend: "auto", "triton", "cpp" or "eager"; see `wsseg_layers.kernels.pamr_propagate`.
        w1: factor of sigma in both terms, positive.
        w2: factor of the position term, at least 0; 0 leaves the colour term alone.
        guard: added to sigma, at least 0. With 0, the weights are NaN where the image is flat.
        affinity_dtype: dtype in which the weights are stored. float16 halves the memory of weights that
            are kept. Each weight then has a relative error of at most 2^-11, or an absolute one of 3e-8 below 6e-5.
        classes: bool, [B, C], or [B * V, C] for V masks per image: the channels to refine, such as the classes in an
            image-level label and the background. The others cost no iterations.
        absent: the result in channels that are not in `classes`: "zero", or "keep" for the given masks.

    Returns:
        Refined masks, [B, C, H, W], or [B, C, h, w] with `resize="image"`, in the dtype of `masks`.

    Raises:
        TypeError: `imgs` or `masks` is no floating-point tensor, or a parameter has the wrong type.
        ValueError: batch sizes or devices differ, a dimension is missing or empty, or a parameter is out of range.

    Source:
        Ru et al., CVPR 2022, in the form of the authors' published code.

    Example:
        >>> import torch
        >>> imgs, masks = torch.rand(1, 3, 64, 48), torch.rand(1, 21, 16, 12)
        >>> par(imgs, masks, dilations=[1, 2, 4], num_iter=2).shape
        torch.Size([1, 21, 64, 48])
    """
    imgs = match_image(("imgs", imgs), ("masks", masks), resize)
    packed = pack_classes(("masks", masks), classes, imgs, absent)
    affinity = _affinity(imgs, dilations, renormalise, backend, w1, w2, guard, affinity_dtype)
    refined = pamr_propagate(packed.masks, affinity, dilations, num_iter, backend, packed.counts)
    return unpack_classes(refined, packed, masks, classes, absent)


class PAR(StatelessRefinement):
    """Pixel-adaptive refinement: the module of `par`.

    It has no parameters and no buffers. The buffer `kernel` that the published class saves is ignored when a
    state_dict is loaded. The attributes `w1` and `w2` can be set after construction, as in the published class.

    Args:
        dilations: dilations of the 3x3 neighbourhoods.
        num_iter: number of iterations.
        renormalise: make the weights sum to 1; in the published form they sum to 1 + w2.
        resize: what is resized if the sizes differ: "mask" (to the size of the images), "image" or "none".
        backend: "auto", "triton", "cpp" or "eager"; see `wsseg_layers.kernels.pamr_propagate`.
        w1: factor of sigma in both terms.
        w2: factor of the position term; 0 leaves the colour term alone.
        guard: added to sigma.
        affinity_dtype: dtype in which the weights are stored; see `par`.

    Example:
        >>> import torch
        >>> imgs, masks = torch.rand(1, 3, 64, 48), torch.rand(1, 21, 64, 48)
        >>> PAR(dilations=[1, 2, 4], num_iter=2)(imgs, masks).shape
        torch.Size([1, 21, 64, 48])
    """

    old_buffers = ("kernel",)
    old_attributes = ("kernel", "pos", "dim")

    def __init__(
        self,
        dilations: Sequence[int] = DILATIONS,
        num_iter: int = 10,
        renormalise: bool = False,
        resize: Resize = "mask",
        backend: BackendName = "auto",
        w1: float = PAR_W1,
        w2: float = PAR_W2,
        guard: float = GUARD,
        affinity_dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.dilations = check_settings(num_iter, dilations, resize, backend, affinity_dtype)
        check_flag("renormalise", renormalise)
        self.num_iter = num_iter
        self.renormalise = renormalise
        self.resize: Resize = resize
        self.backend: BackendName = backend
        _check_numbers(w1, w2, guard)
        self.w1 = w1
        self.w2 = w2
        self.guard = guard
        self.affinity_dtype = affinity_dtype

    def forward(self, imgs: Tensor, masks: Tensor, classes: Tensor | None = None, absent: Absent = "zero") -> Tensor:
        """Return the masks [B, C, h, w], refined by the images [B, K, H, W]; see `par`."""
        return par(
            imgs,
            masks,
            self.dilations,
            self.num_iter,
            self.renormalise,
            self.resize,
            self.backend,
            self.w1,
            self.w2,
            self.guard,
            self.affinity_dtype,
            classes,
            absent,
        )

    def affinity(self, imgs: Tensor) -> Tensor:
        """Return the weights [B, N, H, W] of images [B, K, H, W]; N = 8 x number of dilations."""
        check_maps("imgs", imgs)
        check_pixels("imgs", imgs)
        return _affinity(
            imgs, self.dilations, self.renormalise, self.backend, self.w1, self.w2, self.guard, self.affinity_dtype
        )

    def propagate(self, masks: Tensor, affinity: Tensor, counts: Tensor | None = None) -> Tensor:
        """Return the masks [B, C, H, W], refined by the weights [B, N, H, W] that `affinity` gave.

        With `counts`, int64 [B], only the first `counts[b]` channels of image b are refined; the others are 0.
        """
        check_maps("masks", masks)
        check_pixels("masks", masks)
        return pamr_propagate(masks, affinity, self.dilations, self.num_iter, self.backend, counts)

    def _sum_of_weights(self) -> float:
        """Return the sum of the weights of a pixel."""
        return 1 if self.renormalise else 1 + self.w2

    def extra_repr(self) -> str:
        """Return the arguments for `print(module)`."""
        return (
            f"dilations={self.dilations}, num_iter={self.num_iter}, renormalise={self.renormalise},"
            f" resize={self.resize!r}, backend={self.backend!r}, w1={self.w1}, w2={self.w2}, guard={self.guard},"
            f" affinity_dtype={self.affinity_dtype}"
        )


def _affinity(
    imgs: Tensor,
    dilations: Sequence[int],
    renormalise: bool,
    backend: BackendName,
    w1: float,
    w2: float,
    guard: float,
    affinity_dtype: torch.dtype,
) -> Tensor:
    check_affinity_dtype(affinity_dtype)
    check_flag("renormalise", renormalise)
    _check_numbers(w1, w2, guard)
    affinity = pamr_affinity(imgs, dilations, par_variant(w1, w2, guard), backend)
    return (affinity / (1 + w2) if renormalise else affinity).to(affinity_dtype)


def _check_numbers(w1: float, w2: float, guard: float) -> None:
    check_positive("w1", w1)
    check_not_negative("w2", w2)
    check_not_negative("guard", guard)
