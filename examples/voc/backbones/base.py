"""What the segmentation model needs to know about a backbone."""

from abc import ABC, abstractmethod

from torch import Tensor, nn


class Backbone(nn.Module, ABC):
    """A pre-trained network that returns `conv3` (stride 4: skip and shallow features) and `conv6` (its deepest)."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    conv3_channels: int
    conv6_channels: int
    aspp_dilations: tuple[int, int, int] = (12, 24, 36)

    @abstractmethod
    def frozen_modules(self) -> list[nn.Module]:
        """Return the first layers, whose pre-trained weights are not trained."""

    @abstractmethod
    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Return (conv3, conv6) of a normalised image [B, 3, H, W]."""
