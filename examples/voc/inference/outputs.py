"""The files that inference writes: masks, overlays and probabilities."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from ..dataset.errors import DataError
from ..dataset.images import save_mask
from ..files.soft import SoftFile, save_soft
from ..files.whole import Write, write_csv_whole, write_together
from ..visualise import overlay
from .claims import CLAIMS, Claim, claim_outputs
from .pictures import Picture
from .records import Record, image_key, read_record
from .segmenter import SoftMasks, choose_classes
from .sources import Source

SUFFIXES = {"overlays": ".jpg", "soft": ".npz"}
JPEG_SIDE = 65_500  # the longest side of a JPEG


class Outputs:
    """The files of every image in one folder: masks/NAME.png, and those of the other folders.

    Args:
        folder: the output folder, which contains one folder per kind of file.
        kinds: names of these folders: "masks", and optionally "soft", "overlays" and the name of a refinement.
        values: the values that the outputs depend on: the network and the arguments.
    """

    def __init__(self, folder: Path, kinds: Sequence[str], values: Mapping[str, Any]) -> None:
        self.folder = folder
        self.paths = {kind: folder / kind for kind in kinds}
        self.values = values

    def make_folders(self) -> None:
        """Create the missing folders."""
        for path in (*self.paths.values(), self.folder / CLAIMS):
            path.mkdir(parents=True, exist_ok=True)

    def claim(self, source: Source) -> Claim | None:
        """Return the right to write the outputs of an image, or None if another process has it."""
        return claim_outputs(self.folder, source.name)

    def find(self, source: Source, key: str) -> Sequence[float] | None:
        """Return the probabilities of an image if its outputs exist and have this key, otherwise None."""
        record = read_record(self.file("masks", source))
        if record is None or record.key != key:
            return None
        return record.probabilities if all(self.file(kind, source).is_file() for kind in self.paths) else None

    def write(
        self, source: Source, key: str, picture: Picture, soft: SoftMasks, refined: NDArray[np.uint8] | None
    ) -> None:
        """Write the files of one image, which had this key when it was read. If its mask exists, the others do too."""
        masks = [mask for mask in (choose_classes(soft), refined) if mask is not None]
        record = Record(key, soft.probabilities.tolist())
        writers = {
            "masks": mask_writer(picture, masks[0], record.text()),
            "overlays": overlay_writer(picture, masks),
            "soft": soft_writer(picture, soft),
        }
        refined_writer = mask_writer(picture, masks[-1])
        write_together({self.file(kind, source): writers.get(kind, refined_writer) for kind in reversed(self.paths)})

    def file(self, kind: str, source: Source) -> Path:
        """Return the path of an output."""
        return self.paths[kind] / f"{source.name}{SUFFIXES.get(kind, '.png')}"

    def key(self, source: Source) -> str:
        """Return the key that the record of an image's mask must have.

        Raises:
            DataError: there is no such image.
        """
        try:
            return image_key(self.values, source.path, source.labels)
        except OSError as error:
            missing = isinstance(error, FileNotFoundError)
            raise DataError("not found" if missing else error.strerror or str(error)) from error


def mask_writer(picture: Picture, mask: NDArray[np.uint8], text: Mapping[str, str] | None = None) -> Write:
    """Return a function that writes the mask as a palette PNG, of the size of the stored image, with `text` in it."""
    return lambda path: save_mask(path, picture.as_stored(mask), text)


def overlay_writer(picture: Picture, masks: Sequence[NDArray[np.uint8]]) -> Write:
    """Return a function that writes the masks over the pixels that the network saw.

    They are side by side, or one below the other for wide images.
    """

    def write(path: Path) -> None:
        painted = [overlay(picture.tensor(), torch.from_numpy(mask).long()) for mask in masks]  # each [H, W, 3]
        height, width = masks[0].shape
        pixels = np.concatenate(painted, axis=0 if width > height else 1)
        image = Image.fromarray((255 * pixels).round().astype(np.uint8))
        image.thumbnail((JPEG_SIDE, JPEG_SIDE))  # does nothing to smaller images
        image.save(path, quality=90)

    return write


def soft_writer(picture: Picture, soft: SoftMasks) -> Write:
    """Return a function that writes the soft masks, of the size of the stored image."""

    def write(path: Path) -> None:
        masks = np.stack([picture.as_stored(mask) for mask in soft.masks.float().cpu().numpy()])  # [C + 1, H, W]
        save_soft(path, SoftFile(masks, soft.kept.cpu().numpy()))

    return write


def write_scores(path: Path, classes: Sequence[str], scores: Iterable[tuple[str, Sequence[float]]]) -> None:
    """Write one line per image, with the probability of each class in its columns."""
    lines = [[name, *(f"{score:.6f}" for score in values)] for name, values in scores]
    write_csv_whole(path, [["image", *classes], *lines])
