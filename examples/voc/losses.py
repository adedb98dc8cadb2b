"""The losses of the paper (appendix B), the segmentation loss of the published code, and the loss with given masks."""

import torch.nn.functional as F
from torch import Tensor

from .dataset.images import IGNORE


def classification_loss(class_scores: Tensor, labels: Tensor) -> Tensor:
    """Return the multi-label soft-margin loss of scores [B, C] and labels [B, C] in {0, 1}: the mean over the batch."""
    return F.multilabel_soft_margin_loss(class_scores, labels)  # eq. 12 (eq. 6)


def confident_pixels(target: Tensor) -> Tensor:
    """Return the number of labelled pixels in a batch: the sum over b of M_{b,total} in eq. 23."""
    return (target != IGNORE).sum()


def balanced_cross_entropy(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Return the class-balanced cross-entropy of every image, and its number of labelled pixels.

    Args:
        logits: scores before the softmax [B, C + 1, h, w].
        target: pseudo labels [B, h, w], `IGNORE` at pixels without one.

    Returns:
        The mean of eq. 21 over all pixels of each image [B], labelled or not, and M_{b,total} [B].
    """
    num_classes = logits.shape[1]
    valid = target != IGNORE  # [B, h, w]
    one_hot = F.one_hot(target.where(valid, 0), num_classes).movedim(-1, 1) * valid[:, None]  # [B, C + 1, h, w]
    per_class = one_hot.sum(dim=(2, 3)).float()  # M_{b,c} of eq. 22, [B, C + 1]
    total = per_class.sum(dim=1, keepdim=True)  # M_{b,total} of eq. 22, [B, 1]
    class_weight = (total - per_class) / (1 + total)  # q_c, eq. 22
    pixel_weight = (one_hot * class_weight[:, :, None, None]).sum(dim=1)  # q_c of each pixel's label, [B, h, w]
    cross_entropy = F.cross_entropy(logits.float(), target, ignore_index=IGNORE, reduction="none")  # -log m
    per_image = (pixel_weight * cross_entropy).mean(dim=(1, 2))  # eq. 21, and 1 / hw of eq. 23
    return per_image, total[:, 0]


def segmentation_loss(logits: Tensor, target: Tensor, confident: Tensor) -> Tensor:
    """Return the segmentation loss of the paper (eq. 21-23): a mean over images, weighted by their labelled pixels.

    Args:
        logits: scores before the softmax [B, C + 1, h, w].
        target: pseudo labels [B, h, w], `IGNORE` at pixels without one.
        confident: `confident_pixels(target)`, the divisor of eq. 23. If processes share a batch, it is the mean over
            them: then the mean of their losses is the loss of the whole batch.

    Returns:
        A scalar; 0 if no pixel of the batch has a label.
    """
    per_image, total = balanced_cross_entropy(logits, target)
    return (total * per_image).sum() / confident.where(confident > 0, 1)  # eq. 23


def published_segmentation_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Return the segmentation loss of the authors' published code: the plain mean over images.

    It differs from eq. 23 in the size of `target`, to which the logits are resized, and in the weights of the images:
    an image with few labelled pixels counts as much as one with many.

    Args:
        logits: scores before the softmax [B, C + 1, h, w].
        target: pseudo labels [B, H, W] at the size of the crop, `IGNORE` at pixels without one.

    Returns:
        A scalar. Images without labels count as zero.
    """
    logits = F.interpolate(logits.float(), size=target.shape[-2:], mode="bilinear", align_corners=True)
    per_image, _ = balanced_cross_entropy(logits, target)
    return per_image.mean()


def mask_loss(logits: Tensor, mask: Tensor, confident: Tensor) -> Tensor:
    """Return the cross-entropy with given masks [B, H, W]: the sum over labelled pixels, divided by `confident`.

    `confident` is that of `segmentation_loss`. The loss is 0 if no pixel of the batch has a label.
    """
    logits = F.interpolate(logits.float(), size=mask.shape[-2:], mode="bilinear", align_corners=True)
    total = F.cross_entropy(logits, mask, ignore_index=IGNORE, reduction="sum")
    return total / confident.where(confident > 0, 1)
