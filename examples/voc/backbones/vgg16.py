"""VGG16 (Simonyan and Zisserman, 2015) as in DeepLab: output stride 8, its fully connected layers as convolutions."""

from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor, nn

from .base import Backbone

# (convolutions, output channels, dilation, stride of the pooling before it)
STAGES = ((2, 64, 1, 1), (2, 128, 1, 2), (3, 256, 1, 2), (3, 512, 1, 2), (3, 512, 2, 1))
CONV3_STAGE = 3
FC_CHANNELS = 1024


class VGG16(Backbone):
    """VGG16 without its classifier; conv3 is conv3_3 (stride 4), conv6 is fc7 (1024 channels, stride 8)."""

    conv3_channels = 256
    conv6_channels = FC_CHANNELS
    weights_file = "vgg16_20M.pth, from the authors' page of the paper, or torchvision's vgg16-397923af.pth"

    def __init__(self) -> None:
        super().__init__()
        in_channels = 3
        for stage, (count, channels, dilation, _) in enumerate(STAGES, start=1):
            for index in range(1, count + 1):
                conv = nn.Conv2d(in_channels, channels, 3, padding=dilation, dilation=dilation)
                self.add_module(f"conv{stage}_{index}", conv)
                in_channels = channels
        self.fc6 = nn.Conv2d(in_channels, FC_CHANNELS, 3, padding=1)
        self.dropout = nn.Dropout2d(0.5)
        self.fc7 = nn.Conv2d(FC_CHANNELS, FC_CHANNELS, 1)

    def frozen_modules(self) -> list[nn.Module]:
        """Return the layers at full resolution."""
        return [self.get_submodule("conv1_1"), self.get_submodule("conv1_2")]

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Return (conv3 [B, 256, H/4, W/4], conv6 [B, 1024, H/8, W/8]) of a normalised image [B, 3, H, W]."""
        x = image
        for stage, (count, _, _, pool_stride) in enumerate(STAGES, start=1):
            if stage > 1:
                x = F.max_pool2d(x, 3, pool_stride, padding=1)
            for index in range(1, count + 1):
                x = F.relu(self.get_submodule(f"conv{stage}_{index}")(x))
            if stage == CONV3_STAGE:
                conv3 = x
        return conv3, F.relu(self.fc7(self.dropout(F.relu(self.fc6(x)))))

    def rename_weights(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Accept torchvision's names too; every fourth unit of its larger fully connected layers is kept."""
        if "features.0.weight" not in weights:
            return {key: value for key, value in weights.items() if not key.startswith("fc8.")}
        renamed = {}
        position = 0
        for stage, (count, *_) in enumerate(STAGES, start=1):
            for index in range(1, count + 1):
                for kind in ("weight", "bias"):
                    renamed[f"conv{stage}_{index}.{kind}"] = weights[f"features.{position}.{kind}"]
                position += 2  # the ReLU is numbered too
            position += 1  # and so is the pooling
        # DeepLab's decimation: 4096 units over 7x7 positions become 1024 over 3x3.
        renamed["fc6.weight"] = weights["classifier.0.weight"].reshape(4096, 512, 7, 7)[::4, :, ::3, ::3]
        renamed["fc6.bias"] = weights["classifier.0.bias"][::4]
        renamed["fc7.weight"] = weights["classifier.3.weight"][::4, ::4, None, None]
        renamed["fc7.bias"] = weights["classifier.3.bias"][::4]
        return renamed
