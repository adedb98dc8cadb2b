"""IoU, precision and recall per class, and the tables in which methods stand side by side."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torchmetrics.classification import MulticlassConfusionMatrix
from torchmetrics.functional.classification import multiclass_confusion_matrix

from .data import IGNORE, VOC_CLASSES

# The columns of Tables 5 and 6.
SHORT_NAMES = (
    "bg", "aero", "bike", "bird", "boat", "bot.", "bus", "car", "cat", "chair", "cow", "tab.", "dog", "horse", "mbk",
    "per.", "plant", "sheep", "sofa", "train", "tv",
)  # fmt: skip


class ClassMetrics(NamedTuple):
    """Per class in percent, NaN where there is nothing to divide by.

    `iou` is NaN for a class that is neither predicted nor there, `precision` for one that is not predicted and
    `recall` for one that is not there. A class that is predicted but not there has an IoU of 0, and that counts.
    """

    iou: Tensor
    precision: Tensor
    recall: Tensor


def class_metrics(confusion: Tensor) -> ClassMetrics:
    """Return the metrics of a confusion matrix: a row a true class, a column a predicted one."""
    matrix = confusion.double()
    right, there, predicted = matrix.diag(), matrix.sum(dim=1), matrix.sum(dim=0)
    return ClassMetrics(100 * right / (there + predicted - right), 100 * right / predicted, 100 * right / there)


def confusion_matrix(predicted: Tensor, target: Tensor, num_classes: int) -> Tensor:
    """Return the confusion matrix of class indices [H, W] and ground truth [H, W]; void pixels do not count."""
    return multiclass_confusion_matrix(predicted, target, num_classes, ignore_index=IGNORE, validate_args=False)


class IoUMeter:
    """Accumulates a confusion matrix over masks; void pixels do not count."""

    def __init__(self, num_classes: int) -> None:
        self.confusion = MulticlassConfusionMatrix(num_classes, ignore_index=IGNORE, validate_args=False)

    def update(self, predicted: Tensor, target: Tensor) -> None:
        """Add one image: class indices [H, W] and ground truth [H, W]."""
        self.confusion.update(predicted[None], target[None])

    def iou(self) -> Tensor:
        """Return the IoU per class in percent, NaN for a class that is neither predicted nor there."""
        return class_metrics(self.confusion.compute()).iou


def mean_iou(iou: Tensor, rows: Sequence[int] | None = None) -> float:
    """Return the mean over `rows` (all by default); classes without a pixel (NaN) do not count."""
    return (iou if rows is None else iou[list(rows)]).nanmean().item()


def iou_table(classes: Sequence[str], columns: Mapping[str, Tensor], rows: Sequence[int] | None = None) -> str:
    """Return a Markdown table: a line a class, a column a method, the mean over `rows` (all by default) last."""
    shown = range(len(classes)) if rows is None else rows
    lines = [["class", *columns]]
    lines += [[classes[row], *(f"{iou[row]:.1f}" for iou in columns.values())] for row in shown]
    means = (f"**{mean_iou(iou, shown):.1f}**" for iou in columns.values())
    return markdown([*lines, [f"**mean of {len(shown)}**", *means]])


def method_table(classes: Sequence[str], methods: Mapping[str, Tensor], rows: Sequence[int] | None = None) -> str:
    """Return a Markdown table in the layout of Tables 5 and 6: a line a method, a column a class, the mean last."""
    return markdown(method_lines(classes, methods, rows, digits=1))


def method_lines(
    classes: Sequence[str], methods: Mapping[str, Tensor], rows: Sequence[int] | None, digits: int
) -> list[list[str]]:
    """Return the cells of `method_table`; VOC's classes have their short names there, others their own."""
    names = SHORT_NAMES if tuple(classes) == ("background", *VOC_CLASSES) else classes
    shown = range(len(classes)) if rows is None else rows
    lines = [["Method", *(names[row] for row in shown), "mean"]]
    for name, iou in methods.items():
        cells = [*(iou[row].item() for row in shown), mean_iou(iou, shown)]
        lines.append([name, *(f"{cell:.{digits}f}" for cell in cells)])
    return lines


def markdown(lines: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table of a header and lines; the first column is text, the others are numbers."""
    header, *others = ["| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |" for line in lines]
    return "\n".join([header, "|:--|" + "--:|" * (len(lines[0]) - 1), *others])


def save_method_csv(
    path: Path, classes: Sequence[str], methods: Mapping[str, Tensor], rows: Sequence[int] | None = None
) -> None:
    """Write what `method_table` shows, with more digits."""
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(method_lines(classes, methods, rows, digits=4))


def save_iou_csv(path: Path, classes: Sequence[str], columns: Mapping[str, Tensor]) -> None:
    """Write the IoU per class of every method."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["class", *columns])
        for row, name in enumerate(classes):
            writer.writerow([name, *(f"{iou[row]:.4f}" for iou in columns.values())])


def load_iou_csv(path: Path) -> tuple[tuple[str, ...], dict[str, Tensor]]:
    """Read what `save_iou_csv` wrote."""
    with path.open(newline="", encoding="utf-8") as file:
        header, *lines = csv.reader(file)
    columns = {
        name: torch.tensor([float(line[i]) for line in lines], dtype=torch.float64)
        for i, name in enumerate(header[1:], start=1)
    }
    return tuple(line[0] for line in lines), columns
