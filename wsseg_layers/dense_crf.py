"""Dense CRF: makes class probabilities of pixels agree where position and colour are similar, over the whole image.

Krähenbühl and Koltun, "Efficient Inference in Fully Connected CRFs with Gaussian Edge Potentials", NIPS 2011.
https://arxiv.org/abs/1210.5644
"""

from typing import Literal, get_args

from torch import Tensor, nn

from ._checks import check_choice, check_count, check_maps, check_not_negative, check_pixels, check_positive
from ._dtypes import cast, working_dtype
from ._refinement import check_classes, present_first, put_channels, take_channels
from .kernels import BackendName
from .kernels.filters import check_image, mean_field
from .kernels.operators import check_backend

Inputs = Literal["probabilities", "logits"]
INPUTS = get_args(Inputs)  # not in the functions: old torch.compile cannot trace get_args


def dense_crf(
    image: Tensor,
    scores: Tensor,
    num_iter: int = 10,
    gaussian_sigma_xy: float = 3.0,
    gaussian_weight: float = 3.0,
    bilateral_sigma_xy: float = 80.0,
    bilateral_sigma_rgb: float = 13.0,
    bilateral_weight: float = 10.0,
    inputs: Inputs = "probabilities",
    floor: float = 1e-5,
    backend: BackendName = "auto",
    classes: Tensor | None = None,
) -> Tensor:
    r"""Return the marginals of a fully connected CRF after `num_iter` steps of mean field.

    .. math:: Q^{t}_{:,i} = \mathrm{softmax}_c \Big( \log P_{c,i}
        + w_1 \sum_j \tilde k^{1}_{ij} Q^{t-1}_{c,j} + w_2 \sum_j \tilde k^{2}_{ij} Q^{t-1}_{c,j} \Big)

    P are the given probabilities, and also the first Q. The first kernel is a Gaussian over position, the second over
    position and colour. Both are normalised symmetrically, as in pydensecrf:
    :math:`\tilde k_{ij} = k_{ij} / \sqrt{n_i n_j}` with :math:`n_i = \sum_j k_{ij}`. The compatibilities are those of
    Potts: a class supports only itself.

    The result is differentiable once with respect to `scores`. No gradient flows to the image.

    Args:
        image: image, [B, 3, H, W], floating-point. `bilateral_sigma_rgb` is in the units of its values: the default is
            for 0 to 255.
        scores: class probabilities or logits, [B, C, H, W]. Probabilities need not sum to 1.
        num_iter: number of steps; 0 returns the normalised input.
        gaussian_sigma_xy: standard deviation of the first kernel, in pixels.
        gaussian_weight: weight of the first kernel; 0 leaves it out.
        bilateral_sigma_xy: standard deviation of the position in the second kernel, in pixels.
        bilateral_sigma_rgb: standard deviation of the colour in the second kernel.
        bilateral_weight: weight of the second kernel; 0 leaves it out.
        inputs: the kind of `scores`: "probabilities" or "logits".
        floor: lower bound of the probabilities, so that no class is impossible. Logits have no floor.
        backend: "auto", "triton", "cpp" or "eager"; see `wsseg_layers.kernels.bilateral_filter`.
        classes: bool, [B, C], the classes to use, such as those in an image-level label and the background. The others
            are 0 in the result.

    Returns:
        Marginals, [B, C, H, W], in the dtype of `scores`. They sum to 1 over the classes.

    Raises:
        TypeError: `image` or `scores` is no floating-point tensor, or a parameter has the wrong type.
        ValueError: sizes or devices differ, a dimension is missing or empty, or a parameter is out of range.

    Source:
        Krähenbühl and Koltun, NIPS 2011, algorithm 1.

    Example:
        >>> import torch
        >>> image, scores = 255 * torch.rand(1, 3, 32, 48), torch.rand(1, 21, 32, 48).softmax(dim=1)
        >>> dense_crf(image, scores, num_iter=2).shape
        torch.Size([1, 21, 32, 48])
    """
    check_maps("scores", scores)
    check_pixels("scores", scores)
    check_image(image, ("scores", scores))
    check_choice("inputs", inputs, INPUTS)
    check_floor(floor)
    numbers = (gaussian_sigma_xy, gaussian_weight, bilateral_sigma_xy, bilateral_sigma_rgb, bilateral_weight)
    if classes is None:
        logits = scores if inputs == "logits" else _log(scores, floor)
        return mean_field(logits, image, num_iter, *numbers, backend).to(scores.dtype)

    check_classes(classes, ("scores", scores))
    index, _ = present_first(classes)
    packed = take_channels(scores, index)  # [B, M, H, W]
    present = classes.gather(1, index)[:, :, None, None]
    # If an image has no present class, no class is excluded, because a softmax over none is NaN. `masked_fill` below
    # sets its marginals to 0.
    excluded = ~present & present.any(dim=1, keepdim=True)
    logits = (packed if inputs == "logits" else _log(packed, floor)).masked_fill(excluded, -float("inf"))
    marginals = mean_field(logits, image, num_iter, *numbers, backend).masked_fill(~present, 0)
    return put_channels(marginals, index, scores.shape[1]).to(scores.dtype)


