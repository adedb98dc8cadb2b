"""IoU, precision and recall per class, from a confusion matrix."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torchmetrics.classification import MulticlassConfusionMatrix
from torchmetrics.functional.classification import multiclass_confusion_matrix

from ..dataset.images import IGNORE


class ClassMetrics(NamedTuple):
    """IoU, precision and recall per class in percent; NaN stands for 0 / 0.

    `iou` is NaN for a class that is neither in the predictions nor in the ground truth, `precision` for a class that is
    not predicted, and `recall` for a class that is not in the ground truth. A class that is predicted but not in the
    ground truth has an IoU of 0, which counts in the mean.
    """

    iou: Tensor
    precision: Tensor
    recall: Tensor


def class_metrics(confusion: Tensor) -> ClassMetrics:
    """Return the metrics of a confusion matrix: one row per true class, one column per predicted class."""
    matrix = confusion.double()
    correct, actual, predicted = matrix.diag(), matrix.sum(dim=1), matrix.sum(dim=0)
    union = actual + predicted - correct
    return ClassMetrics(100 * correct / union, 100 * correct / predicted, 100 * correct / actual)


def confusion_matrix(predicted: Tensor, target: Tensor, num_classes: int) -> Tensor:
    """Return the confusion matrix of class indices [H, W] and ground truth [H, W]; void pixels do not count."""
    return multiclass_confusion_matrix(predicted, target, num_classes, ignore_index=IGNORE, validate_args=False)


def average_precision(scores: Tensor, labels: Tensor) -> Tensor:
    """Return the average precision per class in percent: the sum over thresholds of precision times the gain in recall.

    Args:
        scores: [N, C], of N images.
        labels: [N, C] in {0, 1}.

    Returns:
        [C]; NaN for a class without a positive image.
    """
    values = []
    for score, label in zip(scores.double().T, labels.double().T, strict=True):
        order = score.argsort(descending=True)
        hits = label[order].cumsum(0)
        last_of_tie = torch.cat([score[order].diff() != 0, torch.ones(1, dtype=torch.bool, device=score.device)])
        hits, images = hits[last_of_tie], 1 + last_of_tie.nonzero().flatten()
        gained = hits.diff(prepend=hits.new_zeros(1))
        values.append((gained * hits / images).sum() / label.sum())
    return 100 * torch.stack(values)


class IoUMeter:
    """Accumulates a confusion matrix over masks; void pixels do not count."""

    def __init__(self, num_classes: int) -> None:
        self.confusion = MulticlassConfusionMatrix(num_classes, ignore_index=IGNORE, validate_args=False)

    def update(self, predicted: Tensor, target: Tensor) -> None:
        """Add one image: class indices [H, W] and ground truth [H, W]."""
        self.confusion.update(predicted[None], target[None])

    def iou(self) -> Tensor:
        """Return the IoU per class in percent, NaN for a class that is neither predicted nor in the ground truth."""
        return class_metrics(self.confusion.compute()).iou


def mean_iou(iou: Tensor, rows: Sequence[int] | None = None) -> float:
    """Return the mean over `rows` (all by default); classes without a pixel (NaN) do not count."""
    return (iou if rows is None else iou[list(rows)]).nanmean().item()
