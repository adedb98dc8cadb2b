"""Multi-scale inference: one image in, one mask of class indices out."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .backbones import Backbone
from .model import CAMNet, Prediction, SingleStageNet, resize


def normalise(image: Tensor, backbone: Backbone) -> Tensor:
    """Bring an image [B, 3, H, W] in [0, 1] to the statistics that the backbone was trained with.

    The result is channels-last: convolutions are up to twice as fast so, on a CPU too.
    """
    mean, std = image.new_tensor(backbone.mean), image.new_tensor(backbone.std)
    return ((image - mean[:, None, None]) / std[:, None, None]).contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def multi_scale_masks(
    model: SingleStageNet | CAMNet, image: Tensor, scales: Sequence[float] = (1.0,), flip: bool = True
) -> tuple[Tensor, Tensor]:
    """Average the masks over scales and flips.

    Args:
        model: in eval mode.
        image: one image [3, H, W] in [0, 1].
        scales: factors of the image's sides.
        flip: also look at the mirrored image.

    Returns:
        masks [C + 1, H, W], background first, and the probability of each class [C]: the highest over the scales.
    """
    size = image.shape[-2:]
    image = normalise(image[None], model.backbone)
    total, probabilities = torch.zeros((), device=image.device), []
    for scale in scales:
        scaled = resize(image, (max(1, round(size[0] * scale)), max(1, round(size[1] * scale))))
        for mirrored in (False, True) if flip else (False,):
            prediction: Prediction = model(scaled.flip(-1) if mirrored else scaled)
            full = resize(prediction.masks, size)[0]
            total = total + (full.flip(-1) if mirrored else full)
            probabilities.append(prediction.class_scores[0].sigmoid())
    return total / len(probabilities), torch.stack(probabilities).amax(dim=0)


def segment(masks: Tensor, probabilities: Tensor, min_probability: float = 0.1) -> Tensor:
    """Choose a class for every pixel, among the background and the classes that are probable enough.

    (To remove the classes that are not in the image instead, give the image-level labels as probabilities.)

    Args:
        masks: [C + 1, H, W], background first.
        probabilities: [C] in [0, 1].
        min_probability: classes below it are removed.

    Returns:
        Class indices [H, W].
    """
    foreground = masks[1:] * (probabilities >= min_probability)[:, None, None]
    return torch.cat([masks[:1], foreground]).argmax(dim=0)
