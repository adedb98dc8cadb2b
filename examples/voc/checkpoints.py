"""Checkpoints. Writing is atomic, and reading executes no code from the file."""

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .backbones import build_backbone
from .files.tensors import load_tensors
from .files.whole import write_whole
from .model import Network, build_model
from .settings import Settings

HELD_OUT_LOSS = "held-out loss"  # in the history of a training with --checkpoint best


class CheckpointError(ValueError):
    """A checkpoint is missing, damaged or of another kind; the message names the file."""


class Trained(NamedTuple):
    """A trained network in eval mode, the names of its classes (without background), and its settings."""

    model: Network
    classes: tuple[str, ...]
    settings: Settings


def save_checkpoint(
    path: Path, model: Network, settings: Settings, classes: Sequence[str], progress: Mapping[str, Any]
) -> None:
    """Write the weights, the settings and classes that build the network again, and the training's progress.

    If writing fails or is cut off, an older file at `path` stays as it was.
    """
    checkpoint = {
        "model": model.state_dict(),
        "settings": settings.to_json(),
        "classes": list(classes),
        "progress": dict(progress),
    }

    def write(partial: Path) -> None:
        with partial.open("wb") as file:
            try:
                torch.save(checkpoint, file)
            except RuntimeError as error:  # raised by torch.save when the disk becomes full
                raise OSError(f"is the disk full? ({str(error).splitlines()[0]})") from error
            file.flush()
            os.fsync(file.fileno())

    write_whole(path, write)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read the dictionary that `save_checkpoint` wrote."""
    if not path.is_file():
        raise CheckpointError(f"checkpoint not found: {path}")
    try:
        checkpoint = load_tensors(path)
    except ValueError as error:
        raise CheckpointError(f"cannot read checkpoint {path}: {error}") from error
    missing = {"model", "settings", "classes", "progress"} - set(checkpoint if isinstance(checkpoint, dict) else ())
    if missing:
        raise CheckpointError(f"{path} is not a checkpoint of train_voc.py: it has no {', '.join(sorted(missing))}")
    for key in ("model", "settings", "progress"):
        if not isinstance(checkpoint[key], Mapping):
            raise CheckpointError(
                f"{path} is not a checkpoint of train_voc.py: {key} is a {type(checkpoint[key]).__name__}"
            )
    return checkpoint


def best_epoch(history: Sequence[Mapping[str, float]]) -> int | None:
    """Return the epoch with the lowest held-out loss, counted from 1, or None if no epoch has one."""
    losses = {epoch: figures.get(HELD_OUT_LOSS, math.inf) for epoch, figures in enumerate(history, start=1)}
    best = min(losses, key=lambda epoch: losses[epoch], default=None)
    return None if best is None or losses[best] == math.inf else best


def best_checkpoint(last: Path, history: Sequence[Mapping[str, float]]) -> Path | None:
    """Return the checkpoint of the best epoch of a run, or None if no epoch has a held-out loss.

    Args:
        last: the path of the run's last checkpoint.
        history: the figures of every epoch of the run.
    """
    best = best_epoch(history)
    if best is None:
        return None
    # `_best` is of a later epoch if the run was resumed from an earlier one.
    for suffix in ("_best", f"_{best:03d}"):
        path = last.with_name(f"{last.stem}{suffix}.pt")
        if path.is_file() and len(read_checkpoint(path)["progress"].get("history", ())) == best:
            return path
    raise CheckpointError(f"no checkpoint of epoch {best}, the best one of this run: looked for {path}")


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
