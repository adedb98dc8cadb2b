"""Compare CAM-GAP, the paper's network and full supervision on a subset of Pascal VOC that is mostly animals.

    python benchmarks/voc_animals.py VOC_ROOT

VOC_ROOT is a data set in VOC's layout, whose images of the split `train` have masks. Every network is trained with
several seeds, on the same images, with the same backbone, augmentation, optimiser and epochs. Every choice at test time
is made on masks of the training split; no choice is made on the validation split. Finished parts are not
computed again: repeat the command until the table is complete. With --records, runs that were made on another machine
are not repeated either. All other arguments are passed to examples/train_voc.py, for every network.
"""

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]

from voc.dataset.layout import read_classes, read_split  # noqa: E402
from voc.evaluation.metrics import mean_iou  # noqa: E402
from voc.evaluation.network import CAM_BACKGROUNDS  # noqa: E402
from voc.evaluation.tables import iou_table, markdown  # noqa: E402

from benchmarks import voc_protocol  # noqa: E402
from benchmarks.voc_page import (  # noqa: E402
    PROTOCOL_TITLES,
    TITLES,
    about_the_data,
    choice_table,
    make_page,
    numbers,
    places,
    spread,
    trained_on,
)
from benchmarks.voc_protocol import PROTOCOLS, ColumnName, Grid  # noqa: E402
from benchmarks.voc_runs import MIN_PROBABILITIES, Method, Results, Runs  # noqa: E402

MethodName = Literal["CAM-GAP", "ours", "ceiling"]


# CAM-GAP and ours have the same number of choices. Full supervision has only those of the refinement.
METHODS: dict[MethodName, Method] = {
    "CAM-GAP": Method("cam", ("--model", "cam"), Grid(CAM_BACKGROUNDS, MIN_PROBABILITIES)),
    "ours": Method(
        "single_stage", ("--no-baseline",), Grid((1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 9.0, 13.0), MIN_PROBABILITIES)
    ),
    "ceiling": Method(
        "single_stage",
        ("--supervision", "masks", "--background-power", "1", "--min-probability", "0"),
        Grid((1.0,), (0.0,)),
    ),
}


@dataclass(frozen=True)
class Comparison(Runs):
    """The benchmark's own arguments, after VOC_ROOT."""

    output: Path = Path("runs/voc_animals")
    """Folder of the trainings and of the numbers behind the table."""

    columns: tuple[ColumnName, ...] = ("pamr", "par", "crf")
    """Columns of refined masks beside the raw ones."""

    page: Path = ROOT / "benchmarks/results/voc_animals.md"
    """The file of the table."""

    methods: tuple[MethodName, ...] = tuple(METHODS)
    """Rows of the table: the networks to train and to measure."""


def main(argv: Sequence[str] | None = None) -> int:
    """Train and measure what is missing, then write the page. Returns the exit code."""
    return make_page("voc_animals.py", __doc__, Comparison, chosen_methods, page, argv)


def chosen_methods(comparison: Comparison) -> Mapping[str, Method]:
    """Return the rows of the table."""
    if not comparison.methods:
        raise ValueError("--methods needs at least one value")
    return {name: METHODS[name] for name in comparison.methods}


