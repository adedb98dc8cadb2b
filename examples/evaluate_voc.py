"""Compare a folder of masks with the ground truth: `python examples/evaluate_voc.py PREDICTIONS VOC_ROOT`."""

import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import torch
import tyro
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm
from tyro.conf import Positional, arg
from voc.dataset.errors import DataError
from voc.dataset.images import IGNORE, read_mask
from voc.dataset.labels import find_labels
from voc.dataset.layout import class_indices, find_masks, read_classes, read_split
from voc.evaluation.metrics import average_precision, class_metrics, confusion_matrix
from voc.evaluation.tables import iou_table, load_scores, method_table, save_iou_csv, save_method_csv
from voc.files.soft import classes_among, load_soft
from voc.files.whole import write_text_whole

SHOWN_ERRORS = 10


@dataclass(frozen=True)
class Arguments:
    """Compare a folder of masks with the ground truth of a split: IoU, precision and recall per class.

    Void pixels of the ground truth (255) do not count. A class without a pixel in the ground truth and in the
    predictions has no IoU (nan) and does not count in the mean.
    """

    predictions: Annotated[Positional[Path], arg(metavar="PREDICTIONS")]
    """Folder of the predictions, one NAME.png per image of the split: a palette or 8-bit grey PNG of class indices, of
    the size of the ground truth. Every pixel needs a class: the value 255 is an error. Or one NAME.npz per image: the
    soft masks of `infer_voc.py --soft`. Other files are ignored."""

    data: Annotated[Positional[Path], arg(metavar="DATA")]
    """Root of a data set in VOC's layout: JPEGImages, ImageSets/Segmentation/*.txt, SegmentationClass or
    SegmentationClassAug, and optionally classes.txt (one class name per line; default: VOC's 20)."""

    split: str = "val"
    """Name of the split, a file in ImageSets/Segmentation."""

    masks: Path | None = None
    """Folder of the ground truth; default: SegmentationClass, else SegmentationClassAug."""

    clean: bool = False
    """Remove classes that are not among the image's labels before a class is chosen for every pixel (Tables 2 and 9).
    This needs soft masks, because a mask of class indices does not contain the second-best class."""

    scores: Path | None = None
    """File of `infer_voc.py --scores`: also print the average precision of the image-level classification."""

    labels: Path | None = None
    """File of image-level labels for --clean and --scores, lines `id class class ...`. Default: Annotations/*.xml if
    there are any, else the classes of the ground truth."""

    name: str | None = None
    """Name of the method in the table; default: the folder's name."""

    table_classes: tuple[str, ...] = ()
    """Classes of the tables and their means; `background` may be one. Default: all."""

    output: Path = Path("runs/evaluation")
    """Folder for evaluation.md, methods.csv (the layout of Tables 5 and 6) and classes.csv."""

    workers: int = 2
    """Threads that read and compare masks."""


class Pair(NamedTuple):
    """A predicted mask, its ground truth, and the labels (indices from 0) whose classes are kept; None keeps all."""

    predicted: Path
    target: Path
    labels: frozenset[int] | None


