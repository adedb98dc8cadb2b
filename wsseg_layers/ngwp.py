"""Normalised global weighted pooling: class scores from pixel scores and masks.

Araslanov and Roth, "Single-Stage Semantic Segmentation from Image Labels", CVPR 2020, section 3.2.
https://arxiv.org/abs/2005.08104
"""

from torch import Tensor, nn

from ._checks import check_maps, check_positive, check_same_device
from ._dtypes import cast, result_dtype, working_dtype


def ngwp_pool(scores: Tensor, masks: Tensor, eps: float = 1.0) -> Tensor:
    r"""Average the pixel scores of each class, weighted by its mask (eq. 3).

    .. math:: y_c = \frac{\sum_{ij} m_{cij} \, y_{cij}}{\epsilon + \sum_{ij} m_{cij}}

    Sums and division are computed at least in float32.

    Args:
        scores: pixel scores y of the foreground classes, [B, C, h, w].
        masks: masks m of the foreground classes in [0, 1], [B, C, h, w]: the softmax over background and classes,
            without the background channel.
        eps: epsilon, positive; 1 in the paper (see appendix B.1). It moves the score of a class with a small mask
            towards zero.

    Returns:
        Class scores [B, C], in the common dtype of the inputs; under autocast at least in float32.

    Raises:
        TypeError: `scores` or `masks` is no floating-point tensor.
        ValueError: their shapes or devices differ, or `eps` is not positive.

    Source:
        Araslanov and Roth, CVPR 2020, eq. 3 (eq. 14 of appendix B).

    Example:
        >>> import torch
        >>> scores = torch.tensor([3.0, 5.0]).view(1, 1, 1, 2)
        >>> masks = torch.tensor([0.0, 1.0]).view(1, 1, 1, 2)
        >>> ngwp_pool(scores, masks)  # 5 / (1 + 1)
        tensor([[2.5000]])
    """
    check_positive("eps", eps)
    check_maps("scores", scores)
    check_maps("masks", masks)
    if scores.shape[1] + 1 == masks.shape[1]:
        raise ValueError(
            f"masks must hold the foreground classes only, got shape {list(masks.shape)} for scores"
            f" {list(scores.shape)}: leave the background out with masks[:, 1:]"
        )
    if scores.shape != masks.shape:
        raise ValueError(f"masks must have the shape of scores {list(scores.shape)}, got {list(masks.shape)}")
    check_same_device(("scores", scores), ("masks", masks))

    dtype = working_dtype(scores, masks)
    weights = cast(masks, dtype)
    weighted = (weights * cast(scores, dtype)).sum(dim=(2, 3))
    pooled = weighted / (float(eps) + weights.sum(dim=(2, 3)))  # eq. 3
    return cast(pooled, result_dtype(scores, masks))


class nGWPPool(nn.Module):  # noqa: N801 - the paper's spelling
    """Normalised global weighted pooling: the module of `ngwp_pool` (eq. 3).

    Args:
        eps: epsilon; 1 in the paper. It moves the score of a class with a small mask towards zero.

    Example:
        >>> import torch
        >>> scores = torch.randn(2, 20, 81, 81)
        >>> background = torch.ones(2, 1, 81, 81)
        >>> masks = torch.cat([background, scores], dim=1).softmax(dim=1)
        >>> nGWPPool()(scores, masks[:, 1:]).shape
        torch.Size([2, 20])
    """

    def __init__(self, eps: float = 1.0) -> None:
        super().__init__()
        check_positive("eps", eps)
        self.eps = eps

    def forward(self, scores: Tensor, masks: Tensor) -> Tensor:
        """Return class scores [B, C] from pixel scores and foreground masks, both [B, C, h, w]."""
        return ngwp_pool(scores, masks, self.eps)

    def extra_repr(self) -> str:
        """Return the arguments for `print(module)`."""
        return f"eps={self.eps}"
