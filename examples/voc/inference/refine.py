"""Refinement of soft masks at test time: by PAMR, by PAR, or by a dense CRF."""

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from wsseg_layers import PAMR, PAR

from ..crf import crf_marginals
from ..settings import Refinement
from .masks import highest
from .pictures import Picture
from .segmenter import SoftMasks

# A function that returns the class indices [H, W] of a picture after the refinement, or None for no refinement.
Refine = Callable[[Picture, SoftMasks], NDArray[np.uint8] | None]

ITERATIONS = 20  # of PAMR and PAR; 10, the value in training, gives a lower IoU at test time


@torch.no_grad()
def refine_masks(image: Tensor, masks: Tensor, kept: Tensor, method: Refinement, num_iter: int = ITERATIONS) -> Tensor:
    """Align the masks of the background and of the kept classes with the edges of the image.

    Args:
        image: [3, H, W] in [0, 1].
        masks: [C + 1, H, W], background first, after the power of the background.
        kept: bool [C], the classes that are refined.
        method: "pamr", "par", "crf", or "none", which only removes the other classes.
        num_iter: iterations of PAMR and PAR.

    Returns:
        Masks [C + 1, H, W]; those of classes that are not kept are 0. The highest mask is the class of a pixel.
    """
    classes = torch.cat([kept.new_ones(1), kept])  # [C + 1]
    if method == "none":
        return masks * classes[:, None, None]
    if method == "crf":
        return crf_marginals(image[None], masks[None], classes[None])[0]
    layer = PAMR(num_iter) if method == "pamr" else PAR(num_iter=num_iter)
    return layer(image[None], masks[None], classes=classes[None])[0]


def refinement(method: Refinement) -> Refine:
    """Return the function that refines a picture's masks by this method. Several threads may call it."""

    def refine(picture: Picture, soft: SoftMasks) -> NDArray[np.uint8] | None:
        if method == "none":
            return None
        image = picture.tensor().to(soft.masks.device)
        refined = refine_masks(image, soft.masks, soft.kept, method)
        return highest(refined).to(torch.uint8).cpu().numpy()

    return refine
