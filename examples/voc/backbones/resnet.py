"""ResNet-50 and ResNet-101 (He et al., 2016) at output stride 16, with torchvision's module names."""

from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor, nn

from .base import Backbone
from .conv_norm import conv_norm

EXPANSION = 4


class Bottleneck(nn.Module):
    """1x1, 3x3 (with the stride) and 1x1 convolutions, each with BatchNorm, around a shortcut."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        out_channels = EXPANSION * channels
        self.conv1 = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = nn.Conv2d(channels, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.downsample: nn.Sequential | None = None
        if in_channels != out_channels or stride != 1:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        """Return the features of the next block."""
        out = F.relu(conv_norm(x, self.conv1, self.bn1), inplace=True)
        out = F.relu(conv_norm(out, self.conv2, self.bn2), inplace=True)
        out = conv_norm(out, self.conv3, self.bn3)
        out += x if self.downsample is None else conv_norm(x, *self.downsample)
        return F.relu(out, inplace=True)


class ResNet(Backbone):
    """ResNet with bottlenecks; conv3 is layer1 (stride 4), conv6 is layer4, which keeps the stride of 16."""

    conv3_channels = 256
    conv6_channels = 2048
    bias_lr_multiple = 1
    blocks: tuple[int, int, int, int]

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, 2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        in_channels = 64
        for layer, (count, channels, stride) in enumerate(
            zip(self.blocks, (64, 128, 256, 512), (1, 2, 2, 1), strict=True), start=1
        ):
            layers = []
            for index in range(count):
                layers.append(Bottleneck(in_channels, channels, stride if index == 0 else 1))
                in_channels = EXPANSION * channels
            self.add_module(f"layer{layer}", nn.Sequential(*layers))

    def frozen_modules(self) -> list[nn.Module]:
        """Return the layers at stride 2."""
        return [self.conv1, self.bn1]

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Return (conv3 [B, 256, H/4, W/4], conv6 [B, 2048, H/16, W/16]) of a normalised image [B, 3, H, W]."""
        x = F.relu(conv_norm(image, self.conv1, self.bn1), inplace=True)
        conv3 = self.get_submodule("layer1")(F.max_pool2d(x, 3, 2, padding=1))
        x = conv3
        for layer in ("layer2", "layer3", "layer4"):
            x = self.get_submodule(layer)(x)
        return conv3, x

    def rename_weights(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Leave out the ImageNet classifier."""
        return {key: value for key, value in weights.items() if not key.startswith("fc.")}


class ResNet50(ResNet):
    """ResNet-50, see `ResNet`."""

    blocks = (3, 4, 6, 3)
    weights_file = "resnet50-19c8e357.pth or resnet50-0676ba61.pth, from torchvision's download page"


class ResNet101(ResNet):
    """ResNet-101, see `ResNet`."""

    blocks = (3, 4, 23, 3)
    weights_file = "resnet101-5d3b4d8f.pth or resnet101-63fe2227.pth, from torchvision's download page"
