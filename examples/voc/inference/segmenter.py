"""A network with its settings at test time: soft masks of a picture, and the choice of a class for every pixel."""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..dataset.errors import DataError
from ..model import CAMNet, Network
from ..settings import Settings
from .masks import background_mask, multi_scale_masks, segment
from .pictures import Picture


class SoftMasks(NamedTuple):
    """Masks [C + 1, H, W], background first; probabilities [C]; the classes that are kept, as bool [C]."""

    masks: Tensor
    probabilities: Tensor
    kept: Tensor


class Segmenter:
    """A network with its settings at test time."""

    def __init__(
        self,
        model: Network,
        settings: Settings,
        device: torch.device,
        flip: bool = True,
        cam_background: float = CAMNet.background,
        pad_to: int | None = None,
    ) -> None:
        self.model = model.to(device)
        self.settings = settings
        self.device = device
        self.flip = flip
        self.cam_background = cam_background
        self.pad_to = pad_to

    def __call__(self, picture: Picture, labels: frozenset[int] | None = None) -> SoftMasks:
        """Return the soft masks of a picture. If labels are given, exactly these classes are kept."""
        image = picture.tensor().to(self.device)
        masks, probabilities = multi_scale_masks(self.model, image, self.settings.scales, self.flip, self.pad_to)
        if not (masks.isfinite().all() and probabilities.isfinite().all()):
            raise DataError("the network's masks are not finite")
        background = self.cam_background if isinstance(self.model, CAMNet) else self.settings.background_power
        masks[0] = background_mask(self.model, masks, background)
        if labels is None:
            kept = probabilities >= self.settings.min_probability
        else:
            kept = torch.zeros_like(probabilities, dtype=torch.bool)
            kept[list(labels)] = True
        return SoftMasks(masks, probabilities, kept)


def choose_classes(soft: SoftMasks) -> NDArray[np.uint8]:
    """Return class indices [H, W]: the highest mask of every pixel among the background and the kept classes."""
    chosen = segment(soft.masks, soft.kept.to(soft.masks.dtype), min_probability=0.5)
    return chosen.to(torch.uint8).cpu().numpy()
