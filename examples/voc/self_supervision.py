"""Self-supervision (section 3.3): pseudo labels from the network's own masks."""

import torch
import torch.nn.functional as F
from torch import Tensor

from wsseg_layers import PAMR
from wsseg_layers.functional import threshold_pseudo_labels

from .crf import crf_marginals
from .dataset.images import IGNORE
from .model import resize
from .settings import Settings


@torch.no_grad()
def labels_from_masks(image: Tensor, masks: Tensor, labels: Tensor, settings: Settings) -> Tensor:
    """Refine masks by PAMR or a dense CRF and return their confident pixels, at the size that `settings.loss` needs.

    Args:
        image: [B, 3, H, W] in [0, 1].
        masks: [B, C + 1, h, w], background first.
        labels: image-level labels [B, C] in {0, 1}.
        settings: those of the training.

    Returns:
        Class indices, `IGNORE` at pixels without a pseudo label: [B, h, w] for the paper's loss, [B, H, W] for the
        published one.
    """
    # Absent classes get no pseudo label: only the background and the classes of the image are refined.
    present = torch.cat([torch.ones_like(labels[:, :1]), labels], dim=1) > 0
    if settings.pseudo_labels == "crf":
        refined = crf_marginals(image, resize(masks, image.shape[-2:]), present)
    else:
        if settings.loss == "paper":  # with the published loss, PAMR resizes the image itself, without antialiasing
            image = F.interpolate(image, masks.shape[-2:], mode="bilinear", antialias=True)
        pamr = PAMR(settings.pamr_iterations, settings.pamr_dilations, settings.pamr_variant, resize="image")
        refined = pamr(image, masks, classes=present)
    if settings.loss == "published":
        return threshold_pseudo_labels(resize(refined, image.shape[-2:]), labels, discard="all", ignore_index=IGNORE)
    refined = resize(refined, masks.shape[-2:])  # only the CRF's have another size
    return threshold_pseudo_labels(refined, labels, ignore_index=IGNORE)
