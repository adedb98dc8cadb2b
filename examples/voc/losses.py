"""The two losses of the paper (appendix B)."""

import torch.nn.functional as F
from torch import Tensor

from .data import IGNORE


def classification_loss(class_scores: Tensor, labels: Tensor) -> Tensor:
    """Multi-label soft-margin loss (eq. 6) of scores [B, C] and labels [B, C] in {0, 1}: the mean over the batch."""
    return F.multilabel_soft_margin_loss(class_scores, labels)


def confident_pixels(target: Tensor) -> Tensor:
    """Return the number of pixels that have a label: M_total of eq. 23, summed over the batch."""
    return (target != IGNORE).sum()


def segmentation_loss(logits: Tensor, target: Tensor, confident: Tensor) -> Tensor:
    """Class-balanced cross-entropy with pseudo labels (eq. 21-23).

    Args:
        logits: scores before the softmax [B, C + 1, h, w].
        target: pseudo labels [B, h, w], `IGNORE` where there is none.
        confident: `confident_pixels(target)`, the divisor of eq. 23; where processes share a batch the mean of theirs,
            so that the mean of their losses is the loss of the whole batch.

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
    return (total[:, 0] * per_image).sum() / confident.where(confident > 0, 1)  # eq. 23


def mask_loss(logits: Tensor, mask: Tensor, confident: Tensor) -> Tensor:
    """Cross-entropy with given masks [B, H, W], summed over all pixels but `IGNORE` and divided by `confident`.

    `confident` is as in `segmentation_loss`; 0 where the whole batch is ignored.
    """
    logits = F.interpolate(logits.float(), size=mask.shape[-2:], mode="bilinear", align_corners=True)
    total = F.cross_entropy(logits, mask, ignore_index=IGNORE, reduction="sum")
    return total / confident.where(confident > 0, 1)
