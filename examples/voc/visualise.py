"""Pictures of a run: curves of loss and mean IoU, and masks over images."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

from .dataset.images import IGNORE, voc_palette


def overlay(image: Tensor, mask: Tensor, opacity: float = 0.6) -> NDArray[np.float64]:
    """Paint a mask [H, W] in VOC's colours over an image [3, H, W] in [0, 1]; background is not painted."""
    pixels = image.permute(1, 2, 0).double().numpy()
    index = mask.numpy()
    colours = voc_palette()[index] / 255.0
    alpha = np.where(index == 0, 0.0, np.where(index == IGNORE, 0.85, opacity))[..., None]
    return (1 - alpha) * pixels + alpha * colours


def overlay_figure(images: Sequence[Tensor], columns: Mapping[str, Sequence[Tensor]]) -> Figure:
    """Draw one row per image: the image itself, then one overlay per column."""
    height_over_width = [image.shape[1] / image.shape[2] for image in images]
    figure = Figure(figsize=(2.4 * (1 + len(columns)), 2.4 * sum(height_over_width) + 0.3), layout="constrained")
    axes = figure.subplots(len(images), 1 + len(columns), squeeze=False, height_ratios=height_over_width)
    for row, image in enumerate(images):
        pictures = {"image": image.permute(1, 2, 0).numpy()}
        pictures |= {title: overlay(image, masks[row]) for title, masks in columns.items()}
        for axis, (title, picture) in zip(axes[row], pictures.items(), strict=True):
            axis.imshow(picture)
            axis.set_axis_off()
            if row == 0:
                axis.set_title(title, fontsize=10)
    return figure


def save_curves(
    path: Path, histories: Mapping[str, Sequence[Mapping[str, float]]], classification_epochs: int | None
) -> None:
    """Draw loss and mean IoU over epochs, one line per method.

    A dashed line marks the start of self-supervision, after `classification_epochs`. None: there is no start.
    """
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    loss_axis, iou_axis = figure.subplots(1, 2)
    with mpl.rc_context({"lines.markersize": 3}):
        for name, history in histories.items():
            epochs = range(1, len(history) + 1)
            loss_axis.plot(epochs, [epoch["loss"] for epoch in history], "o-", label=name)
            iou_axis.plot(epochs, [epoch["miou"] for epoch in history], "o-", label=name)
    for axis, title in ((loss_axis, "training loss"), (iou_axis, "mean IoU, %")):
        if classification_epochs is not None:
            axis.axvline(classification_epochs + 0.5, color="grey", linestyle="--", linewidth=1)
        axis.set(xlabel="epoch", title=title)
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(path, dpi=110)
