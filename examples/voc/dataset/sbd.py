"""SBD, the Semantic Boundaries Dataset: with its masks, VOC's 1,464 training images become 10,582 ("train_aug")."""

import shutil
from collections.abc import Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy.io import loadmat
from tqdm import tqdm

from ..files.whole import write_text_whole, write_whole
from .errors import DataError
from .images import FORMATS, save_mask
from .layout import SPLIT_FOLDER, VOC_CLASSES, find_masks, first_file, read_names, read_split

KNOWN_COUNTS = {"VOC train": 1464, "VOC val": 1449, "SBD train": 8498, "SBD val": 2857, "train_aug": 10582}


@dataclass(frozen=True)
class AugmentedSet:
    """VOC and SBD together: their lists of images, and the files behind them."""

    voc: Path
    sbd: Path
    voc_train: tuple[str, ...]
    voc_val: tuple[str, ...]
    sbd_train: tuple[str, ...]
    sbd_val: tuple[str, ...]

    @property
    def train_aug(self) -> list[str]:
        """VOC's training images and all of SBD's, without VOC's validation images."""
        return sorted({*self.voc_train, *self.sbd_train, *self.sbd_val} - {*self.voc_val})

    @property
    def sbd_only(self) -> list[str]:
        """The images whose mask comes from SBD; if VOC has a mask too, VOC's is used, because it is more exact."""
        return sorted({*self.train_aug} - {*self.voc_train})

    def counts(self) -> dict[str, int]:
        """Return the number of images in every list, in the order of `KNOWN_COUNTS`."""
        lists = (self.voc_train, self.voc_val, self.sbd_train, self.sbd_val, self.train_aug)
        return {name: len(names) for name, names in zip(KNOWN_COUNTS, lists, strict=True)}

    def images(self) -> dict[str, Path]:
        """Return the file of every training and validation image: VOC's if there is one, else SBD's."""
        found = {}
        for name in (*self.train_aug, *self.voc_val):
            candidates = [folder / f"{name}.jpg" for folder in (self.voc / "JPEGImages", self.sbd / "img")]
            path = first_file(candidates)
            if path is None:
                raise DataError(f"image not found: looked for {' and '.join(map(str, candidates))}")
            found[name] = path
        return found

    def voc_masks(self) -> dict[str, Path]:
        """Return VOC's own masks of its images."""
        names = (*self.voc_train, *self.voc_val)
        return dict(zip(names, find_masks(self.voc, names, self.voc / "SegmentationClass"), strict=True))

    def sbd_masks(self) -> dict[str, Path]:
        """Return SBD's .mat files of the images whose masks only SBD has."""
        found = {name: self.sbd / "cls" / f"{name}.mat" for name in self.sbd_only}
        missing = [path for path in found.values() if not path.is_file()]
        if missing:
            raise DataError(f"mask not found: looked for {missing[0]} ({len(missing)} such masks)")
        return found


def find_sets(voc: Path, sbd: Path) -> AugmentedSet:
    """Read the lists of both data sets; `sbd` is the folder that holds SBD's `cls`, or one above it."""
    folders = [sbd, sbd / "dataset", sbd / "benchmark_RELEASE" / "dataset"]
    folder = next((path for path in folders if (path / "cls").is_dir()), None)
    if folder is None:
        raise DataError(f"no folder cls in {sbd}: is it the root of SBD (.../benchmark_RELEASE/dataset)?")
    return AugmentedSet(
        voc,
        folder,
        read_split(voc, "train"),
        read_split(voc, "val"),
        sbd_names(folder / "train.txt"),
        sbd_names(folder / "val.txt"),
    )


def sbd_names(path: Path) -> tuple[str, ...]:
    """Return the image names in one of SBD's lists."""
    return read_names(path, str(path))


def write_augmented_set(found: AugmentedSet, images: Mapping[str, Path], output: Path) -> None:
    """Write the enlarged training set to `output`: a new folder, or the root of VOC itself.

    The new list is written last: if it exists, all its masks exist too.
    """
    voc_masks, sbd_masks = found.voc_masks(), found.sbd_masks()
    masks, lists = output / "SegmentationClassAug", output / SPLIT_FOLDER
    for folder in (masks, lists, output / "JPEGImages"):
        folder.mkdir(parents=True, exist_ok=True)
    convert_masks({path: (images[name], masks / f"{name}.png") for name, path in sbd_masks.items()})
    for name, path in tqdm(voc_masks.items(), "VOC's masks", unit="mask"):
        copy_whole(path, masks / f"{name}.png")
    for path in images.values():
        link(path, output / "JPEGImages" / path.name)
    for split, names in (("train", found.voc_train), ("val", found.voc_val)):
        if not (lists / f"{split}.txt").exists():
            write_list(lists / f"{split}.txt", names)
    write_list(lists / "train_aug.txt", found.train_aug)


def convert_masks(jobs: Mapping[Path, tuple[Path, Path]]) -> None:
    """Convert .mat files to PNGs: the keys are the .mat files, the values an image and the PNG to write."""
    # This runs in a separate process, because SciPy's reader crashes on some damaged files instead of raising an error.
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        for path, (image, png) in tqdm(jobs.items(), "SBD's masks", unit="mask"):
            try:
                pool.submit(convert_mask, path, image, png).result()
            except BrokenProcessPool as error:
                raise DataError(f"cannot read {path}: it crashes SciPy's reader") from error


def convert_mask(path: Path, image: Path, png: Path) -> None:
    """Write one of SBD's masks as a PNG in VOC's colours."""
    mask = read_sbd_mask(path, image)
    write_whole(png, lambda partial: save_mask(partial, mask))


def read_sbd_mask(path: Path, image: Path) -> NDArray[np.uint8]:
    """Read one of SBD's .mat files: class indices [H, W], of the size of the image."""
    try:
        mask = loadmat(path, appendmat=False, variable_names=["GTcls"])["GTcls"]["Segmentation"][0, 0]
    except Exception as error:  # SciPy raises nearly anything for a damaged file
        raise DataError(f"cannot read {path}: {type(error).__name__}: {error}") from error
    if not isinstance(mask, np.ndarray) or mask.ndim != 2 or mask.dtype != np.uint8:
        raise DataError(f"{path}: expected a matrix of uint8 in GTcls.Segmentation")
    if mask.max(initial=0) > len(VOC_CLASSES):
        raise DataError(f"{path}: unknown class index {mask.max()}; known: 0 to {len(VOC_CLASSES)}")
    height, width = mask.shape
    if image_size(image) != (width, height):
        raise DataError(f"{path} is {width}x{height}, but its image {image} is {'x'.join(map(str, image_size(image)))}")
    return mask


def image_size(path: Path) -> tuple[int, int]:
    """Return width and height of an image."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            width, height = image.size
            return width, height
    except Exception as error:  # Pillow raises nearly anything for a damaged file
        raise DataError(f"cannot read image {path}: {error}") from error


def link(source: Path, target: Path) -> None:
    """Link to a file, or copy it if links are not allowed. An existing target is kept."""
    if target.exists():
        return
    target.unlink(missing_ok=True)  # a broken link: its file was moved
    try:
        target.symlink_to(source.resolve())
    except OSError:
        copy_whole(source, target)


def copy_whole(source: Path, target: Path) -> None:
    """Copy a file, which appears at `target` when it is complete."""
    write_whole(target, lambda partial: shutil.copyfile(source, partial))


def write_list(path: Path, names: Iterable[str]) -> None:
    """Write a split file."""
    write_text_whole(path, "\n".join(names) + "\n")
