"""Images and masks: read in every mode that Pillow knows, turned upright; masks in VOC's colours."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from PIL.ExifTags import Base
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from .errors import DataError

IGNORE = 255  # void in the ground truth, "no label" in pseudo labels
# Pillow reads more formats, and detects them by the content, not the suffix: for EPS it would start Ghostscript.
FORMATS = ("JPEG", "PNG", "BMP", "GIF", "PPM", "TIFF", "WEBP")
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


def check_image(path: Path) -> None:
    """Read the header of an image file, to see that it is an image."""
    try:
        with Image.open(path, formats=FORMATS):
            pass
    except Exception as error:  # Pillow raises nearly anything for a damaged file
        raise DataError(f"cannot read image {path}: {error}") from error


def turn_upright(image: Image.Image) -> Image.Transpose | None:
    """Return the turn that brings an opened image upright; None where it is stored upright."""
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
        with Image.open(path, formats=FORMATS) as image:
            turn, rgb = turn_upright(image), to_rgb(image)
    except Exception as error:  # as above
        raise DataError(f"cannot read image {path}: {error}") from error
    pixels = np.array(rgb if turn is None else rgb.transpose(turn))  # [H, W, 3]
    return torch.from_numpy(pixels).permute(2, 0, 1).float() / 255


def read_mask(path: Path) -> NDArray[np.uint8]:
    """Read a mask of class indices [H, W] from a palette or greyscale PNG."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            mode, mask = image.mode, np.array(image)
    except Exception as error:  # as above
        raise DataError(f"cannot read mask {path}: {error}") from error
    if mode not in ("P", "L"):
        raise DataError(f"mask {path} has mode {mode}: expected a palette or 8-bit greyscale PNG")
    return mask


def read_mask_upright(path: Path, image_path: Path) -> NDArray[np.uint8]:
    """Read a mask, which is stored on the pixel grid of its image file, and turn it as `read_image` turns the image."""
    mask = read_mask(path)
    with Image.open(image_path, formats=FORMATS) as image:
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


def save_mask(path: Path, mask: NDArray[np.uint8], text: Mapping[str, str] | None = None) -> None:
    """Write a mask [H, W] as a palette PNG in VOC's colours, with `text` as its metadata."""
    image = Image.fromarray(mask)
    image.putpalette(voc_palette().tobytes())
    information = PngInfo()
    for key, value in (text or {}).items():
        information.add_text(key, value)
    image.save(path, format="PNG", pnginfo=information)
