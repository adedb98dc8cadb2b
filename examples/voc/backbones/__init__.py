"""Backbones: image in; `conv3` (stride 4, for the skip and the shallow features) and `conv6` (deepest) out."""

from .base import Backbone
from .efficientnet_lite import EfficientNetLite0

__all__ = ["Backbone", "EfficientNetLite0", "build_backbone"]

BACKBONES = {"efficientnet_lite0": EfficientNetLite0}


def build_backbone(name: str, pretrained: bool = True) -> Backbone:
    """Build a backbone by its name, with ImageNet weights unless `pretrained` is False."""
    if name not in BACKBONES:
        raise ValueError(f"unknown backbone {name!r}: expected one of {', '.join(BACKBONES)}")
    return BACKBONES[name](pretrained=pretrained)
