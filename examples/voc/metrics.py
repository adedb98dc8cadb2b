"""Intersection over union per class, and the table in which methods stand side by side."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torchmetrics.classification import MulticlassConfusionMatrix

from .data import IGNORE


class IoUMeter:
    """Accumulates a confusion matrix over masks; void pixels do not count."""

    def __init__(self, num_classes: int) -> None:
        self.confusion = MulticlassConfusionMatrix(num_classes, ignore_index=IGNORE, validate_args=False)

    def update(self, predicted: Tensor, target: Tensor) -> None:
        """Add one image: class indices [H, W] and ground truth [H, W]."""
        self.confusion.update(predicted[None], target[None])

    def iou(self) -> Tensor:
        """Return the IoU per class in percent, NaN for a class that is neither predicted nor there."""
        matrix = self.confusion.compute().double()
        intersection = matrix.diag()
        union = matrix.sum(dim=0) + matrix.sum(dim=1) - intersection
        return 100 * intersection / union


def mean_iou(iou: Tensor, rows: Sequence[int] | None = None) -> float:
    """Return the mean over `rows` (all by default); classes without a pixel (NaN) do not count."""
    return (iou if rows is None else iou[list(rows)]).nanmean().item()


def iou_table(classes: Sequence[str], columns: Mapping[str, Tensor], rows: Sequence[int] | None = None) -> str:
    """Return a Markdown table: a line a class, a column a method, the mean over `rows` (all by default) last."""
    shown = range(len(classes)) if rows is None else rows
    lines = ["| class | " + " | ".join(columns) + " |", "|:--|" + "--:|" * len(columns)]
    for row in shown:
        lines.append(f"| {classes[row]} | " + " | ".join(f"{iou[row]:.1f}" for iou in columns.values()) + " |")
    means = " | ".join(f"**{mean_iou(iou, shown):.1f}**" for iou in columns.values())
    return "\n".join([*lines, f"| **mean of {len(shown)}** | {means} |"])


def save_iou_csv(path: Path, classes: Sequence[str], columns: Mapping[str, Tensor]) -> None:
    """Write the IoU per class of every method."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["class", *columns])
        for row, name in enumerate(classes):
            writer.writerow([name, *(f"{iou[row]:.4f}" for iou in columns.values())])


def load_iou_csv(path: Path) -> tuple[tuple[str, ...], dict[str, Tensor]]:
    """Read what `save_iou_csv` wrote."""
    with path.open(newline="") as file:
        header, *lines = csv.reader(file)
    columns = {
        name: torch.tensor([float(line[i]) for line in lines], dtype=torch.float64)
        for i, name in enumerate(header[1:], start=1)
    }
    return tuple(line[0] for line in lines), columns
