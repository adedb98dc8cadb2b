"""Gaussian filters and the mean field of a dense CRF in plain PyTorch: exact sums, in bounded memory."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from ...gaussians import Gaussian

# Memory for the weights of one block of pixels.
BLOCK_BYTES = 64 * 2**20


class Filter(Protocol):
    """A linear filter of values [B, C, H, W]."""

    def __call__(self, values: Tensor, transposed: bool = False) -> Tensor:
        """Return the weighted sums, contiguous and in the dtype of `values`, or apply the transposed filter."""


def make_filter(image: Tensor | None, like: Tensor, gaussian: Gaussian, normalise: bool) -> Filter:
    """Return the filter of a Gaussian for values [B, C, H, W] like `like`.

    Args:
        image: [B, 3, H, W], or None for weights of position alone.
        like: values of the size, device and dtype (float32 or float64) that are filtered.
        gaussian: the standard deviations.
        normalise: whether weights are divided by sqrt(n_i n_j), where n_i is the sum of the weights of pixel i.
    """
    if image is None:
        return normalised(_separable(like, gaussian), like[:1, :1], normalise)
    features = position_and_colour(image, like, gaussian)

    # The weights are symmetric: the filter is its own transpose.
    def filter_exactly(values: Tensor, transposed: bool = False) -> Tensor:  # noqa: ARG001
        return _sum_in_blocks(features, values)

    return normalised(filter_exactly, like[:, :1], normalise)


def position_and_colour(image: Tensor, like: Tensor, gaussian: Gaussian) -> Tensor:
    """Return the features [B, H * W, 5] of images [B, 3, H, W]."""
    batch, _, height, width = image.shape
    colour = finite_or_nan(image).to(like.dtype).flatten(2) / gaussian.sigma_rgb  # [B, 3, H * W]
    y, x = torch.meshgrid(*(torch.arange(size, device=like.device) for size in (height, width)), indexing="ij")
    position = torch.stack([x.flatten(), y.flatten()]).to(like.dtype) / gaussian.sigma_xy
    return torch.cat([position.expand(batch, -1, -1), colour], dim=1).transpose(1, 2).contiguous()


def finite_or_nan(image: Tensor) -> Tensor:
    """Return images [B, 3, H, W]; an image with a value that is not finite is filled with NaN."""
    finite = image.isfinite().flatten(1).all(dim=1)
    return image.masked_fill(~finite[:, None, None, None], torch.nan)


def _sum_in_blocks(features: Tensor, values: Tensor) -> Tensor:
    """Return the sums of values [B, C, H, W], weighted by the Gaussian of the distance of features [B, H * W, 5]."""
    pixels = features.shape[1]
    rows = max(1, BLOCK_BYTES // (pixels * features.itemsize))
    result = torch.empty_like(values, memory_format=torch.contiguous_format)
    for one, image_values, image_result in zip(features, values.flatten(2), result.flatten(2), strict=True):
        for first in range(0, pixels, rows):
            block = one[first : first + rows]
            distance = torch.cdist(block, one, compute_mode="donot_use_mm_for_euclid_dist")
            weights = distance.square_().mul_(-0.5).exp_()
            image_result[:, first : first + rows] = image_values @ weights.T
    return result


def _separable(like: Tensor, gaussian: Gaussian) -> Filter:
    """Return the filter of position alone. Its Gaussian is a product of two, so it is one matrix per direction."""
    rows, columns = (
        torch.cdist(line, line, compute_mode="donot_use_mm_for_euclid_dist").square_().mul_(-0.5).exp_()
        for line in (
            torch.arange(size, device=like.device, dtype=like.dtype)[:, None] / gaussian.sigma_xy
            for size in like.shape[2:]
        )
    )

    def filter_exactly(values: Tensor, transposed: bool = False) -> Tensor:  # noqa: ARG001
        return (rows @ values @ columns).contiguous()

    return filter_exactly


def normalised(unnormalised: Filter, like: Tensor, normalise: bool) -> Filter:
    """Return a filter whose weights are divided by sqrt(n_i n_j) if `normalise`; `like` is [B, 1, H, W]."""
    if not normalise:
        return unnormalised
    factor = unnormalised(torch.ones_like(like)).add_(1e-20).rsqrt_()

    def filter_normalised(values: Tensor, transposed: bool = False) -> Tensor:
        return unnormalised(values * factor, transposed).mul_(factor)

    return filter_normalised


def mean_field(logits: Tensor, filters: Sequence[tuple[float, Filter]], num_iter: int) -> Tensor:
    """Return the marginals [B, C, H, W] after `num_iter` steps with filters of the given strengths."""
    marginals = logits.softmax(dim=1)
    for _ in range(num_iter):
        marginals = _step(logits, marginals, filters)
    return marginals


def mean_field_gradient(grad: Tensor, logits: Tensor, filters: Sequence[tuple[float, Filter]], num_iter: int) -> Tensor:
    """Return the gradient of the logits, given that of the marginals. The steps are computed again."""
    steps = [logits.softmax(dim=1)]
    for _ in range(num_iter):
        steps.append(_step(logits, steps[-1], filters))
    total = torch.zeros_like(logits)
    while steps:
        marginals = steps.pop()
        grad = marginals * (grad - (marginals * grad).sum(dim=1, keepdim=True))  # of the softmax
        total += grad
        if steps:
            grad = _add_filtered(torch.zeros_like(grad), grad, filters, transposed=True)
    return total


def _step(logits: Tensor, marginals: Tensor, filters: Sequence[tuple[float, Filter]]) -> Tensor:
    """Do one step: with Potts compatibilities, the filtered marginals of a class are added to its logits."""
    return _add_filtered(logits.clone(), marginals, filters, transposed=False).softmax(dim=1)


def _add_filtered(total: Tensor, values: Tensor, filters: Sequence[tuple[float, Filter]], transposed: bool) -> Tensor:
    for strength, filter_values in filters:
        total.add_(filter_values(values, transposed), alpha=strength)
    return total
