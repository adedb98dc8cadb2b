"""Training augmentation (section 4.1) and normalisation, on kornia."""

import kornia.augmentation as K
from torch import Tensor, nn


class TrainTransform(nn.Module):
    """Random resized crop with 0.9 to 1 of the image's area, horizontal flip, colour jitter; [3, H, W] in [0, 1]."""

    def __init__(self, crop_size: int) -> None:
        super().__init__()
        self.augment = K.AugmentationSequential(
            K.RandomResizedCrop((crop_size, crop_size), scale=(0.9, 1.0)),
            K.RandomHorizontalFlip(),
            K.ColorJitter(0.3, 0.3, 0.3, 0.1),
        )

    def forward(self, image: Tensor) -> Tensor:
        """Return the augmented image [3, crop_size, crop_size]."""
        return self.augment(image[None])[0]