def main(argv: Sequence[str] | None = None) -> int:
    """Compare, print the tables and write them. Returns the exit code."""
    try:
        arguments = tyro.cli(Arguments, args=argv)
        check_arguments(arguments)
        classes = read_classes(arguments.data)
        with_background = ("background", *classes)
        shown = arguments.table_classes or with_background
        rows = class_indices(shown, with_background, source="--table-classes")
        pairs = find_pairs(arguments, classes)
        precision = None if arguments.scores is None else classification(arguments, arguments.scores, classes)
        arguments.output.mkdir(parents=True, exist_ok=True)
        confusion = compare_all(pairs, len(classes), arguments.workers)
        report(arguments, with_background, rows, confusion, len(pairs), precision)
    except (ValueError, OSError) as error:  # DataError is a ValueError
        for line in str(error).splitlines():
            print(f"evaluate_voc.py: error: {line}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return 130
    return 0


def check_arguments(arguments: Arguments) -> None:
    """Refuse arguments without effect or out of range."""
    if arguments.labels is not None and not arguments.clean and arguments.scores is None:
        raise ValueError("--labels is for --clean and --scores, which are not given")
    if arguments.workers < 1:
        raise ValueError(f"--workers must be at least 1, got {arguments.workers}")


def find_pairs(arguments: Arguments, classes: Sequence[str]) -> list[Pair]:
    """Return the pairs of all images. Missing predictions are reported later, when they are read."""
    root, folder = arguments.data, arguments.predictions
    if not folder.is_dir():
        raise DataError(f"folder of predictions not found: {folder}")
    names = read_split(root, arguments.split)
    targets = find_masks(root, names, arguments.masks)
    labels: Sequence[frozenset[int] | None] = [None] * len(names)
    if arguments.clean:
        labels = find_labels(root, names, classes, arguments.labels, arguments.masks)
    predictions = [find_prediction(folder, name, arguments.clean) for name in names]
    return [Pair(*pair) for pair in zip(predictions, targets, labels, strict=True)]


def classification(arguments: Arguments, scores: Path, classes: Sequence[str]) -> Tensor:
    """Return the average precision per class, of the probabilities in a file against the image-level labels."""
    names = read_split(arguments.data, arguments.split)
    labels = find_labels(arguments.data, names, classes, arguments.labels, arguments.masks)
    present = torch.tensor([[index in image for index in range(len(classes))] for image in labels])
    return average_precision(load_scores(scores, classes, names), present)


def find_prediction(folder: Path, name: str, clean: bool) -> Path:
    """Return the file of an image: soft masks for `clean`, else a mask of class indices if there is one."""
    mask, soft = folder / f"{name}.png", folder / f"{name}.npz"
    return soft if clean or (soft.is_file() and not mask.is_file()) else mask


def compare_all(pairs: Sequence[Pair], num_classes: int, workers: int) -> Tensor:
    """Return the confusion matrix of all pairs, background first. A single error lists all wrong files."""
    confusion = torch.zeros(1 + num_classes, 1 + num_classes, dtype=torch.long)
    errors = []
    with ThreadPoolExecutor(workers) as pool:
        results = pool.map(lambda pair: compare(pair, num_classes), pairs)
        for result in tqdm(results, "comparing", total=len(pairs), unit="mask", leave=False):
            if isinstance(result, Tensor):
                confusion += result
            else:
                errors.append(str(result))
    if errors:
        lines = errors[:SHOWN_ERRORS]
        if len(errors) > SHOWN_ERRORS:
            lines.append(f"... and {len(errors) - SHOWN_ERRORS} more such files")
        raise DataError("\n".join(lines))
    return confusion


def compare(pair: Pair, num_classes: int) -> Tensor | DataError:
    """Return the confusion matrix of one pair, or the error of a wrong file."""
    try:
        predicted, target = read_prediction(pair, num_classes), read_indices(pair.target)
        if predicted.shape != target.shape:
            raise DataError(
                f"prediction {pair.predicted} is {predicted.shape[1]}x{predicted.shape[0]}, "
                f"but its ground truth {pair.target} is {target.shape[1]}x{target.shape[0]}"
            )
        check_indices(pair.predicted, predicted, f"a class, 0 to {num_classes}, at every pixel", num_classes)
        check_indices(pair.target, target[target != IGNORE], f"0 to {num_classes}, or {IGNORE} (void)", num_classes)
    except DataError as error:
        return error
    return confusion_matrix(torch.from_numpy(predicted), torch.from_numpy(target), 1 + num_classes)


def read_prediction(pair: Pair, num_classes: int) -> NDArray[np.uint8]:
    """Read the predicted mask [H, W] of class indices, or choose the classes of its soft masks."""
    if pair.predicted.suffix != ".npz":
        return read_indices(pair.predicted)
    if not pair.predicted.is_file():
        raise DataError(f"soft masks not found: looked for {pair.predicted} (infer_voc.py --soft writes them)")
    try:
        soft = load_soft(pair.predicted)
    except ValueError as error:
        raise DataError(str(error)) from error
    if len(soft.kept) != num_classes:
        raise DataError(f"{pair.predicted} has {len(soft.kept)} classes, expected {num_classes}")
    if pair.labels is None:
        return classes_among(soft, soft.kept)
    return classes_among(soft, np.isin(np.arange(num_classes), list(pair.labels)))


def read_indices(path: Path) -> NDArray[np.uint8]:
    """Read a mask of class indices [H, W]."""
    if not path.is_file():
        raise DataError(f"mask not found: looked for {path}")
    return read_mask(path)


def check_indices(path: Path, indices: NDArray[np.uint8], expected: str, num_classes: int) -> None:
    """Raise an error for a value that is not a class; the message ends with `expected`."""
    wrong = indices[indices > num_classes]
    if wrong.size:
        raise DataError(f"mask {path} holds {wrong[0]}: expected {expected}")


def report(
    arguments: Arguments,
    classes: Sequence[str],
    rows: Sequence[int],
    confusion: Tensor,
    num_images: int,
    precision: Tensor | None,
) -> None:
    """Print the tables, and write them as Markdown and CSV; `precision` is the average precision per class."""
    metrics = class_metrics(confusion)
    methods = {arguments.name or arguments.predictions.resolve().name: metrics.iou}
    columns = {"IoU": metrics.iou, "precision": metrics.precision, "recall": metrics.recall}
    cleaned = ", classes removed that are not among an image's labels" if arguments.clean else ""
    parts = [
        f"IoU (%), {num_images} images of {arguments.split}{cleaned}",
        method_table(classes, methods, rows),
        "IoU, precision and recall (%)",
        iou_table(classes, columns, rows),
    ]
    if precision is not None:
        parts.append("Average precision (%) of the image-level classification")
        parts.append(iou_table(classes[1:], {"AP": precision}, [row - 1 for row in rows if row]))
        save_iou_csv(arguments.output / "average_precision.csv", classes[1:], {"AP": precision})
    text = "\n\n".join(parts)
    print(text)
    write_text_whole(arguments.output / "evaluation.md", text + "\n")
    save_method_csv(arguments.output / "methods.csv", classes, methods, rows)
    save_iou_csv(arguments.output / "classes.csv", classes, columns)
    print(f"\ntables: {arguments.output}")


if __name__ == "__main__":
    sys.exit(main())
