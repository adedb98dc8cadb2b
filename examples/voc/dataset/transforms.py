"""Training augmentation (section 4.1), on kornia."""

import kornia.augmentation as K
from torch import Tensor, nn


class TrainTransform(nn.Module):
    """Random resized crop with 0.9 to 1 of the image's area, horizontal flip, colour jitter."""

    def __init__(self, crop_size: int) -> None:
        super().__init__()
        self.augment = K.AugmentationSequential(
            K.RandomResizedCrop((crop_size, crop_size), scale=(0.9, 1.0)),
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
