"""Image-level labels: from a file, from VOC's annotations, or from masks."""

import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from .errors import DataError
from .images import IGNORE, read_mask
from .layout import class_indices, find_masks, read_lines


def find_labels(
    root: Path,
    names: Sequence[str],
    classes: Sequence[str],
    labels_file: Path | None = None,
    masks_folder: Path | None = None,
) -> tuple[frozenset[int], ...]:
    """Return the classes (indices from 0) of every image.

    They come from `labels_file` if one is given, else from `Annotations/*.xml` if that folder exists, else from the
    masks.
    """
    if labels_file is not None:
        return labels_from_file(labels_file, names, classes)
    if (root / "Annotations").is_dir():
        return labels_from_annotations(root / "Annotations", names, classes)
    try:
        masks = find_masks(root, names, masks_folder)
    except DataError as error:
        raise DataError(f"no image-level labels: {error} (or give --labels FILE)") from error
    return labels_from_masks(masks, classes)


def labels_from_file(path: Path, names: Sequence[str], classes: Sequence[str]) -> tuple[frozenset[int], ...]:
    """Read lines `id class class ...`; every name must have one."""
    if not path.is_file():
        raise DataError(f"labels file not found: {path}")
    labels = {}
    for number, line in enumerate(read_lines(path), start=1):
        name, *present = line.split()
        if name in labels:
            raise DataError(f"{path} has two lines for image {name!r}: expected one line with all of its classes")
        labels[name] = frozenset(class_indices(present, classes, source=f"{path}, entry {number}"))
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
        except (ElementTree.ParseError, LookupError, OSError, ValueError) as error:  # e.g. an unknown encoding
            raise DataError(f"cannot read annotation {path}: {error}") from error
        present = [(element.text or "").strip() for element in root.iterfind("object/name")]
        labels.append(frozenset(class_indices(present, classes, source=str(path))))
    return tuple(labels)


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
