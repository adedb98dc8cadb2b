"""Tables of IoU: as Markdown for people, as CSV for programs."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..dataset.errors import DataError
from ..dataset.layout import VOC_CLASSES
from ..files.whole import write_csv_whole
from .metrics import mean_iou

# The columns of Tables 5 and 6.
SHORT_NAMES = (
    "bg",
    "aero",
    "bike",
    "bird",
    "boat",
    "bot.",
    "bus",
    "car",
    "cat",
    "chair",
    "cow",
    "tab.",
    "dog",
    "horse",
    "mbk",
    "per.",
    "plant",
    "sheep",
    "sofa",
    "train",
    "tv",
)


def iou_table(classes: Sequence[str], columns: Mapping[str, Tensor], rows: Sequence[int] | None = None) -> str:
    """Return a Markdown table: one line per class, one column per method; last the mean over `rows` (default: all)."""
    shown = range(len(classes)) if rows is None else rows
    lines = [["class", *columns]]
    lines += [[classes[row], *(f"{iou[row]:.1f}" for iou in columns.values())] for row in shown]
    means = (f"**{mean_iou(iou, shown):.1f}**" for iou in columns.values())
    return markdown([*lines, [f"**mean of {len(shown)}**", *means]])


def method_table(classes: Sequence[str], methods: Mapping[str, Tensor], rows: Sequence[int] | None = None) -> str:
    """Return a Markdown table in the layout of Tables 5 and 6: one line per method, one column per class, the mean."""
    return markdown(method_lines(classes, methods, rows, digits=1))


def method_lines(
    classes: Sequence[str], methods: Mapping[str, Tensor], rows: Sequence[int] | None, digits: int
) -> list[list[str]]:
    """Return the cells of `method_table`; VOC's classes have the short names of Tables 5 and 6, others their own."""
    names = SHORT_NAMES if tuple(classes) == ("background", *VOC_CLASSES) else classes
    shown = range(len(classes)) if rows is None else rows
    lines = [["Method", *(names[row] for row in shown), "mean"]]
    for name, iou in methods.items():
        cells = [*(iou[row].item() for row in shown), mean_iou(iou, shown)]
        lines.append([name, *(f"{cell:.{digits}f}" for cell in cells)])
    return lines


def markdown(lines: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table of a header and lines; the first column is text, the others are numbers."""
    header, *others = ["| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |" for line in lines]
    return "\n".join([header, "|:--|" + "--:|" * (len(lines[0]) - 1), *others])


def save_method_csv(
    path: Path, classes: Sequence[str], methods: Mapping[str, Tensor], rows: Sequence[int] | None = None
) -> None:
    """Write the cells of `method_table` with more digits."""
    write_csv_whole(path, method_lines(classes, methods, rows, digits=4))


def save_iou_csv(path: Path, classes: Sequence[str], columns: Mapping[str, Tensor]) -> None:
    """Write the IoU per class of every method."""
    lines = [[name, *(f"{iou[row]:.4f}" for iou in columns.values())] for row, name in enumerate(classes)]
    write_csv_whole(path, [["class", *columns], *lines])


def load_iou_csv(path: Path) -> tuple[tuple[str, ...], dict[str, Tensor]]:
    """Return the classes and the columns of a file of `save_iou_csv`."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            header, *lines = csv.reader(file)
        columns = {
            name: torch.tensor([float(line[i]) for line in lines], dtype=torch.float64)
            for i, name in enumerate(header[1:], start=1)
        }
    except (ValueError, IndexError, csv.Error) as error:
        raise DataError(f"cannot read {path}: {error}") from error
    return tuple(line[0] for line in lines), columns


def load_scores(path: Path, classes: Sequence[str], names: Sequence[str]) -> Tensor:
    """Return the probabilities [N, C] of the images `names` in the file of `infer_voc.py --scores`."""
    try:
        with path.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
            header, *lines = csv.reader(file)
        scores = {line[0]: [float(cell) for cell in line[1:]] for line in lines}
    except (OSError, ValueError, IndexError, csv.Error) as error:
        raise DataError(f"cannot read scores {path}: {error}") from error
    if header != ["image", *classes] or any(len(row) != len(classes) for row in scores.values()):
        raise DataError(f"{path}: expected the columns image, {', '.join(classes)}")
    missing = [name for name in names if name not in scores]
    if missing:
        raise DataError(f"{path}: no line for image {missing[0]!r} ({len(missing)} such images)")
    found = torch.tensor([scores[name] for name in names], dtype=torch.float64)
    if not found.isfinite().all():
        raise DataError(f"{path} holds probabilities that are not finite")
    return found
