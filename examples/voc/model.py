"""The segmentation network (Figures 3 and 7 of the paper) and the CAM-GAP baseline; the losses are in losses.py."""

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wsseg_layers import GCI, FocalSizePenalty, StochasticGate, nGWPPool

from .aspp import ASPP, conv_bn_relu
from .backbones import Backbone, pretrained_backbone
from .settings import Settings

SKIP_CHANNELS = 48


class Output(NamedTuple):
    """The output of both networks: `class_scores` [B, C]; `masks` [B, C + 1, h, w], background first; `logits`.

    The logits are [B, C + 1, h, w]. Those of CAM-GAP are its activation [B, C, h, w], without a background.
    """

    class_scores: Tensor
    logits: Tensor
    masks: Tensor


def resize(x: Tensor, size: tuple[int, int] | torch.Size) -> Tensor:
    """Resize bilinearly, corners aligned, as everywhere inside the network."""
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=True)


class SingleStageNet(nn.Module):
    """Backbone, ASPP, skip from conv3, global cue injection, stochastic gate, decoder, nGWP and focal size penalty.

    Args:
        backbone: the pre-trained network.
        num_classes: the number of classes C, without background.
        channels: the width of ASPP and decoder.
        mixing_rate: psi of eq. 9 and 10.
        gate: draw the shallow features (eq. 9) or mix them (eq. 10) in training.
        gci: inject global cues into the shallow features (eq. 11).
        gci_norm: normalisation of the shallow features in GCI: "batch" as published, "instance" as printed in eq. 11.
        size_penalty: add the focal size penalty (eq. 5) to the class scores.
        penalty_power: p of eq. 5.
        penalty_lambda: lambda of eq. 5.
        skip_stride8: also fuse the backbone's features of stride 8 with the deep features, not only those of conv3.
        aspp_dilations: those of ASPP; None for the backbone's.
        aspp_image_pool: give ASPP the mean of the image.
    """

    def __init__(
        self,
        backbone: Backbone,
        num_classes: int,
        channels: int = 256,
        mixing_rate: float = 0.3,
        gate: Literal["stochastic", "deterministic"] = "stochastic",
        gci: bool = True,
        gci_norm: Literal["batch", "instance"] = "batch",
        size_penalty: bool = True,
        penalty_power: float = 3.0,
        penalty_lambda: float = 0.01,
        skip_stride8: bool = False,
        aspp_dilations: tuple[int, int, int] | None = None,
        aspp_image_pool: bool = True,
    ) -> None:
        super().__init__()
        if skip_stride8 and backbone.stride8_channels is None:
            raise ValueError(f"--skip-stride8 needs an EfficientNet-Lite backbone, got {type(backbone).__name__}")
        self.backbone = backbone
        self.aspp = ASPP(backbone.conv6_channels, channels, aspp_dilations or backbone.aspp_dilations, aspp_image_pool)
        self.skip = conv_bn_relu(backbone.conv3_channels, SKIP_CHANNELS, 1)
        self.skip_stride8 = None
        skip_channels = SKIP_CHANNELS
        if skip_stride8 and backbone.stride8_channels is not None:
            self.skip_stride8 = conv_bn_relu(backbone.stride8_channels, SKIP_CHANNELS, 1)
            skip_channels += SKIP_CHANNELS
        self.fuse = conv_bn_relu(channels + skip_channels, channels, 3)
        self.gci = (
            GCI(channels, shallow_channels=backbone.conv3_channels, norm=gci_norm)
            if gci
            else NoCues(backbone.conv3_channels, channels)
        )
        self.gate = StochasticGate(mixing_rate, gate)
        self.decoder = nn.Sequential(
            conv_bn_relu(channels, channels, 3),
            nn.Dropout(0.5),
            conv_bn_relu(channels, channels, 3),
            nn.Dropout(0.1),
            nn.Conv2d(channels, num_classes, 1),
        )
        self.pool = nGWPPool()
        self.size_penalty = FocalSizePenalty(penalty_power, penalty_lambda) if size_penalty else None
        initialise(self.new_modules())

    def new_modules(self) -> list[nn.Module]:
        """Return the parts that start from random weights."""
        modules = [self.aspp, self.skip, self.fuse, self.gci, self.decoder]
        return modules if self.skip_stride8 is None else [*modules, self.skip_stride8]

    def frozen_norms(self) -> list[nn.Module]:
        """Return the parts whose BatchNorm statistics are not updated in training."""
        return [self.backbone, self.aspp]

    def forward(self, image: Tensor) -> Output:
        """Return class scores, and masks at the resolution of conv3, of a normalised image [B, 3, H, W]."""
        if self.skip_stride8 is None:
            conv3, conv6 = self.backbone(image)
            skips = [self.skip(conv3)]
        else:
            conv3, stride8, conv6 = self.backbone.features(image)
            skips = [self.skip(conv3), resize(self.skip_stride8(stride8), conv3.shape[-2:])]
        deep = resize(self.aspp(conv6), conv3.shape[-2:])
        deep = self.fuse(torch.cat([deep, *skips], dim=1))  # x^(d) of eq. 9
        shallow = self.gci(conv3, deep)  # x^(s)*, eq. 11
        scores = self.decoder(self.gate(deep, shallow))  # y_{c,i,j}; the gate is eq. 9 in training, eq. 10 else
        background = torch.ones_like(scores[:, :1])  # y_0 = 1 everywhere (appendix B.1)
        logits = torch.cat([background, scores], dim=1)
        masks = logits.softmax(dim=1)  # m_{c,i,j} (appendix B.1)
        foreground = masks[:, 1:]
        class_scores = self.pool(scores, foreground)  # eq. 14 (eq. 3)
        if self.size_penalty is not None:
            class_scores = class_scores + self.size_penalty(foreground)  # eq. 13; the penalty is eq. 15 and 16 (eq. 5)
        return Output(class_scores, logits, masks)


