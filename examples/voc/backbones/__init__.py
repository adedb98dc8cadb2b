"""Backbones: from an image to `conv3` (stride 4, for the skip and the shallow features) and `conv6` (deepest)."""

from pathlib import Path

from .base import Backbone, WeightsError, load_strictly, normalise, read_state_dict, unwrap_state_dict
from .efficientnet_lite import EfficientNetLite, EfficientNetLite0, EfficientNetLite1, EfficientNetLite2
from .resnet import ResNet50, ResNet101
from .vgg16 import VGG16
from .wide_resnet38 import WideResNet38

__all__ = [
    "BACKBONES",
    "VGG16",
    "Backbone",
    "EfficientNetLite",
    "EfficientNetLite0",
    "EfficientNetLite1",
    "EfficientNetLite2",
    "ResNet50",
    "ResNet101",
    "WeightsError",
    "WideResNet38",
    "build_backbone",
    "load_strictly",
    "normalise",
    "pretrained_backbone",
    "read_state_dict",
    "unwrap_state_dict",
]

BACKBONES: dict[str, type[Backbone]] = {
    "efficientnet_lite0": EfficientNetLite0,
    "efficientnet_lite1": EfficientNetLite1,
    "efficientnet_lite2": EfficientNetLite2,
    "wide_resnet38": WideResNet38,
    "vgg16": VGG16,
    "resnet50": ResNet50,
    "resnet101": ResNet101,
}


def build_backbone(name: str) -> Backbone:
    """Build a backbone by its name, with random weights."""
    if name not in BACKBONES:
        raise ValueError(f"unknown backbone {name!r}: expected one of {', '.join(BACKBONES)}")
    return BACKBONES[name]()


def pretrained_backbone(name: str, weights: Path | None = None) -> Backbone:
    """Build a backbone with ImageNet weights: those in a file, or those of a pip package."""
    backbone = build_backbone(name)
    if weights is not None:
        backbone.load_weights(weights)
    elif isinstance(backbone, EfficientNetLite):
        backbone.load_packaged_weights()
    else:
        raise WeightsError(
            f"--backbone {name} needs --weights FILE, a file of ImageNet weights: usually {backbone.weights_file}"
        )
    return backbone
