"""The data sets of a training run."""

from typing import NamedTuple

from accelerate import Accelerator

from .dataset.layout import TRAINING_SPLITS, class_indices, read_classes, read_split
from .dataset.splits import VOCDataset, first_with_masks, load_split, load_split_with_masks
from .dataset.toy import toy_voc
from .settings import Settings


class TrainingData(NamedTuple):
    """Training images with labels or masks, test images with masks, and some training images with masks.

    The masks of `train_with_masks` are not used for training: pseudo labels are compared with them.
    """

    train: VOCDataset
    test: VOCDataset
    train_with_masks: VOCDataset


def load_training_data(settings: Settings, accelerator: Accelerator) -> TrainingData:
    """Find all files of the data set; without one, draw the toy data set first."""
    root = settings.data
    if root is None:
        with accelerator.main_process_first():
            root = toy_voc(settings.output / "data", seed=settings.seed)
    classes = read_classes(root)
    class_indices(settings.table_classes, ("background", *classes), source="--table-classes")  # may raise
    names = read_split(root, *TRAINING_SPLITS)
    if settings.supervision == "masks":
        train_split = load_split_with_masks(root, names, classes, settings.masks)
    else:
        train_split = load_split(root, names, classes, settings.labels)
    test_split = load_split_with_masks(root, read_split(root, "val"), classes)
    train_with_masks = first_with_masks(root, train_split, settings.curve_images)
    return TrainingData(VOCDataset(train_split), VOCDataset(test_split), VOCDataset(train_with_masks))
