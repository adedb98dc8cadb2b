"""From refined masks to pseudo ground truth (section 3.3, "Self-supervised segmentation loss")."""

import torch
from torch import Tensor

from .dataset.images import IGNORE


def pseudo_labels(
    masks: Tensor,
    labels: Tensor,
    foreground: float = 0.6,
    background: float = 0.7,
    floor: float = 0.2,
    background_required: bool = False,
) -> Tensor:
    """Keep the confident pixels of the classes that are in the image.

    A class claims the pixels above `foreground` (for class 0: `background`) times its own maximum and above `floor`. A
    pixel that no class or more than one class claims is ignored. An image in which a labelled class gets no pixel
    is ignored as a whole.

    Args:
        masks: refined masks [B, C + 1, h, w] in [0, 1], background first.
        labels: image-level labels [B, C] in {0, 1}.
        foreground: fraction of the maximum, for classes.
        background: fraction of the maximum, for background.
        floor: lowest confidence of any pseudo label.
        background_required: also ignore an image in which the background gets no pixel, as the authors' published code
            does. The paper asks for the labelled classes only.

    Returns:
        Class indices [B, h, w], `IGNORE` at pixels without a pseudo label.
    """
    present = torch.cat([torch.ones_like(labels[:, :1]), labels], dim=1).bool()  # [B, C + 1]
    masks = masks * present[:, :, None, None]
    fraction = masks.new_full((masks.shape[1],), foreground)
    fraction[0] = background
    threshold = (masks.amax(dim=(2, 3)) * fraction).clamp(min=floor)  # [B, C + 1]
    claimed = masks > threshold[:, :, None, None]
    target = claimed.int().argmax(dim=1)
    target[claimed.sum(dim=1) != 1] = IGNORE
    required = present.clone()
    required[:, 0] = background_required
    supervised = torch.stack([(target == index).any(dim=(1, 2)) for index in range(masks.shape[1])], dim=1)
    incomplete = (required & ~supervised).any(dim=1)  # [B]
    target[incomplete] = IGNORE
    return target
