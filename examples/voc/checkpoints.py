"""Checkpoints: written whole or not at all, read without executing anything."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from .backbones import build_backbone
from .model import SingleStageNet
from .settings import Settings


def save_checkpoint(path: Path, model: SingleStageNet, settings: Settings, classes: Sequence[str], epoch: int) -> None:
    """Write the model and what is needed to build it again. An older file at `path` survives a failed write."""
    checkpoint: dict[str, Any] = {
        "model": model.state_dict(),
        "settings": settings.to_json(),
        "classes": list(classes),
        "epoch": epoch,
    }
    partial = path.with_name(path.name + ".partial")
    torch.save(checkpoint, partial)
    os.replace(partial, path)


def load_model(path: Path) -> tuple[SingleStageNet, tuple[str, ...]]:
    """Build the model of a checkpoint, in eval mode, and return it with its class names."""
    checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    settings = checkpoint["settings"]
    classes = tuple(checkpoint["classes"])
    backbone = build_backbone(settings["backbone"], pretrained=False)
    model = SingleStageNet(backbone, len(classes), settings["channels"], settings["mixing_rate"])
    model.load_state_dict(checkpoint["model"])
    return model.eval(), classes
