"""The two losses of the paper (appendix B)."""

import torch.nn.functional as F
from torch import Tensor

from .data import IGNORE


def classification_loss(class_scores: Tensor, labels: Tensor) -> Tensor:
    """Multi-label soft-margin loss (eq. 6) of scores [B, C] and labels [B, C] in {0, 1}: the mean over the batch."""
    return F.multilabel_soft_margin_loss(class_scores, labels)


def segmentation_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Class-balanced cross-entropy with pseudo labels (eq. 21-23).

    Args:
        logits: scores before the softmax [B, C + 1, h, w].
        target: pseudo labels [B, h, w], `IGNORE` where there is none.

    Returns:
        A scalar; 0 where the whole batch is ignored.
    """
    num_classes = logits.shape[1]
    valid = target != IGNORE
    one_hot = F.one_hot(target.where(valid, 0), num_classes).movedim(-1, 1) * valid[:, None]
    per_class = one_hot.sum(dim=(2, 3)).float()  # M_{b,c}
    total = per_class.sum(dim=1, keepdim=True)  # M_{b,total}
    class_weight = (total - per_class) / (1 + total)  # eq. 22
    pixel_weight = (one_hot * class_weight[:, :, None, None]).sum(dim=1)
    cross_entropy = F.cross_entropy(logits.float(), target, ignore_index=IGNORE, reduction="none")
    per_image = (pixel_weight * cross_entropy).mean(dim=(1, 2))  # eq. 21, 1 / hw of eq. 23
    weight = total[:, 0]
    return (weight * per_image).sum() / weight.sum().clamp(min=1)  # eq. 23