def _log(probabilities: Tensor, floor: float) -> Tensor:
    """Return the logarithm, in at least float32: a small floor would be 0 in half precision."""
    return cast(probabilities, working_dtype(probabilities)).clamp(min=float(floor)).log()


def check_floor(floor: float) -> None:
    """Refuse a floor that is not a probability between 0 and 1."""
    check_positive("floor", floor)
    if floor >= 1:
        raise ValueError(f"floor must be below 1, got {floor}")


class DenseCRF(nn.Module):
    """Dense CRF: the module of `dense_crf`. It has no parameters and no buffers.

    Args:
        num_iter: number of steps of mean field.
        gaussian_sigma_xy: standard deviation of the kernel of position alone, in pixels.
        gaussian_weight: its weight; 0 leaves it out.
        bilateral_sigma_xy: standard deviation of the position in the kernel of position and colour, in pixels.
        bilateral_sigma_rgb: standard deviation of the colour, in the units of the image.
        bilateral_weight: its weight; 0 leaves it out.
        inputs: the kind of scores: "probabilities" or "logits".
        floor: lower bound of the probabilities.
        backend: "auto", "triton", "cpp" or "eager"; see `wsseg_layers.kernels.bilateral_filter`.

    Example:
        >>> import torch
        >>> image, scores = 255 * torch.rand(2, 3, 32, 48), torch.rand(2, 3, 32, 48).softmax(dim=1)
        >>> marginals = DenseCRF(num_iter=2)(image, scores)
        >>> torch.allclose(marginals.sum(dim=1), torch.ones(2, 32, 48))
        True
    """

    def __init__(
        self,
        num_iter: int = 10,
        gaussian_sigma_xy: float = 3.0,
        gaussian_weight: float = 3.0,
        bilateral_sigma_xy: float = 80.0,
        bilateral_sigma_rgb: float = 13.0,
        bilateral_weight: float = 10.0,
        inputs: Inputs = "probabilities",
        floor: float = 1e-5,
        backend: BackendName = "auto",
    ) -> None:
        super().__init__()
        check_count("num_iter", num_iter, minimum=0)
        check_positive("gaussian_sigma_xy", gaussian_sigma_xy)
        check_positive("bilateral_sigma_xy", bilateral_sigma_xy)
        check_positive("bilateral_sigma_rgb", bilateral_sigma_rgb)
        check_not_negative("gaussian_weight", gaussian_weight)
        check_not_negative("bilateral_weight", bilateral_weight)
        check_choice("inputs", inputs, INPUTS)
        check_floor(floor)
        check_backend(backend)
        self.num_iter = num_iter
        self.gaussian_sigma_xy = gaussian_sigma_xy
        self.gaussian_weight = gaussian_weight
        self.bilateral_sigma_xy = bilateral_sigma_xy
        self.bilateral_sigma_rgb = bilateral_sigma_rgb
        self.bilateral_weight = bilateral_weight
        self.inputs: Inputs = inputs
        self.floor = floor
        self.backend: BackendName = backend

    def forward(self, image: Tensor, scores: Tensor, classes: Tensor | None = None) -> Tensor:
        """Return the marginals [B, C, H, W] of scores [B, C, H, W], given the image [B, 3, H, W]; see `dense_crf`."""
        return dense_crf(
            image,
            scores,
            self.num_iter,
            self.gaussian_sigma_xy,
            self.gaussian_weight,
            self.bilateral_sigma_xy,
            self.bilateral_sigma_rgb,
            self.bilateral_weight,
            self.inputs,
            self.floor,
            self.backend,
            classes,
        )

    def extra_repr(self) -> str:
        """Return the arguments for `print(module)`."""
        return (
            f"num_iter={self.num_iter}, gaussian_sigma_xy={self.gaussian_sigma_xy},"
            f" gaussian_weight={self.gaussian_weight}, bilateral_sigma_xy={self.bilateral_sigma_xy},"
            f" bilateral_sigma_rgb={self.bilateral_sigma_rgb}, bilateral_weight={self.bilateral_weight},"
            f" inputs={self.inputs!r}, floor={self.floor}, backend={self.backend!r}"
        )
