"""Pascal VOC in its own folder layout: splits, image-level labels, masks; all checked before training starts."""

import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

VOC_CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog",
    "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip
IGNORE = 255
IMAGE_ERRORS = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)  # what Pillow raises for bad files
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")
MASK_FOLDERS = ("SegmentationClass", "SegmentationClassAug")
SPLIT_FOLDER = Path("ImageSets", "Segmentation")


class DataError(ValueError):
    """The data on disk is not what it should be; the message says what was looked for and where."""


class Sample(NamedTuple):
    """One image: `image` [3, H, W] in [0, 1], `labels` [C] in {0, 1}, `mask` [H, W] (255 = void) or empty."""

    name: str
    image: Tensor
    labels: Tensor
    mask: Tensor


@dataclass(frozen=True)
class VOCSplit:
    """The files of one split. `masks` is empty where no ground truth is needed; `labels` holds class indices from 0."""

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
    """Reads a split as it is."""

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
        mask = read_mask(split.masks[index]) if split.masks else np.empty((0, 0), np.uint8)
        return Sample(split.names[index], read_image(split.images[index]), labels, torch.from_numpy(mask).long())


def load_split(root: Path, names: Sequence[str], classes: Sequence[str], labels_file: Path | None = None) -> VOCSplit:
    """Find the images and image-level labels of a training split.

    Labels come from `labels_file` where one is given, else from `Annotations/*.xml` where that folder exists,
    else from the masks.
    """
    images = find_images(root, names)
    if labels_file is not None:
        labels = labels_from_file(labels_file, names, classes)
    elif (root / "Annotations").is_dir():
        labels = labels_from_annotations(root / "Annotations", names, classes)
    else:
        labels = labels_from_masks(find_masks(root, names), classes)
    return VOCSplit(tuple(classes), tuple(names), images, labels)


def load_split_with_masks(
    root: Path, names: Sequence[str], classes: Sequence[str], folder: Path | None = None
) -> VOCSplit:
    """Find the images of a split and their masks, in `folder` if one is given; its labels are those of the masks."""
    images, masks = find_images(root, names), find_masks(root, names, folder)
    labels = labels_from_masks(masks, classes)
    for image, mask in zip(images, masks, strict=True):
        with Image.open(image) as opened_image, Image.open(mask) as opened_mask:
            if opened_image.size != opened_mask.size:
                raise DataError(
                    f"mask {mask} is {opened_mask.size[0]}x{opened_mask.size[1]}, "
                    f"but its image {image} is {opened_image.size[0]}x{opened_image.size[1]}"
                )
    return VOCSplit(tuple(classes), tuple(names), images, labels, masks)


def read_classes(root: Path) -> tuple[str, ...]:
    """Return the names in `root/classes.txt`, one a line, where there is such a file; else the 20 classes of VOC."""
    path = root / "classes.txt"
    if not path.is_file():
        return VOC_CLASSES
    classes = tuple(line.strip() for line in read_lines(path))
    if len(set(classes)) != len(classes) or any(" " in name for name in classes):
        raise DataError(f"{path}: class names must be unique and hold no space, got {', '.join(classes)}")
    if "background" in classes:
        raise DataError(f"{path}: 'background' is implied (index 0 of the masks) and must not be listed")
    return classes


def read_split(root: Path, *split_names: str) -> tuple[str, ...]:
    """Return the image names of the first split file that exists; a line may also be a path, as in SBD's lists."""
    if not root.is_dir():
        raise DataError(f"data folder not found: {root}")
    if not (root / "JPEGImages").is_dir():
        raise DataError(f"no folder JPEGImages in {root}: is it the root of a VOC data set (.../VOCdevkit/VOC2012)?")
    candidates = [root / SPLIT_FOLDER / f"{name}.txt" for name in split_names]
    path = first_file(candidates)
    if path is None:
        raise DataError(f"split not found: looked for {' and '.join(str(path) for path in candidates)}")
    names = tuple(image_name(line.split()[0]) for line in read_lines(path))
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise DataError(f"split {path} lists {twice!r} more than once")
    return names


def first_file(candidates: Sequence[Path]) -> Path | None:
    """Return the first of the paths at which there is a file."""
    return next((path for path in candidates if path.is_file()), None)


def image_name(entry: str) -> str:
    """Return the name in an entry of a split file: `2007_000032` or `/JPEGImages/2007_000032.jpg`."""
    name = entry.rsplit("/", maxsplit=1)[-1]
    return next((name[: -len(suffix)] for suffix in IMAGE_SUFFIXES if name.lower().endswith(suffix)), name)


