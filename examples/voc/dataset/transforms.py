"""Training augmentation (section 4.1), on kornia."""

from typing import Any

import kornia.augmentation as K
import torch.nn.functional as F
from kornia.constants import Resample
from torch import Tensor, nn


class RandomResizedCrop(K.RandomResizedCrop):
    """Kornia's, but images are resized with antialiasing, as in torchvision: small crops are noisy without it."""

    def apply_transform(
        self,
        input: Tensor,
        params: dict[str, Tensor],
        flags: dict[str, Any],
        transform: Tensor | None = None,  # noqa: ARG002  # kornia passes it
    ) -> Tensor:
        """Crop and resize one image or mask [1, C, H, W]."""
        (left, top), _, (right, bottom), _ = params["src"][0].long().tolist()  # the corners, clockwise
        crop = input[..., top : bottom + 1, left : right + 1]
        if flags["resample"] == Resample.NEAREST:  # a mask
            return F.interpolate(crop, flags["size"], mode="nearest-exact")
        return F.interpolate(crop, flags["size"], mode="bilinear", antialias=True)


class TrainTransform(nn.Module):
    """Random resized crop with 0.9 to 1 of the image's area, horizontal flip, colour jitter."""

    def __init__(self, crop_size: int) -> None:
        super().__init__()
        self.augment = K.AugmentationSequential(
            RandomResizedCrop((crop_size, crop_size), scale=(0.9, 1.0), cropping_mode="slice"),
            K.RandomHorizontalFlip(),
            K.ColorJitter(0.3, 0.3, 0.3, 0.1),
        )

    def forward(self, image: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Return the augmented image [3, crop, crop] in [0, 1] and its mask [crop, crop]; an empty mask stays empty."""
        if mask.numel() == 0:
            return self.augment(image[None])[0], mask
        keys = ["input", "mask"]
        image, classes = self.augment(image[None], mask[None, None].to(image.dtype), data_keys=keys)
        return image[0], classes[0, 0].round().to(mask.dtype)
