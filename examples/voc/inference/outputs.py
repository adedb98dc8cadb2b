"""The files that inference writes: masks, overlays and probabilities, each written whole or not at all."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from ..dataset.images import save_mask
from ..files.soft import SoftFile, save_soft
from ..files.whole import write_csv_whole, write_whole
from ..visualise import overlay
from .pictures import Picture
from .segmenter import SoftMasks


def write_mask(path: Path, picture: Picture, mask: NDArray[np.uint8]) -> None:
    """Write the mask of a picture as a palette PNG, on the pixel grid of the stored image."""
    stored = picture.as_stored(mask)
    write_whole(path, lambda partial: save_mask(partial, stored))


def write_overlay(path: Path, picture: Picture, mask: NDArray[np.uint8]) -> None:
    """Write the mask over the pixels that the network saw."""
    painted = overlay(picture.tensor(), torch.from_numpy(mask).long())
    image = Image.fromarray((255 * painted).round().astype(np.uint8))
    write_whole(path, lambda partial: image.save(partial, quality=90))


def write_soft(path: Path, picture: Picture, soft: SoftMasks) -> None:
    """Write the soft masks of a picture, on the pixel grid of the stored image."""
    masks = np.stack([picture.as_stored(mask) for mask in soft.masks.float().cpu().numpy()])  # [C + 1, H, W]
    save_soft(path, SoftFile(masks, soft.kept.cpu().numpy()))


def write_scores(path: Path, classes: Sequence[str], scores: Iterable[tuple[str, Sequence[float]]]) -> None:
    """Write one line per image, with the probability of each class in its columns."""
    lines = [[name, *(f"{score:.6f}" for score in values)] for name, values in scores]
    write_csv_whole(path, [["image", *classes], *lines])
