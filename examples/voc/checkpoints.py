"""Checkpoints: written whole or not at all, read without executing anything."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .archives import load_tensors
from .backbones import Backbone, build_backbone, pretrained_backbone
from .model import CAMNet, SingleStageNet
from .settings import Settings

Network = SingleStageNet | CAMNet


class CheckpointError(ValueError):
    """A checkpoint is missing, damaged or of another kind; the message says which file."""


class Trained(NamedTuple):
    """A trained network in eval mode, the names of its classes (without background), and how it was trained."""

    model: Network
    classes: tuple[str, ...]
    settings: Settings


def build_model(settings: Settings, num_classes: int, backbone: Backbone | None = None) -> Network:
    """Build the network that the settings describe, on a backbone with ImageNet weights unless one is given."""
    if backbone is None:
        backbone = pretrained_backbone(settings.backbone, settings.weights)
    if settings.model == "cam":
        return CAMNet(backbone, num_classes)
    return SingleStageNet(
        backbone,
        num_classes,
        settings.channels,
        settings.mixing_rate,
        settings.gate,
        settings.gci,
        settings.penalty_power,
        settings.penalty_weight,
    )


def save_checkpoint(
    path: Path, model: Network, settings: Settings, classes: Sequence[str], progress: Mapping[str, Any]
) -> None:
    """Write the model, what is needed to build it again, and the training's progress.

    An older file at `path` survives a write that fails or is cut off.
    """
    checkpoint = {
        "model": model.state_dict(),
        "settings": settings.to_json(),
        "classes": list(classes),
        "progress": dict(progress),
    }
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except (OSError, RuntimeError) as error:
        partial.unlink(missing_ok=True)
        reason = str(error).splitlines()[0]
        if isinstance(error, RuntimeError):  # what torch.save makes of a disk that fills up while it writes
            reason = f"is the disk full? ({reason})"
        raise OSError(f"cannot write checkpoint {path}: {reason}") from error


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read what `save_checkpoint` wrote."""
    if not path.is_file():
        raise CheckpointError(f"checkpoint not found: {path}")
    try:
        checkpoint = load_tensors(path)
    except ValueError as error:
        raise CheckpointError(f"cannot read checkpoint {path}: {error}") from error
    missing = {"model", "settings", "classes", "progress"} - set(checkpoint if isinstance(checkpoint, dict) else ())
    if missing:
        raise CheckpointError(f"{path} is no checkpoint of train_voc.py: it has no {', '.join(sorted(missing))}")
    return checkpoint


def load_trained(path: Path) -> Trained:
    """Build the network of a checkpoint, in eval mode."""
    checkpoint = read_checkpoint(path)
    try:
        settings = Settings.from_json(checkpoint["settings"])
        classes = tuple(checkpoint["classes"])
        model = build_model(settings, len(classes), build_backbone(settings.backbone))
        model.load_state_dict(checkpoint["model"])
    except (TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{path} does not fit this version: {str(error).splitlines()[0]}") from error
    return Trained(model.eval(), classes, settings)