def page(comparison: Comparison, data: Path, command: str, results: Results) -> str:
    """Return the Markdown page of the results."""
    classes = ("background", *read_classes(data))
    class_rows = [classes.index(name) for name in comparison.table_classes]
    columns = ["raw", *comparison.columns]
    seeds = ", ".join(map(str, comparison.seeds))
    per_class: dict[str, Tensor] = {
        name: torch.stack([one.iou["own"]["raw"] for one in runs]).mean(dim=0) for name, runs in results.items()
    }
    hours = {
        part: sum(getattr(one, f"{part}_seconds") for runs in results.values() for one in runs) / 3600
        for part in ("training", "measuring")
    }
    num_train, num_val = (len(read_split(data, split)) for split in ("train", "val"))
    return f"""# VOC animals

{command}

{places(results)}

{trained_on(data)}
Training took {hours["training"]:.2f} h, choices and measurements {hours["measuring"]:.2f} h.

Mean IoU in percent over {len(class_rows)} classes on {num_val} validation images, over seeds {seeds}: mean ± standard
deviation. {about_the_data(comparison)}

{headline_table(columns, class_rows, results)}

Ceiling is full supervision: the same network, trained on the masks of the training images for as many steps. CAM-GAP
has the same backbone, images, image-level labels, augmentation, optimiser and epochs as ours; the preset, with its
learning rate, was chosen for ours. Ratio and difference are those of each seed. The ratio to read is that of the raw
masks: the background of the ceiling always has power 1, which does not suit the CRF.{missing_rows(results)}

## IoU per class

Raw masks, classes chosen by the network, mean over seeds.

{iou_table(classes, per_class, class_rows)}

## Choices

Every choice is made for each network on the masks of the {num_train} images of the split `train`, by the mean IoU of
the raw masks and then of the refined ones. The background is chosen for the raw masks and again for each refinement. No
choice is made on validation images. The grids:

- CAM-GAP's background score: {numbers(METHODS["CAM-GAP"].grid.backgrounds)}; the power of our background's mask:
  {numbers(METHODS["ours"].grid.backgrounds)}. Both: the lowest probability of a class that the network chooses:
  {numbers(MIN_PROBABILITIES)}.
- The ceiling has power 1 and keeps all classes. It was trained on the masks on which its refinement is chosen.
- PAMR and PAR, on masks at the size of the image: {numbers(voc_protocol.ITERATIONS)} iterations; dilations
  {" or ".join(numbers(dilations) for dilations in voc_protocol.DILATIONS)}.
- The CRF has the settings of the paper's authors.

Each cell has the power or the score of the background. For PAMR and PAR, it also has iterations x the
largest dilation. Classes: `own` are chosen by the network, `given` are those of the labels.

{choice_table(comparison, results)}
"""


def missing_rows(results: Results) -> str:
    """Return a paragraph that names the methods without results, empty if there are none."""
    missing = [name for name in METHODS if name not in results]
    return f"\n\nNot in this table, because `--methods` left it out: {', '.join(missing)}." if missing else ""


def headline_table(columns: Sequence[str], class_rows: Sequence[int], results: Results) -> str:
    """Return the table of mean IoU over seeds, with ours / ceiling and ours - CAM-GAP, for both protocols."""
    lines = [["", *(TITLES[column] for column in columns)]]
    for protocol in PROTOCOLS:
        means = {
            name: [[mean_iou(one.iou[protocol][column], class_rows) for one in runs] for column in columns]
            for name, runs in results.items()
        }
        pairs: dict[str, tuple[MethodName, MethodName, Callable[[float, float], float], int]] = {
            "ours / ceiling": ("ours", "ceiling", ratio, 2),
            "ours - CAM-GAP": ("ours", "CAM-GAP", difference, 1),
        }
        lines.append([f"*{PROTOCOL_TITLES[protocol]}*", *[""] * len(columns)])
        lines += [[name, *(spread(seeds, 1) for seeds in by_column)] for name, by_column in means.items()]
        for title, (one, other, compare, digits) in pairs.items():
            if one not in results or other not in results:
                continue
            cells = [
                spread([compare(*pair) for pair in zip(first, second, strict=True)], digits)
                for first, second in zip(means[one], means[other], strict=True)
            ]
            lines.append([f"**{title}**", *(f"**{cell}**" for cell in cells)])
    return markdown(lines)


def ratio(first: float, second: float) -> float:
    """Return first / second, NaN where the second is 0."""
    return first / second if second else math.nan


def difference(first: float, second: float) -> float:
    """Return first - second."""
    return first - second


if __name__ == "__main__":
    sys.exit(main())
