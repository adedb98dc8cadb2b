"""Atrous spatial pyramid pooling, whose dilations may be as large as the map."""

from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Convolutions with a smaller share of products inside the map run as `conv_by_taps`. Their forward and backward passes
# then take between 4 % more and 89 % less time (AMD EPYC, family 25, model 17, AVX2).
MAX_SHARE = 0.6


class WideConv2d(nn.Conv2d):
    """Convolution without bias that keeps the size, for kernels that may be as wide as the map.

    Such a kernel reads mostly the padding. On a map of 21 x 21 and with dilation 24, only its centre reads the map. A
    CPU leaves out the products with the padding where this takes less time.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, dilation: int = 1) -> None:
        padding = dilation * (kernel_size // 2)
        super().__init__(in_channels, out_channels, kernel_size, padding=padding, dilation=dilation, bias=False)

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Convolve, on a CPU by taps if this saves enough."""
        dilation = self.dilation[0]
        if input.is_cpu and share_inside(input.shape[-2:], self.kernel_size[0], dilation) < MAX_SHARE:
            return conv_by_taps(input, weight, dilation)
        return super()._conv_forward(input, weight, bias)


def share_inside(size: torch.Size, kernel_size: int, dilation: int) -> float:
    """Return the share of a convolution's products that are not with the padding, for maps of the size (H, W)."""
    share = 1.0
    for side in size:
        products = sum(max(0, side - abs(offset) * dilation) for offset in offsets(kernel_size))
        share *= products / (side * kernel_size)
    return share


def offsets(kernel_size: int) -> range:
    """Return the offsets of the taps of a kernel in one dimension, before dilation: -1, 0, 1 for 3."""
    return range(-(kernel_size // 2), kernel_size // 2 + 1)


def conv_by_taps(x: Tensor, weight: Tensor, dilation: int) -> Tensor:
    """Return `F.conv2d` with this dilation and padding that keeps the size, as a sum of 1x1 convolutions.

    Each tap of the kernel is a 1x1 convolution of the pixels that it reads inside the map.

    Args:
        x: [B, C, H, W].
        weight: [K, C, k, k], k odd.
        dilation: that of the convolution.

    Returns:
        [B, K, H, W].
    """
    height, width = x.shape[-2:]
    shifts = [dilation * offset for offset in offsets(weight.shape[-1])]
    taps = dict(zip(product(shifts, shifts), weight.flatten(2).unbind(2), strict=True))  # k * k of [K, C]
    out = F.conv2d(x, taps.pop((0, 0))[:, :, None, None])
    for (down, right), tap in taps.items():
        if abs(down) < height and abs(right) < width:
            read = x[:, :, inside(height, down), inside(width, right)]
            written = out[:, :, inside(height, -down), inside(width, -right)]
            written += F.conv2d(read, tap[:, :, None, None])
    return out


def inside(side: int, shift: int) -> slice:
    """Return the positions that stay inside a side when they are moved back by a shift, which is less than the side."""
    return slice(max(0, shift), side + min(0, shift))


def conv_bn_relu(in_channels: int, out_channels: int, kernel_size: int, dilation: int = 1) -> nn.Sequential:
    """Return convolution (same size), BatchNorm, ReLU."""
    return nn.Sequential(
        WideConv2d(in_channels, out_channels, kernel_size, dilation),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(inplace=True),
    )


class ASPP(nn.Module):
    """Atrous spatial pyramid pooling: 1x1, three dilated 3x3 and the image's mean, joined by a 1x1 convolution.

    Args:
        in_channels: the channels of the backbone's last features.
        out_channels: the channels of every branch, and of the result.
        dilations: those of the 3x3 convolutions.
        image_pool: use the mean of the image.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        dilations: tuple[int, ...] = (12, 24, 36),
        image_pool: bool = True,
    ) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            [conv_bn_relu(in_channels, out_channels, 1)]
            + [conv_bn_relu(in_channels, out_channels, 3, dilation) for dilation in dilations]
        )
        self.image_pool = None
        if image_pool:
            self.image_pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), conv_bn_relu(in_channels, out_channels, 1))
        self.project = nn.Sequential(
            conv_bn_relu(out_channels * (len(dilations) + 1 + image_pool), out_channels, 1),
            nn.Dropout(0.5),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, in_channels, h, w] to [B, out_channels, h, w]."""
        features = [branch(x) for branch in self.branches]
        if self.image_pool is not None:
            features.append(self.image_pool(x).expand(-1, -1, *x.shape[-2:]))  # [B, out_channels, h, w]
        return self.project(torch.cat(features, dim=1))
