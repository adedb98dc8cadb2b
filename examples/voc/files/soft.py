"""Files of soft masks: the masks of an image before a class is chosen for every pixel."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class SoftFile(NamedTuple):
    """Masks [C + 1, H, W], background first, and whether each of the C classes was kept."""

    masks: NDArray[np.float32]
    kept: NDArray[np.bool_]


def save_soft(path: Path, soft: SoftFile) -> None:
    """Write soft masks as a compressed NumPy archive."""
    with path.open("wb") as file:
        np.savez_compressed(file, masks=soft.masks, kept=soft.kept)


def load_soft(path: Path) -> SoftFile:
    """Read a file of `save_soft`.

    Raises:
        ValueError: the file is damaged or holds something else; with the reason, in one line.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            masks, kept = archive["masks"], archive["kept"]
    except Exception as error:  # zip, zlib and NumPy raise errors of no common type
        reason = str(error).strip() or type(error).__name__
        raise ValueError(f"cannot read soft masks {path}: {reason.splitlines()[0]}") from error
    if masks.ndim != 3 or masks.dtype != np.float32 or kept.dtype != np.bool_ or kept.shape != (len(masks) - 1,):
        raise ValueError(f"{path} is not a file of soft masks: expected masks [C + 1, H, W] and kept [C]")
    if not np.isfinite(masks).all():
        raise ValueError(f"{path} holds masks that are not finite")
    return SoftFile(masks, kept)


def classes_among(soft: SoftFile, present: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """Return class indices [H, W]: for every pixel the highest mask of the background and the present classes."""
    masks = soft.masks.copy()
    masks[1:][~present] = 0
    return masks.argmax(axis=0).astype(np.uint8)
