"""Multi-scale masks of one image, and the choice of a class for every pixel."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backbones import normalise
from ..dataset.errors import DataError
from ..model import CAMNet, Network, Output, resize


@torch.no_grad()
def multi_scale_masks(
    model: Network, image: Tensor, scales: Sequence[float] = (1.0,), flip: bool = True, pad_to: int | None = None
) -> tuple[Tensor, Tensor]:
    """Average the masks over scales and flips.

    Args:
        model: a network in eval mode.
        image: one image [3, H, W] in [0, 1].
        scales: factors of the image's sides.
        flip: also use the mirrored image.
        pad_to: side of a square of zeros (the mean colour). Every scaled image is placed in its centre before it goes
            through the network, as in the authors' published code. None does not pad.

    Returns:
        masks [C + 1, H, W], background first, and the probability of each class [C]: the highest over scales and flips.

    Raises:
        DataError: a scaled image is larger than `pad_to`.
    """
    size = image.shape[-2:]
    image = normalise(image[None], model.backbone)
    total, probabilities = torch.zeros((), device=image.device), []
    for scale in scales:
        scaled = resize(image, (max(1, round(size[0] * scale)), max(1, round(size[1] * scale))))
        for mirrored in (False, True) if flip else (False,):
            seen = scaled.flip(-1) if mirrored else scaled
            output: Output = model(seen if pad_to is None else pad(seen, pad_to))
            masks = output.masks if pad_to is None else cut(output.masks, pad_to, seen.shape[-2:])
            full = resize(masks, size)[0]  # [C + 1, H, W]
            total = total + (full.flip(-1) if mirrored else full)
            probabilities.append(output.class_scores[0].sigmoid())
    return total / len(probabilities), torch.stack(probabilities).amax(dim=0)


def background_mask(model: Network, masks: Tensor, background: float) -> Tensor:
    """Return the background's mask [H, W] with a power or score, of masks [C + 1, H, W]."""
    return torch.full_like(masks[0], background) if isinstance(model, CAMNet) else masks[0] ** background


def pad(image: Tensor, side: int) -> Tensor:
    """Put an image [B, 3, h, w] into the centre of a square [B, 3, side, side] of zeros."""
    height, width = image.shape[-2:]
    if max(height, width) > side:
        raise DataError(f"scaled to {width}x{height} pixels, it does not fit into --pad-to {side}")
    top, left = (side - height) // 2, (side - width) // 2
    return F.pad(image, (left, side - width - left, top, side - height - top))


def cut(masks: Tensor, side: int, size: torch.Size) -> Tensor:
    """Return the masks of the image in the centre: resize them to the square, then remove what `pad` added."""
    height, width = size
    top, left = (side - height) // 2, (side - width) // 2
    return resize(masks, (side, side))[..., top : top + height, left : left + width]


def segment(masks: Tensor, probabilities: Tensor, min_probability: float = 0.1) -> Tensor:
    """Choose for every pixel the background or one of the classes that are probable enough.

    To keep the classes of the image-level labels instead, pass the labels as probabilities.

    Args:
        masks: [C + 1, H, W], background first.
        probabilities: [C] in [0, 1].
        min_probability: classes with a lower probability are removed.

    Returns:
        Class indices [H, W].
    """
    foreground = masks[1:] * (probabilities >= min_probability)[:, None, None]
    return highest(torch.cat([masks[:1], foreground]))


def highest(masks: Tensor) -> Tensor:
    """Return the index of the highest mask at every pixel, [H, W], of masks [C + 1, H, W]; the first of equal ones."""
    # On a CPU, argmax over the first dimension is many times slower.
    return masks.max(dim=0).indices
