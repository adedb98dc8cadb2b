"""Pixel-adaptive refinement (PAR): PAMR's propagation with an affinity of colour and position.

Ru et al., "Learning Affinity from Attention: End-to-End Weakly-Supervised Semantic Segmentation with Transformers",
CVPR 2022.
"""

from collections.abc import Sequence

from torch import Tensor

from ._checks import check_flag, check_maps, check_pixels
from ._refinement import DILATIONS, Resize, StatelessRefinement, check_settings, match_sizes
from .kernels import Backend, pamr_affinity, pamr_propagate

POSITION_WEIGHT = 0.01  # w2: the position's share, by which the rows of the published affinity exceed 1


def par(
    imgs: Tensor,
    masks: Tensor,
    dilations: Sequence[int] = DILATIONS,
    num_iter: int = 10,
    renormalise: bool = False,
    resize: Resize = "mask",
    backend: Backend = "auto",
) -> Tensor:
    r"""Replace every pixel of the masks by a weighted sum of its neighbours, `num_iter` times.

    Neighbours and iteration are those of `pamr`. The weights of a pixel's neighbours add a term of colour and one of
    position, each a softmax over the neighbours, with :math:`w_1 = 0.3` and :math:`w_2 = 0.01`:

    .. math::
        \mathrm{softmax}\left(-\left(\frac{|I_i - I_n|}{w_1 \sigma_i}\right)^2\right)
        + w_2 \, \mathrm{softmax}\left(-\left(\frac{|p_i - p_n|}{w_1 \sigma_p}\right)^2\right)

    The colour term is averaged over the image's channels before the softmax. sigma is the unbiased standard deviation
    over the neighbours, to which 1e-8 is added. The weights sum to 1 + w2, so that the masks grow by 1 % an iteration.

    Weights are computed in float32 and are constants: the result is differentiable with respect to the masks only.

    Args:
        imgs: images, [B, K, H, W].
        masks: masks, [B, C, h, w].
        dilations: positive integers. A dilation may be larger than the image.
        num_iter: number of iterations, at least 0.
        renormalise: divide the weights by 1 + w2, so that the masks keep their range.
        resize: what is resized (bilinearly, corners aligned) if the sizes differ: "mask" to the images' size, "image"
            to the masks' size, or "none" to make it an error.
        backend: "auto", "triton", "cpp" or "torch"; see `wsseg_layers.kernels.pamr_propagate`.

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
    dilations = check_settings(num_iter, dilations, resize, backend)
    check_flag("renormalise", renormalise)
    imgs, masks = match_sizes(resize, imgs=imgs, masks=masks)
    weights = _affinity(imgs, dilations, renormalise, backend)
    return pamr_propagate(masks, weights, dilations, num_iter, backend)


class PAR(StatelessRefinement):
    """Pixel-adaptive refinement: the module of `par`.

    It has no parameters and no buffers. The buffer `kernel` that older implementations saved is ignored when a
    state_dict is loaded.

    Args:
        dilations: dilations of the 3x3 neighbourhoods.
        num_iter: number of iterations.
        renormalise: make the weights sum to 1; in the published form they sum to 1.01.
        resize: what is resized if the sizes differ: "mask" (to the images' size), "image" or "none".
        backend: "auto", "triton", "cpp" or "torch"; see `wsseg_layers.kernels.pamr_propagate`.

    Example:
        >>> import torch
        >>> imgs, masks = torch.rand(1, 3, 64, 48), torch.rand(1, 21, 64, 48)
        >>> PAR(dilations=[1, 2, 4], num_iter=2)(imgs, masks).shape
        torch.Size([1, 21, 64, 48])
    """

    old_buffers = ("kernel",)

    def __init__(
        self,
        dilations: Sequence[int] = DILATIONS,
        num_iter: int = 10,
        renormalise: bool = False,
        resize: Resize = "mask",
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        self.dilations = check_settings(num_iter, dilations, resize, backend)
        check_flag("renormalise", renormalise)
        self.num_iter = num_iter
        self.renormalise = renormalise
        self.resize: Resize = resize
        self.backend: Backend = backend

    def forward(self, imgs: Tensor, masks: Tensor) -> Tensor:
        """Return the masks [B, C, h, w], refined by the images [B, K, H, W]; see `par`."""
        return par(imgs, masks, self.dilations, self.num_iter, self.renormalise, self.resize, self.backend)

    def affinity(self, imgs: Tensor) -> Tensor:
        """Return the weights [B, N, H, W] of images [B, K, H, W], float32; N = 8 x number of dilations."""
        check_maps("imgs", imgs)
        check_pixels("imgs", imgs)
        return _affinity(imgs, self.dilations, self.renormalise, self.backend)

    def propagate(self, masks: Tensor, affinity: Tensor) -> Tensor:
        """Return the masks [B, C, H, W], refined by the weights [B, N, H, W] that `affinity` gave."""
        check_maps("masks", masks)
        check_pixels("masks", masks)
        return pamr_propagate(masks, affinity, self.dilations, self.num_iter, self.backend)

    def extra_repr(self) -> str:
        """Return what `print(module)` shows."""
        return (
            f"dilations={self.dilations}, num_iter={self.num_iter}, renormalise={self.renormalise},"
            f" resize={self.resize!r}, backend={self.backend!r}"
        )


def _affinity(imgs: Tensor, dilations: tuple[int, ...], renormalise: bool, backend: Backend) -> Tensor:
    weights = pamr_affinity(imgs, dilations, "par", backend)
    return weights / (1 + POSITION_WEIGHT) if renormalise else weights
