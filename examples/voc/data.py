"""Files of a data set in Pascal VOC's layout: names, images, masks; what is wrong is a DataError of one line."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from PIL.ExifTags import Base
from torch import Tensor

VOC_CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog",
    "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip
IGNORE = 255
IMAGE_ERRORS = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)  # what Pillow raises for bad files
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")
# How to turn an image upright, by its EXIF orientation.
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
MASK_FOLDERS = ("SegmentationClass", "SegmentationClassAug")
SPLIT_FOLDER = Path("ImageSets", "Segmentation")


class DataError(ValueError):
    """The data on disk is not what it should be; the message says what was looked for and where."""


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


def turn_upright(image: Image.Image) -> Image.Transpose | None:
    """Return how to turn an opened image as its camera was held; None where it is stored upright."""
    return TURNS.get(image.getexif().get(Base.Orientation, 1))


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image of any mode to 8-bit RGB."""
    if image.mode == "F":
        raise DataError("has floating-point pixels, whose range is unknown")
    if image.mode.startswith("I"):  # 16 bits, which older versions of Pillow hold in 32; convert() would clip them
        image = Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8))
    return image.convert("RGB")


def read_image(path: Path) -> Tensor:
    """Read an image as RGB [3, H, W] in [0, 1], turned upright."""
    try:
        with Image.open(path) as image:
            turn, rgb = turn_upright(image), to_rgb(image)
    except (DataError, *IMAGE_ERRORS) as error:
        raise DataError(f"cannot read image {path}: {error}") from error
    pixels = np.array(rgb if turn is None else rgb.transpose(turn))
    return torch.from_numpy(pixels).permute(2, 0, 1).float() / 255


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


def read_mask_upright(path: Path, image_path: Path) -> NDArray[np.uint8]:
    """Read the mask of an image, which lies on the pixels as stored, and turn it as `read_image` turns them."""
    mask = read_mask(path)
    with Image.open(image_path) as image:
        turn = turn_upright(image)
    return mask if turn is None else np.array(Image.fromarray(mask).transpose(turn))


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
