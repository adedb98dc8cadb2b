"""Image files of any kind, read for inference, and the inverse mapping from the network's pixels to the stored ones."""

import warnings
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from ..dataset.errors import DataError
from ..dataset.images import FORMATS, to_rgb, turn_upright

# The inverse of a turn, for turns that are not their own inverse.
TURN_BACK = {
    Image.Transpose.ROTATE_270: Image.Transpose.ROTATE_90,
    Image.Transpose.ROTATE_90: Image.Transpose.ROTATE_270,
}


Mask = TypeVar("Mask", np.uint8, np.float32)


class Picture(NamedTuple):
    """An image as the network sees it (`pixels` [H, W, 3], upright, perhaps reduced), its stored size, and its turn."""

    pixels: NDArray[np.uint8]
    stored_size: tuple[int, int]
    turn: Image.Transpose | None

    def tensor(self) -> Tensor:
        """Return the pixels as [3, H, W] in [0, 1]."""
        return torch.from_numpy(self.pixels).permute(2, 0, 1).float() / 255

    def as_stored(self, mask: NDArray[Mask]) -> NDArray[Mask]:
        """Bring a mask [H, W], of uint8 or float32, to the pixel grid of the stored image."""
        image = Image.fromarray(mask)
        if self.turn is not None:
            image = image.transpose(TURN_BACK.get(self.turn, self.turn))
        if image.size != self.stored_size:
            image = image.resize(self.stored_size, Image.Resampling.NEAREST)
        return np.array(image)


def read_picture(path: Path, max_pixels: int) -> Picture:
    """Read an image of any size and mode.

    It is turned upright by its EXIF orientation, and reduced if it has more than `max_pixels` pixels. Transparency is
    dropped, as in training. For 16-bit images, the upper 8 bits are used; for images with several frames, the first
    frame.

    Raises:
        DataError: `path` is not a regular file or not an image, is damaged, or has so many pixels (179 million) that
            Pillow takes it for a decompression bomb.
    """
    if not path.is_file():  # opening a pipe would wait forever
        raise DataError("is a folder" if path.is_dir() else "not found" if not path.exists() else "is no regular file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about odd metadata, and about sizes below the limit
            with Image.open(path, formats=FORMATS) as image:
                image.load()
                turn = turn_upright(image)
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
    if turn is not None:
        rgb = rgb.transpose(turn)
    return Picture(np.array(rgb), size, turn)


def reduced_size(size: tuple[int, int], max_pixels: int) -> tuple[int, int]:
    """Return a size of at most `max_pixels` pixels and about the same shape; a smaller size is returned as it is."""
    width, height = size
    factor = min(1.0, (max_pixels / (width * height)) ** 0.5)
    width, height = max(1, round(width * factor)), max(1, round(height * factor))
    width = max(1, min(width, max_pixels // height))  # for an image of one row or column, only its length can shrink
    return width, min(height, max_pixels // width)