class NoCues(nn.Module):
    """The replacement of GCI in its ablation (Table 1c): a 1x1 convolution of the shallow features."""

    def __init__(self, shallow_channels: int, channels: int) -> None:
        super().__init__()
        self.project = conv_bn_relu(shallow_channels, channels, 1)

    def forward(self, shallow: Tensor, _deep: Tensor) -> Tensor:
        """Map [B, shallow_channels, h, w] to [B, channels, h, w]; the deep features have no effect."""
        return self.project(shallow)


class CAMNet(nn.Module):
    """The CAM-GAP baseline: eq. 1 for the class scores, eq. 2 for the masks."""

    background = 0.1  # constant background score of the authors' baseline; a class must exceed it

    def __init__(self, backbone: Backbone, num_classes: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.dropout = nn.Dropout2d(0.5)
        self.classifier = nn.Conv2d(backbone.conv6_channels, num_classes, 1, bias=False)
        initialise(self.new_modules())

    def new_modules(self) -> list[nn.Module]:
        """Return the parts that start from random weights."""
        return [self.classifier]

    def frozen_norms(self) -> list[nn.Module]:
        """Return the parts whose BatchNorm statistics are not updated in training."""
        return [self.backbone]

    def forward(self, image: Tensor) -> Output:
        """Return class scores and activation maps, at the resolution of conv6, of a normalised image [B, 3, H, W]."""
        _, conv6 = self.backbone(image)
        activation = self.classifier(self.dropout(conv6))  # sum over k of a_{c,k} x_{k,i,j}
        class_scores = activation.mean(dim=(2, 3))  # eq. 1
        cam = activation.relu()  # eq. 2
        cam = cam / (cam.amax(dim=(2, 3), keepdim=True) + 1e-5)
        masks = torch.cat([torch.full_like(cam[:, :1], self.background), cam], dim=1)
        return Output(class_scores, activation, masks)


Network = SingleStageNet | CAMNet


def build_model(settings: Settings, num_classes: int, backbone: Backbone | None = None) -> Network:
    """Build the network that the settings describe, on a backbone with ImageNet weights unless one is given."""
    if backbone is None:
        backbone = pretrained_backbone(settings.backbone, settings.weights)
    if settings.model == "cam":
        return CAMNet(backbone, num_classes)
    return SingleStageNet(
        backbone,
        num_classes,
        channels=settings.channels,
        mixing_rate=settings.mixing_rate,
        gate=settings.gate,
        gci=settings.gci,
        gci_norm=settings.gci_norm,
        size_penalty=settings.size_penalty,
        penalty_power=settings.penalty_power,
        penalty_lambda=settings.penalty_lambda,
        skip_stride8=settings.skip_stride8,
        aspp_dilations=settings.aspp_dilations,
        aspp_image_pool=settings.aspp_image_pool,
    )


def initialise(modules: list[nn.Module]) -> None:
    """Draw convolution weights as He et al. do for ReLU networks; biases start at zero."""
    for module in modules:
        for layer in module.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
