"""The files around inference: images of any kind in, masks and overlays out, each written whole or not at all."""

import csv
import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from .data import (
    IMAGE_SUFFIXES,
    SPLIT_FOLDER,
    DataError,
    first_file,
    read_classes,
    read_lines,
    read_split,
    save_mask,
    to_rgb,
    turn_upright,
)
from .labels import find_labels, labels_from_file
from .visualise import overlay

SUFFIXES = (*IMAGE_SUFFIXES, ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff", ".webp")
# Pillow knows more, and goes by the content, not the suffix: for EPS it would start Ghostscript.
FORMATS = ("JPEG", "PNG", "BMP", "GIF", "PPM", "TIFF", "WEBP")

# How to turn a mask of the upright image back, where that is not the same turn again.
TURN_BACK = {
    Image.Transpose.ROTATE_270: Image.Transpose.ROTATE_90,
    Image.Transpose.ROTATE_90: Image.Transpose.ROTATE_270,
}


class Source(NamedTuple):
    """An image file, the name of its outputs, and its labels (class indices from 0) where they are needed."""

    name: str
    path: Path
    labels: frozenset[int] | None = None


class Picture(NamedTuple):
    """What the network sees of an image: `pixels` [H, W, 3], upright and perhaps reduced, and how it is stored."""

    pixels: NDArray[np.uint8]
    stored_size: tuple[int, int]
    upright: Image.Transpose | None

    def tensor(self) -> Tensor:
        """Return the pixels as [3, H, W] in [0, 1]."""
        return torch.from_numpy(self.pixels).permute(2, 0, 1).float() / 255

    def as_stored(self, mask: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Bring a mask of the pixels [H, W] to the pixel grid of the stored image."""
        image = Image.fromarray(mask)
        if self.upright is not None:
            image = image.transpose(TURN_BACK.get(self.upright, self.upright))
        if image.size != self.stored_size:
            image = image.resize(self.stored_size, Image.Resampling.NEAREST)
        return np.array(image)


def find_sources(path: Path) -> list[Source]:
    """Return an image file, or what has an image's suffix in a folder (but not below it), sorted by name."""
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
    """Return the images of a split; whether they are there and can be read is seen when they are read."""
    names = read_split(root, split)
    split_file = root / SPLIT_FOLDER / f"{split}.txt"
    for line in read_lines(split_file):
        if ".." in line.replace("\\", "/").split()[0].split("/"):
            raise DataError(f"split {split_file}: {line.split()[0]!r} leads out of the data set")
    for name in names:
        if Path(name).name != name or "\\" in name:  # as it may on Windows, where / is not the only separator
            raise DataError(f"split {split_file}: {name!r} is no name of a file")
    candidates = [[root / "JPEGImages" / f"{name}{suffix}" for suffix in IMAGE_SUFFIXES] for name in names]
    return [Source(name, first_file(paths) or paths[0]) for name, paths in zip(names, candidates, strict=True)]


def add_labels(
    sources: Sequence[Source], classes: Sequence[str], root: Path | None, labels_file: Path | None
) -> list[Source]:
    """Give every image its labels: from a file, else as training finds them in the data set at `root`."""
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
    """Return the images whose outputs would overwrite those of an earlier one, and that one.

    Names that differ in case only are the same file on some systems.
    """
    first: dict[str, Path] = {}
    for source in sources:
        first.setdefault(source.name.casefold(), source.path)
    earlier = {source.path: first[source.name.casefold()] for source in sources}
    return {path: other for path, other in earlier.items() if path != other}


def read_picture(path: Path, max_pixels: int) -> Picture:
    """Read an image of any size and mode.

    It is turned upright by its EXIF orientation, and reduced where it has more than `max_pixels` pixels. Transparency
    is dropped, as in training; of 16-bit images the upper 8 bits are seen; of several frames, the first.

    Raises:
        DataError: what `path` leads to is no image, is damaged, or has so many pixels (179 million) that Pillow takes
            it for a decompression bomb.
    """
    if not path.is_file():  # to open a pipe would wait for ever
        raise DataError("is a folder" if path.is_dir() else "not found" if not path.exists() else "is no regular file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd metadata, and of sizes that are below the limit
            with Image.open(path, formats=FORMATS) as image:
                image.load()
                upright = turn_upright(image)
                rgb, size = to_rgb(image), image.size
    except DataError:
        raise
    except UnidentifiedImageError as error:
        raise DataError(f"no image of a known format ({', '.join(FORMATS)})") from error
    except Exception as error:  # Pillow raises nearly anything for a damaged file
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error) or repr(error)
        raise DataError(f"cannot be read: {reason.splitlines()[0]}") from error
    reduced = reduced_size(size, max_pixels)
    if reduced != size:
        rgb = rgb.resize(reduced, Image.Resampling.BILINEAR)
    if upright is not None:
        rgb = rgb.transpose(upright)
    return Picture(np.array(rgb), size, upright)


def reduced_size(size: tuple[int, int], max_pixels: int) -> tuple[int, int]:
    """Return a size of at most `max_pixels` pixels, of about the same shape; one that is small enough stays."""
    width, height = size
    factor = min(1.0, (max_pixels / (width * height)) ** 0.5)
    width, height = max(1, round(width * factor)), max(1, round(height * factor))
    width = max(1, min(width, max_pixels // height))  # of a line of pixels, only the length can shrink
    return width, min(height, max_pixels // width)


def write_outputs(folder: Path, name: str, picture: Picture, mask: NDArray[np.uint8], with_overlay: bool) -> None:
    """Write masks/NAME.png and, if wanted, overlays/NAME.jpg, which shows what the network saw."""
    if with_overlay:
        painted = overlay(picture.tensor(), torch.from_numpy(mask).long())
        image = Image.fromarray((255 * painted).round().astype(np.uint8))
        write_whole(folder / "overlays" / f"{name}.jpg", lambda path: image.save(path, quality=90))
    stored = picture.as_stored(mask)
    write_whole(folder / "masks" / f"{name}.png", lambda path: save_mask(path, stored))


def write_scores(path: Path, classes: Sequence[str], scores: Iterable[tuple[str, Sequence[float]]]) -> None:
    """Write a line an image, the probability of each class in its columns."""

    def write(partial: Path) -> None:
        # Names of files need not be text; they are written as the bytes that they are.
        with partial.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
            writer = csv.writer(file)
            writer.writerow(["image", *classes])
            writer.writerows([name, *(f"{score:.6f}" for score in values)] for name, values in scores)

    write_whole(path, write)


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` write a file beside `path`, and rename it: nobody ever sees half of it at `path`."""
    partial = path.with_name(f".partial_{os.getpid()}{path.suffix}")
    try:
        write(partial)
        os.replace(partial, path)
    except OSError as error:
        raise OSError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        partial.unlink(missing_ok=True)
