"""The images to segment: a file, a folder, or a split of a data set, with labels if they are needed."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ..dataset.errors import DataError
from ..dataset.labels import find_labels, labels_from_file
from ..dataset.layout import (
    IMAGE_SUFFIXES,
    SPLIT_FOLDER,
    first_file,
    image_candidates,
    read_classes,
    read_lines,
    read_split,
)

SUFFIXES = (*IMAGE_SUFFIXES, ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff", ".webp")


class Source(NamedTuple):
    """An image file, the name of its outputs, and its labels (class indices from 0) if they are needed."""

    name: str
    path: Path
    labels: frozenset[int] | None = None


def find_sources(path: Path) -> list[Source]:
    """Return one image file, or the files of a folder (not of folders in it) with an image's suffix, sorted by name."""
    if not path.is_dir():
        if not path.exists():
            raise DataError(f"input not found: {path}")
        return [Source(path.stem, path)]
    files = sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES)
    if not files:
        hint = "; for a data set in VOC's layout give --split" if (path / "JPEGImages").is_dir() else ""
        raise DataError(f"no image in {path}: looked for {', '.join(SUFFIXES)}{hint}")
    return [Source(file.stem, file) for file in files]


def split_sources(root: Path, split: str) -> list[Source]:
    """Return the images of a split; a missing image is reported later, when it is read."""
    names = read_split(root, split)
    split_file = root / SPLIT_FOLDER / f"{split}.txt"
    for line in read_lines(split_file):
        if ".." in line.replace("\\", "/").split()[0].split("/"):
            raise DataError(f"split {split_file}: {line.split()[0]!r} leads out of the data set")
    for name in names:
        if Path(name).name != name or "\\" in name:  # on Windows, / is not the only separator
            raise DataError(f"split {split_file}: {name!r} is not the name of a file")
    candidates = [image_candidates(root, name) for name in names]
    return [Source(name, first_file(paths) or paths[0]) for name, paths in zip(names, candidates, strict=True)]


def add_labels(
    sources: Sequence[Source], classes: Sequence[str], root: Path | None, labels_file: Path | None
) -> list[Source]:
    """Give every image its labels: from a file, else from the data set at `root`, as in training."""
    names = [source.name for source in sources]
    if root is not None and read_classes(root) != tuple(classes):
        raise DataError(f"the checkpoint's classes are not those of {root}: {', '.join(classes)}")
    if root is not None:
        labels = find_labels(root, names, classes, labels_file)
    elif labels_file is not None:
        labels = labels_from_file(labels_file, names, classes)
    else:
        raise DataError("--clean needs image-level labels: give --labels FILE, or a data set with --split")
    return [source._replace(labels=present) for source, present in zip(sources, labels, strict=True)]


def name_clashes(sources: Sequence[Source]) -> dict[Path, Path]:
    """Return each image whose outputs would overwrite those of an earlier image, with the earlier image.

    Names that differ only in case are the same file on some systems.
    """
    first: dict[str, Path] = {}
    for source in sources:
        first.setdefault(source.name.casefold(), source.path)
    earlier = {source.path: first[source.name.casefold()] for source in sources}
    return {path: other for path, other in earlier.items() if path != other}
