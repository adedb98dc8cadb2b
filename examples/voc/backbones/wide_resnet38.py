"""WideResNet-38 (Wu et al., "Wider or Deeper", 2016) with dilations instead of its last strides: output stride 8.

The module names (`conv1a`, `b2.conv_branch2a`, ...) are those of the published files of weights.
"""

from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor, nn

from .base import Backbone

# (name, blocks, middle channels, output channels, stride, dilation of the very first convolution, of the others)
STAGES = (
    ("b2", 3, 128, 128, 2, 1, 1),
    ("b3", 3, 256, 256, 2, 1, 1),
    ("b4", 6, 512, 512, 2, 1, 1),
    ("b5", 3, 512, 1024, 1, 1, 2),
)
CONV3_BLOCK = "b3_2"


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions, each after BatchNorm and ReLU; the shortcut is the raw input where shapes agree."""

    def __init__(
        self, in_channels: int, mid_channels: int, out_channels: int, stride: int, first_dilation: int, dilation: int
    ) -> None:
        super().__init__()
        self.bn_branch2a = nn.BatchNorm2d(in_channels)
        self.conv_branch2a = conv3x3(in_channels, mid_channels, stride, first_dilation)
        self.bn_branch2b1 = nn.BatchNorm2d(mid_channels)
        self.conv_branch2b1 = conv3x3(mid_channels, out_channels, 1, dilation)
        self.projects = in_channels != out_channels or stride != 1
        if self.projects:
            self.conv_branch1 = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the features of the next block."""
        activated = F.relu(self.bn_branch2a(x))
        shortcut = self.conv_branch1(activated) if self.projects else x
        out = self.conv_branch2a(activated)
        return shortcut + self.conv_branch2b1(F.relu(self.bn_branch2b1(out)))


class Bottleneck(nn.Module):
    """1x1, dilated 3x3 and 1x1 convolutions, each after BatchNorm and ReLU, the last two also after dropout."""

    def __init__(self, in_channels: int, out_channels: int, dilation: int, dropout: float) -> None:
        super().__init__()
        self.bn_branch2a = nn.BatchNorm2d(in_channels)
        self.conv_branch2a = nn.Conv2d(in_channels, out_channels // 4, 1, bias=False)
        self.bn_branch2b1 = nn.BatchNorm2d(out_channels // 4)
        self.conv_branch2b1 = conv3x3(out_channels // 4, out_channels // 2, 1, dilation)
        self.bn_branch2b2 = nn.BatchNorm2d(out_channels // 2)
        self.conv_branch2b2 = nn.Conv2d(out_channels // 2, out_channels, 1, bias=False)
        self.conv_branch1 = nn.Conv2d(in_channels, out_channels, 1, bias=False)
        self.dropout = nn.Dropout2d(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Return the features of the next block."""
        activated = F.relu(self.bn_branch2a(x))
        out = self.conv_branch2a(activated)
        out = self.conv_branch2b1(self.dropout(F.relu(self.bn_branch2b1(out))))
        out = self.conv_branch2b2(self.dropout(F.relu(self.bn_branch2b2(out))))
        return self.conv_branch1(activated) + out


class WideResNet38(Backbone):
    """WideResNet-38; conv3 is the last block at stride 4, conv6 the 4096 normalised channels at stride 8."""

    conv3_channels = 256
    conv6_channels = 4096
    weights_file = "ilsvrc-cls_rna-a1_cls1000_ep-0001.pth, from the authors' page of the paper"

    def __init__(self) -> None:
        super().__init__()
        self.conv1a = conv3x3(3, 64, 1, 1)
        channels = 64
        self.block_names = []
        for name, count, mid_channels, out_channels, first_stride, first_dilation, dilation in STAGES:
            for index in range(count):
                first = index == 0
                block = ResidualBlock(
                    channels,
                    mid_channels,
                    out_channels,
                    first_stride if first else 1,
                    first_dilation if first else dilation,
                    dilation,
                )
                self.block_names.append(name if first else f"{name}_{index}")
                self.add_module(self.block_names[-1], block)
                channels = out_channels
        self.b6 = Bottleneck(1024, 2048, dilation=4, dropout=0.3)
        self.b7 = Bottleneck(2048, 4096, dilation=4, dropout=0.5)
        self.bn7 = nn.BatchNorm2d(4096)

    def frozen_modules(self) -> list[nn.Module]:
        """Return the layers before stride 4."""
        return [self.conv1a, *(self.get_submodule(name) for name in self.block_names if name.startswith("b2"))]

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Return (conv3 [B, 256, H/4, W/4], conv6 [B, 4096, H/8, W/8]) of a normalised image [B, 3, H, W]."""
        x = self.conv1a(image)
        for name in self.block_names:
            x = self.get_submodule(name)(x)
            if name == CONV3_BLOCK:
                conv3 = x
        return conv3, F.relu(self.bn7(self.b7(self.b6(x))))

    def rename_weights(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Leave out the ImageNet classifier."""
        return {key: value for key, value in weights.items() if not key.startswith(("linear1000.", "fc8."))}


def conv3x3(in_channels: int, out_channels: int, stride: int, dilation: int) -> nn.Conv2d:
    """Return a 3x3 convolution that keeps the size, up to its stride."""
    return nn.Conv2d(in_channels, out_channels, 3, stride, padding=dilation, dilation=dilation, bias=False)
