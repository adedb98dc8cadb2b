"""Pixel-adaptive mask refinement: brings masks into agreement with the image's local appearance.

Araslanov and Roth, "Single-Stage Semantic Segmentation from Image Labels", CVPR 2020, section 3.3.
"""

from collections.abc import Sequence

from torch import Tensor

from ._checks import check_choice
from ._refinement import DILATIONS, Resize, StatelessRefinement, check_settings, match_sizes
from .kernels import VARIANTS, Backend, pamr_affinity, pamr_propagate

# This layer's names of the forms -> the operators'.
AFFINITIES = {"released": "pamr"} | {name: name for name in VARIANTS if name != "pamr"}


def pamr(
    image: Tensor,
    mask: Tensor,
    num_iter: int = 10,
    dilations: Sequence[int] = DILATIONS,
    affinity: str = "released",
    resize: Resize = "mask",
    backend: Backend = "auto",
) -> Tensor:
    r"""Replace every pixel of the masks by a weighted mean of its neighbours, `num_iter` times (eq. 7).

    .. math:: m^t_{:,i} = \sum_{n \in N(i)} \alpha_{i,n} \, m^{t-1}_{:,n}

    A pixel's neighbours are the 8 at offsets {-d, 0, d} for every dilation d, the border replicated. The weights alpha
    are a softmax over the neighbours of the kernel k, averaged over the image's channels,

    .. math:: k(I_i, I_n) = - \frac{|I_i - I_n|}{10^{-8} + 0.1 \, \sigma_i}

    with the unbiased standard deviation sigma of the pixel (once for every dilation) and its neighbours. This is the
    form in the authors' published code; `affinity="paper"` divides by sigma squared, as eq. 8 does. The released form
    does not change when a channel of the image is scaled or shifted: the image needs no particular normalisation.

    Weights are computed in float32 and are constants: the result is differentiable with respect to the masks only. NaN
    in the image or in the masks spreads to the pixels whose neighbourhood, over all iterations, holds it.

    Args:
        image: image, [B, K, H, W], any number of channels.
        mask: masks, [B, C, h, w]. Each channel is refined by itself.
        num_iter: number of iterations, at least 0.
        dilations: positive integers. A dilation may be larger than the image.
        affinity: "released" or "paper"; also "par", whose weights are those of `par`.
        resize: what is resized (bilinearly, corners aligned) if the sizes differ: "mask" to the image's size, "image"
            to the masks' size, or "none" to make it an error.
        backend: "auto", "triton", "cpp" or "torch"; see `wsseg_layers.kernels.pamr_propagate`.

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
    dilations = check_settings(num_iter, dilations, resize, backend)
    check_choice("affinity", affinity, tuple(AFFINITIES))
    image, mask = match_sizes(resize, image=image, mask=mask)
    weights = pamr_affinity(image, dilations, AFFINITIES[affinity], backend)
    return pamr_propagate(mask, weights, dilations, num_iter, backend)


class PAMR(StatelessRefinement):
    """Pixel-adaptive mask refinement: the module of `pamr` (eq. 7 and 8).

    It has no parameters and no buffers. The buffers that older implementations saved (`aff_x.kernel`, `aff_m.kernel`,
    `aff_std.kernel`) are ignored when a state_dict is loaded.

    Args:
        num_iter: number of iterations; 10 in the paper.
        dilations: dilations of the 3x3 neighbourhoods.
        affinity: "released" for the form of the authors' published code, "paper" for eq. 8 as printed; also "par".
        resize: what is resized if the sizes differ: "mask" (to the image's size), "image" or "none".
        backend: "auto", "triton", "cpp" or "torch"; see `wsseg_layers.kernels.pamr_propagate`.

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

    def __init__(
        self,
        num_iter: int = 10,
        dilations: Sequence[int] = DILATIONS,
        affinity: str = "released",
        resize: Resize = "mask",
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        check_choice("affinity", affinity, tuple(AFFINITIES))
        self.num_iter = num_iter
        self.dilations = check_settings(num_iter, dilations, resize, backend)
        self.affinity_form = affinity
        self.resize: Resize = resize
        self.backend: Backend = backend

    def forward(self, image: Tensor, mask: Tensor) -> Tensor:
        """Return the masks [B, C, h, w], refined by the image [B, K, H, W]; see `pamr`."""
        return pamr(image, mask, self.num_iter, self.dilations, self.affinity_form, self.resize, self.backend)

    def affinity(self, image: Tensor) -> Tensor:
        """Return the weights [B, N, H, W] of an image [B, K, H, W], float32; N = 8 x number of dilations."""
        check_choice("affinity", self.affinity_form, tuple(AFFINITIES))
        return pamr_affinity(image, self.dilations, AFFINITIES[self.affinity_form], self.backend)

    def propagate(self, mask: Tensor, affinity: Tensor) -> Tensor:
        """Return the masks [B, C, H, W], refined by the weights [B, N, H, W] that `affinity` gave."""
        return pamr_propagate(mask, affinity, self.dilations, self.num_iter, self.backend)

    def extra_repr(self) -> str:
        """Return what `print(module)` shows."""
        return (
            f"num_iter={self.num_iter}, dilations={self.dilations}, affinity={self.affinity_form!r},"
            f" resize={self.resize!r}, backend={self.backend!r}"
        )
