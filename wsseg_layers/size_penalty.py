"""Focal size penalty: lowers the score of a class whose mask is nearly empty.

Araslanov and Roth, "Single-Stage Semantic Segmentation from Image Labels", CVPR 2020, section 3.2.
https://arxiv.org/abs/2005.08104
"""

from torch import Tensor, nn

from ._checks import check_maps, check_not_negative, check_positive
from ._dtypes import cast, result_dtype, working_dtype


def focal_size_penalty(masks: Tensor, p: float = 3.0, lam: float = 0.01) -> Tensor:
    r"""Return the focal penalty on each mask's mean (eq. 5); `p=0` is the plain penalty (eq. 4).

    .. math:: (1 - \bar m_c)^p \log(\lambda + \bar m_c), \qquad \bar m_c = \frac{1}{hw} \sum_{ij} m_{cij}

    Mean, power and logarithm are computed at least in float32. In the power, a mean above 1, which rounding
    can cause, counts as 1. The derivative of the power at 1 is defined as zero, so that no `p` gives NaN.

    Args:
        masks: masks m of the foreground classes in [0, 1], [B, C, h, w].
        p: how fast the penalty fades as the mask grows; at least 0.
        lam: lambda, positive. The penalty of an empty mask is log(lam).

    Returns:
        Penalties [B, C], in the dtype of `masks`; under autocast at least in float32. Add them to the pooled scores.

    Raises:
        TypeError: `masks` is no floating-point tensor.
        ValueError: `masks` is not [B, C, h, w] with h, w > 0, `p` is negative, or `lam` is not positive.

    Source:
        Araslanov and Roth, CVPR 2020, eq. 4 and 5 (eq. 15 and 16 of appendix B).

    Example:
        >>> import torch
        >>> focal_size_penalty(torch.zeros(1, 1, 4, 4), lam=0.01)  # log(0.01)
        tensor([[-4.6052]])
    """
    _check_parameters(p, lam)
    check_maps("masks", masks)
    if 0 in masks.shape[2:]:
        raise ValueError(f"masks must have at least one pixel, got shape {list(masks.shape)}")

    # A sum and a division, because the gradient of `mean` is a full tensor. That of a sum is one number per mask.
    height, width = masks.shape[2:]
    mean = masks.sum(dim=(2, 3), dtype=working_dtype(masks)) / (height * width)  # eq. 16
    rest = 1 - mean
    if p > 1:
        focus = rest.relu().pow(float(p))
    else:  # at 0 the derivative of the power is infinite for p < 1, and undefined for p = 1
        full = rest <= 0
        focus = rest.masked_fill(full, 1.0).pow(float(p)).masked_fill(full, 0.0**p)
    penalty = focus * (float(lam) + mean).log()  # eq. 5; eq. 4 with p = 0
    return cast(penalty, result_dtype(masks))


class FocalSizePenalty(nn.Module):
    """Focal size penalty: the module of `focal_size_penalty` (eq. 5; eq. 4 with `p=0`).

    Args:
        p: how fast the penalty fades as the mask grows; 3 in the authors' configuration.
        lam: lambda, the penalty of an empty mask is log(lam).

    Example:
        >>> import torch
        >>> masks = torch.rand(2, 20, 81, 81)
        >>> FocalSizePenalty()(masks).shape
        torch.Size([2, 20])
    """

    def __init__(self, p: float = 3.0, lam: float = 0.01) -> None:
        super().__init__()
        _check_parameters(p, lam)
        self.p = p
        self.lam = lam

    def forward(self, masks: Tensor) -> Tensor:
        """Return penalties [B, C] from the masks of the foreground classes [B, C, h, w]."""
        return focal_size_penalty(masks, self.p, self.lam)

    def extra_repr(self) -> str:
        """Return the arguments for `print(module)`."""
        return f"p={self.p}, lam={self.lam}"


def _check_parameters(p: float, lam: float) -> None:
    check_not_negative("p", p)
    check_positive("lam", lam)
