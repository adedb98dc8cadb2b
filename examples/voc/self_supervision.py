"""Self-supervision (section 3.3): pseudo labels from the network's own masks."""

import torch
from torch import Tensor

from wsseg_layers import PAMR

from .model import resize
from .pseudo_labels import pseudo_labels
from .settings import Settings


@torch.no_grad()
def labels_from_masks(image: Tensor, masks: Tensor, labels: Tensor, settings: Settings) -> Tensor:
    """Refine masks by PAMR and keep their confident pixels, as the loss of the settings uses them.

    Args:
        image: [B, 3, H, W] in [0, 1].
        masks: [B, C + 1, h, w], background first.
        labels: image-level labels [B, C] in {0, 1}.
        settings: those of the training.

    Returns:
        Class indices, `IGNORE` at pixels without a pseudo label: [B, h, w] for the paper's loss, [B, H, W] for the
        published one.
    """
    pamr = PAMR(settings.pamr_iterations, settings.pamr_dilations, settings.pamr_variant, resize="image")
    # Absent classes get no pseudo label: only the background and the classes of the image are refined.
    present = torch.cat([torch.ones_like(labels[:, :1]), labels], dim=1) > 0
    refined = pamr(image, masks, classes=present)
    if settings.loss == "published":
        return pseudo_labels(resize(refined, image.shape[-2:]), labels, background_required=True)
    return pseudo_labels(refined, labels)