def read_lines(path: Path) -> list[str]:
    """Return the lines of a text file that are not blank; a file without one is an error."""
    try:
        lines = [line for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {path}: {error}") from error
    if not lines:
        raise DataError(f"{path} is empty: expected one entry a line")
    return lines


def find_images(root: Path, names: Sequence[str]) -> tuple[Path, ...]:
    """Return the image files of `names`, each opened once to see that it is an image."""
    paths = []
    for name in names:
        candidates = [root / "JPEGImages" / f"{name}{suffix}" for suffix in IMAGE_SUFFIXES]
        path = first_file(candidates)
        if path is None:
            raise DataError(f"image not found: looked for {candidates[0]} (or {', '.join(IMAGE_SUFFIXES[1:])})")
        try:
            with Image.open(path):
                pass
        except IMAGE_ERRORS as error:
            raise DataError(f"cannot read image {path}: {error}") from error
        paths.append(path)
    return tuple(paths)


def find_masks(root: Path, names: Sequence[str], folder: Path | None = None) -> tuple[Path, ...]:
    """Return the mask files of `names`: in `folder`, or else VOC's own, or else that of the augmented set."""
    folders = [root / name for name in MASK_FOLDERS] if folder is None else [folder]
    if not any(path.is_dir() for path in folders):
        raise DataError(f"no masks: looked for a folder {' or '.join(map(str, folders))}")
    paths = []
    for name in names:
        candidates = [path / f"{name}.png" for path in folders]
        path = first_file(candidates)
        if path is None:
            raise DataError(f"mask not found: looked for {' and '.join(str(path) for path in candidates)}")
        paths.append(path)
    return tuple(paths)


def labels_from_file(path: Path, names: Sequence[str], classes: Sequence[str]) -> tuple[frozenset[int], ...]:
    """Read lines `id class class ...`; every name must have one."""
    if not path.is_file():
        raise DataError(f"labels file not found: {path}")
    labels = {}
    for number, line in enumerate(read_lines(path), start=1):
        name, *present = line.split()
        labels[name] = class_indices(present, classes, source=f"{path}, entry {number}")
    missing = [name for name in names if name not in labels]
    if missing:
        raise DataError(f"{path}: no line for image {missing[0]!r} ({len(missing)} such images)")
    return tuple(labels[name] for name in names)


def labels_from_annotations(folder: Path, names: Sequence[str], classes: Sequence[str]) -> tuple[frozenset[int], ...]:
    """Read the objects of VOC's XML annotations; every name must have one."""
    labels = []
    for name in names:
        path = folder / f"{name}.xml"
        if not path.is_file():
            raise DataError(f"annotation not found: looked for {path} (or give --labels FILE)")
        try:
            root = ElementTree.parse(path).getroot()
        except ElementTree.ParseError as error:
            raise DataError(f"cannot read annotation {path}: {error}") from error
        present = [(element.text or "").strip() for element in root.iterfind("object/name")]
        labels.append(class_indices(present, classes, source=str(path)))
    return tuple(labels)


def class_indices(present: Sequence[str], classes: Sequence[str], source: str) -> frozenset[int]:
    """Return the indices (from 0) of class names; `source` says in an error where an unknown one was read."""
    unknown = [name for name in present if name not in classes]
    if unknown:
        raise DataError(f"{source}: unknown class {unknown[0]!r}; known: {', '.join(classes)}")
    return frozenset(classes.index(name) for name in present)


def labels_from_masks(paths: Sequence[Path], classes: Sequence[str]) -> tuple[frozenset[int], ...]:
    """Return the classes that each mask holds."""
    labels = []
    for path in paths:
        values = set(np.unique(read_mask(path)).tolist()) - {0, IGNORE}
        unknown = [value for value in values if value > len(classes)]
        if unknown:
            raise DataError(f"{path}: unknown class index {unknown[0]}; known: 0 to {len(classes)}, {IGNORE} (void)")
        labels.append(frozenset(value - 1 for value in values))
    return tuple(labels)


def read_image(path: Path) -> Tensor:
    """Read an image as RGB [3, H, W] in [0, 1]."""
    try:
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB"))
    except IMAGE_ERRORS as error:
        raise DataError(f"cannot read image {path}: {error}") from error
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 255


def read_mask(path: Path) -> NDArray[np.uint8]:
    """Read a mask of class indices [H, W]: a palette or greyscale PNG."""
    try:
        with Image.open(path) as image:
            mode, mask = image.mode, np.array(image)
    except IMAGE_ERRORS as error:
        raise DataError(f"cannot read mask {path}: {error}") from error
    if mode not in ("P", "L"):
        raise DataError(f"mask {path} has mode {mode}: expected a palette or 8-bit greyscale PNG")
    return mask


def voc_palette() -> NDArray[np.uint8]:
    """Return VOC's 256 colours [256, 3]: the bits of the index, spread over R, G and B from the highest bit down."""
    index = np.arange(256)
    palette = np.zeros((256, 3), dtype=np.uint8)
    for bit in range(8):
        for channel in range(3):
            palette[:, channel] |= (((index >> (3 * bit + channel)) & 1) << (7 - bit)).astype(np.uint8)
    return palette


def save_mask(path: Path, mask: NDArray[np.uint8]) -> None:
    """Write a mask [H, W] as a palette PNG in VOC's colours."""
    image = Image.fromarray(mask)
    image.putpalette(voc_palette().tobytes())
    image.save(path)
