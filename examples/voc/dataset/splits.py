"""A split of a data set in Pascal VOC's layout, whose files are checked before training starts, and its samples."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from .errors import DataError
from .images import FORMATS, read_image, read_mask_upright, turn_upright
from .labels import find_labels, labels_from_masks
from .layout import MASK_FOLDERS, find_images, find_masks, first_file


class Sample(NamedTuple):
    """One image: `image` [3, H, W] in [0, 1], `labels` [C] in {0, 1}, `mask` [H, W] (255 = void) or empty."""

    name: str
    image: Tensor
    labels: Tensor
    mask: Tensor


@dataclass(frozen=True)
class VOCSplit:
    """The files of one split. `masks` is empty if no ground truth is needed; `labels` holds class indices from 0."""

    classes: tuple[str, ...]
    names: tuple[str, ...]
    images: tuple[Path, ...]
    labels: tuple[frozenset[int], ...]
    masks: tuple[Path, ...] = ()

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.names)

    def first(self, count: int) -> "VOCSplit":
        """Return the split of the first `count` images."""
        return VOCSplit(self.classes, self.names[:count], self.images[:count], self.labels[:count], self.masks[:count])


class VOCDataset(Dataset[Sample]):
    """Reads the images of a split, without augmentation."""

    def __init__(self, split: VOCSplit) -> None:
        self.split = split

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.split)

    def __getitem__(self, index: int) -> Sample:
        """Read one image with its labels and, where the split has masks, its mask."""
        split = self.split
        labels = torch.zeros(len(split.classes))
        labels[list(split.labels[index])] = 1
        image = read_image(split.images[index])
        mask = np.empty((0, 0), np.uint8)
        if split.masks:
            mask = read_mask_upright(split.masks[index], split.images[index])
        return Sample(split.names[index], image, labels, torch.from_numpy(mask).long())


def load_split(root: Path, names: Sequence[str], classes: Sequence[str], labels_file: Path | None = None) -> VOCSplit:
    """Find the images and image-level labels of a training split."""
    images = find_images(root, names)
    return VOCSplit(tuple(classes), tuple(names), images, find_labels(root, names, classes, labels_file))


def load_split_with_masks(
    root: Path, names: Sequence[str], classes: Sequence[str], folder: Path | None = None
) -> VOCSplit:
    """Find the images of a split and their masks, in `folder` if one is given; its labels are those of the masks."""
    images, masks = find_images(root, names), find_masks(root, names, folder)
    labels = check_masks(images, masks, classes)
    return VOCSplit(tuple(classes), tuple(names), images, labels, masks)


def check_masks(images: Sequence[Path], masks: Sequence[Path], classes: Sequence[str]) -> tuple[frozenset[int], ...]:
    """Refuse masks with unknown classes or of another size than their images. Return the classes of every mask."""
    labels = labels_from_masks(masks, classes)
    for image, mask in zip(images, masks, strict=True):
        with Image.open(image, formats=FORMATS) as opened_image, Image.open(mask, formats=FORMATS) as opened_mask:
            if opened_image.size != opened_mask.size:
                as_stored = "" if turn_upright(opened_image) is None else " as stored, before its EXIF orientation"
                raise DataError(
                    f"mask {mask} is {opened_mask.size[0]}x{opened_mask.size[1]}, "
                    f"but its image {image} is {opened_image.size[0]}x{opened_image.size[1]}{as_stored}"
                )
    return labels


def first_with_masks(root: Path, split: VOCSplit, count: int) -> VOCSplit:
    """Return the first `count` images of a training split that have a mask in the data set, with their labels."""
    indices: list[int] = []
    masks: list[Path] = []
    for index, name in enumerate(split.names):
        if len(indices) == count:
            break
        mask = first_file([root / folder / f"{name}.png" for folder in MASK_FOLDERS])
        if mask is not None:
            indices.append(index)
            masks.append(mask)
    check_masks([split.images[index] for index in indices], masks, split.classes)
    return VOCSplit(
        split.classes,
        tuple(split.names[index] for index in indices),
        tuple(split.images[index] for index in indices),
        tuple(split.labels[index] for index in indices),
        tuple(masks),
    )
