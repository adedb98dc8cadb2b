"""VOC's folder layout: names of classes and images, and the files behind them."""

from collections.abc import Sequence
from pathlib import Path

from .errors import DataError
from .images import check_image

VOC_CLASSES = (
    "aeroplane",
    "bicycle",
    "bird",
    "boat",
    "bottle",
    "bus",
    "car",
    "cat",
    "chair",
    "cow",
    "diningtable",
    "dog",
    "horse",
    "motorbike",
    "person",
    "pottedplant",
    "sheep",
    "sofa",
    "train",
    "tvmonitor",
)
TRAINING_SPLITS = ("train_aug", "train")  # the first one that exists is trained on
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")
MASK_FOLDERS = ("SegmentationClass", "SegmentationClassAug")
SPLIT_FOLDER = Path("ImageSets", "Segmentation")


def read_classes(root: Path) -> tuple[str, ...]:
    """Return the names in `root/classes.txt`, one per line, if there is such a file; else the 20 classes of VOC."""
    path = root / "classes.txt"
    if not path.is_file():
        return VOC_CLASSES
    classes = tuple(line.strip() for line in read_lines(path))
    if len(set(classes)) != len(classes) or any(" " in name for name in classes):
        raise DataError(f"{path}: class names must be unique and hold no space, got {', '.join(classes)}")
    if "background" in classes:
        raise DataError(f"{path}: 'background' is implied (index 0 of the masks) and must not be listed")
    return classes


def class_indices(names: Sequence[str], classes: Sequence[str], source: str) -> list[int]:
    """Return the indices of class names in `classes`; the error about an unknown name begins with `source`."""
    unknown = [name for name in names if name not in classes]
    if unknown:
        raise DataError(f"{source}: unknown class {unknown[0]!r}; known: {', '.join(classes)}")
    return [classes.index(name) for name in names]


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
    return read_names(path, f"split {path}")


def read_names(path: Path, source: str) -> tuple[str, ...]:
    """Return the image names in a list; `source` names the list in the error about a duplicate name."""
    names = tuple(image_name(line.split()[0]) for line in read_lines(path))
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise DataError(f"{source} lists {twice!r} more than once")
    return names


def first_file(candidates: Sequence[Path]) -> Path | None:
    """Return the first of the paths at which there is a file."""
    return next((path for path in candidates if path.is_file()), None)


def image_name(entry: str) -> str:
    """Return the name in an entry of a split file: `2007_000032` or `/JPEGImages/2007_000032.jpg`."""
    name = entry.rsplit("/", maxsplit=1)[-1]
    return next((name[: -len(suffix)] for suffix in IMAGE_SUFFIXES if name.lower().endswith(suffix)), name)


def image_candidates(root: Path, name: str) -> list[Path]:
    """Return the paths at which the image of a name may be. Some cameras write suffixes in capitals."""
    suffixes = (*IMAGE_SUFFIXES, *map(str.upper, IMAGE_SUFFIXES))
    return [root / "JPEGImages" / f"{name}{suffix}" for suffix in suffixes]


def read_lines(path: Path) -> list[str]:
    """Return the lines of a text file that are not blank; a file without such lines is an error."""
    try:
        lines = [line for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {path}: {error}") from error
    if not lines:
        raise DataError(f"{path} is empty: expected one entry per line")
    return lines


def find_images(root: Path, names: Sequence[str]) -> tuple[Path, ...]:
    """Return the image files of `names`; the header of each is read, to see that it is an image."""
    paths = []
    for name in names:
        candidates = image_candidates(root, name)
        path = first_file(candidates)
        if path is None:
            raise DataError(f"image not found: looked for {candidates[0]} (or {', '.join(IMAGE_SUFFIXES[1:])})")
        check_image(path)
        paths.append(path)
    return tuple(paths)


def find_masks(root: Path, names: Sequence[str], folder: Path | None = None) -> tuple[Path, ...]:
    """Return the mask files of `names`: in `folder` if given, else VOC's own, else those of the augmented set."""
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
