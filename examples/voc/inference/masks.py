"""Multi-scale masks of one image, and the choice of a class for every pixel."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..backbones import normalise
from ..model import Network, Output, resize


@torch.no_grad()
def multi_scale_masks(
    model: Network, image: Tensor, scales: Sequence[float] = (1.0,), flip: bool = True
) -> tuple[Tensor, Tensor]:
    """Average the masks over scales and flips.

    Args:
        model: a network in eval mode.
        image: one image [3, H, W] in [0, 1].
        scales: factors of the image's sides.
        flip: use the mirrored image too.

    Returns:
        masks [C + 1, H, W], background first, and the probability of each class [C]: the highest over the scales.
    """
    size = image.shape[-2:]
    image = normalise(image[None], model.backbone)
    total, probabilities = torch.zeros((), device=image.device), []
    for scale in scales:
        scaled = resize(image, (max(1, round(size[0] * scale)), max(1, round(size[1] * scale))))
        for mirrored in (False, True) if flip else (False,):
            output: Output = model(scaled.flip(-1) if mirrored else scaled)
            full = resize(output.masks, size)[0]  # [C + 1, H, W]
            total = total + (full.flip(-1) if mirrored else full)
            probabilities.append(output.class_scores[0].sigmoid())
    return total / len(probabilities), torch.stack(probabilities).amax(dim=0)


def segment(masks: Tensor, probabilities: Tensor, min_probability: float = 0.1) -> Tensor:
    """Choose for every pixel the background or one of the classes that are probable enough.

    (To keep the classes of the image-level labels instead, give the labels as probabilities.)

    Args:
        masks: [C + 1, H, W], background first.
        probabilities: [C] in [0, 1].
        min_probability: classes with a lower probability are removed.

    Returns:
        Class indices [H, W].
    """
    foreground = masks[1:] * (probabilities >= min_probability)[:, None, None]
    return torch.cat([masks[:1], foreground]).argmax(dim=0)
