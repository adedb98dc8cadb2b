"""The losses of a training step."""

import torch
import torch.nn.functional as F
from torch import Tensor

from wsseg_layers import DenseEnergyLoss

from ..dataset.images import IGNORE
from ..losses import (
    classification_loss,
    confident_pixels,
    mask_loss,
    published_segmentation_loss,
    segmentation_loss,
)
from ..model import Output, resize
from ..self_supervision import labels_from_masks
from .state import TrainingState

# The values of AFA and ToCo, for images in 0 to 255.
ENERGY = DenseEnergyLoss(weight=1e-7, sigma_rgb=15, sigma_xy=100, scale_factor=0.5)


def losses_of(state: TrainingState, output: Output, image: Tensor, labels: Tensor, mask: Tensor) -> list[Tensor]:
    """Return classification, segmentation and energy loss; a loss that this network or epoch does not use is zero.

    Args:
        state: the state of the training.
        output: the output of the network for the image.
        image: [B, 3, H, W] in [0, 1].
        labels: image-level labels [B, C] in {0, 1}.
        mask: masks for `--supervision masks`, [B, H, W].
    """
    settings, accelerator = state.settings, state.accelerator

    def mean_confident(target: Tensor) -> Tensor:
        return accelerator.reduce(confident_pixels(target).float(), reduction="mean")

    if settings.supervision == "masks":
        segmentation = mask_loss(output.logits, mask, mean_confident(mask))
        return [torch.zeros_like(segmentation), segmentation, torch.zeros_like(segmentation)]
    classification = classification_loss(output.class_scores, labels)
    nothing = torch.zeros_like(classification)
    if settings.model == "cam" or settings.only_classifies(state.epoch):
        return [classification, nothing, nothing]
    target = labels_from_masks(image, output.masks.detach(), labels, settings)
    if settings.loss == "published":
        segmentation = published_segmentation_loss(output.logits, target)
    else:
        segmentation = segmentation_loss(output.logits, target, mean_confident(target))
    energy = settings.energy_loss * energy_loss(image, output.masks, target) if settings.energy_loss > 0 else nothing
    return [classification, segmentation, energy]


def energy_loss(image: Tensor, masks: Tensor, target: Tensor) -> Tensor:
    """Return the dense energy loss of the masks at the size of the image; the region of interest is the whole image.

    Args:
        image: [B, 3, H, W] in [0, 1].
        masks: [B, C + 1, h, w], background first.
        target: pseudo labels, [B, h, w] or [B, H, W]. Pixels with a pseudo label count less.
    """
    unlabelled = (target == IGNORE)[:, None].float()  # [B, 1, h, w]
    unlabelled = F.interpolate(unlabelled, size=image.shape[-2:], mode="nearest")
    masks = resize(masks.float(), image.shape[-2:])
    return ENERGY(255 * image, masks, torch.ones_like(image[:, 0]), IGNORE * unlabelled)
