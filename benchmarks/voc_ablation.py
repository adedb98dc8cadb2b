"""Measure what each ingredient of the preset `photographs` contributes, on a subset of Pascal VOC.

    python benchmarks/voc_ablation.py VOC_ROOT

VOC_ROOT is a data set in VOC's layout, whose images of the split `train` have masks. Each row is trained with one
ingredient changed, as by `examples/ablate_voc.py --table photographs`. All choices at test time are made for every row
on masks of the training split, none on the validation split. Finished parts are not computed again: repeat the command
until the table is complete. With --records, runs that were made on another machine are not repeated either. All other
arguments are passed to examples/train_voc.py, for every row.
"""

import shlex
import sys
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]

from ablate_voc import INGREDIENTS  # noqa: E402
from voc.dataset.layout import read_classes, read_split  # noqa: E402
from voc.evaluation.metrics import mean_iou  # noqa: E402
from voc.evaluation.tables import markdown  # noqa: E402

from benchmarks.voc_animals import METHODS  # noqa: E402
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
from benchmarks.voc_protocol import PROTOCOLS  # noqa: E402
from benchmarks.voc_runs import Method, Results, Runs  # noqa: E402

OURS = METHODS["ours"]
PRESET = next(iter(INGREDIENTS))  # the row that the others are compared with


@dataclass(frozen=True)
class Ablation(Runs):
    """The benchmark's own arguments, after VOC_ROOT."""

    output: Path = Path("runs/voc_ablation")
    """Folder of the trainings and of the numbers behind the table."""

    page: Path = ROOT / "benchmarks/results/voc_ablation.md"
    """The file of the table."""

    seeds: tuple[int, ...] = (0,)
    """Seeds of the trainings."""

    rows: tuple[str, ...] = tuple(INGREDIENTS)
    """Rows of the table. The row of the preset is always in it."""


def main(argv: Sequence[str] | None = None) -> int:
    """Train and measure what is missing, then write the page. Returns the exit code."""
    return make_page("voc_ablation.py", __doc__, Ablation, chosen_rows, page, argv)


def chosen_rows(ablation: Ablation) -> Mapping[str, Method]:
    """Return the rows of the table, in the order of `INGREDIENTS`."""
    unknown = [name for name in ablation.rows if name not in INGREDIENTS]
    if unknown:
        raise ValueError(f"--rows has no row {unknown[0]!r}; there are {', '.join(map(repr, INGREDIENTS))}")
    return {
        name: Method(OURS.model, (*OURS.arguments, *changes), OURS.grid)
        for name, changes in INGREDIENTS.items()
        if name == PRESET or name in ablation.rows
    }


def page(ablation: Ablation, data: Path, command: str, results: Results) -> str:
    """Return the Markdown page of the results."""
    classes = ("background", *read_classes(data))
    class_rows = [classes.index(name) for name in ablation.table_classes]
    num_train, num_val = (len(read_split(data, split)) for split in ("train", "val"))
    seeds = ", ".join(map(str, ablation.seeds))
    about = (
        f"Mean IoU in percent over {len(class_rows)} classes on {num_val} validation images."
        f" In brackets: the difference from the preset. {about_seeds(ablation)} {about_the_data(ablation)}"
    )
    return f"""# VOC animals: ingredients, {"seed" if len(ablation.seeds) == 1 else "seeds"} {seeds}

{command}

{places(results)}

{trained_on(data)} Each row is the preset `photographs` with one ingredient changed.

{textwrap.fill(about, 120)}

{ablation_table(ablation, class_rows, results)}{missing_rows(results)}

The arguments of train_voc.py:

{argument_table(results)}

## Choices

The power of the background's mask and the lowest probability of a class are chosen for each row on the masks of the
{num_train} images of the split `train`. The powers are {numbers(OURS.grid.backgrounds)}, the
probabilities {numbers(OURS.grid.min_probabilities)}. Classes: `own` are chosen by the network, `given`
are those of the labels. The columns of the refinements, `raw` without one, have the powers.

{choice_table(ablation, results)}
"""


def about_seeds(ablation: Ablation) -> str:
    """Return a sentence about the spread over seeds."""
    if len(ablation.seeds) > 1:
        return "The table has the mean ± the standard deviation."
    return "The table of VOC animals has the spread over seeds: smaller differences mean nothing."


def ablation_table(ablation: Ablation, class_rows: Sequence[int], results: Results) -> str:
    """Return the table of mean IoU, with the difference of every row from the preset."""
    columns = [(protocol, column) for protocol in PROTOCOLS for column in ("raw", *ablation.columns)]
    lines = [["configuration", *(f"{PROTOCOL_TITLES[protocol]}, {TITLES[column]}" for protocol, column in columns)]]
    means = {
        name: [[mean_iou(one.iou[protocol][column], class_rows) for one in measured] for protocol, column in columns]
        for name, measured in results.items()
    }
    for name, by_column in means.items():
        cells = []
        for seeds, of_preset in zip(by_column, means[PRESET], strict=True):
            differences = [one - other for one, other in zip(seeds, of_preset, strict=True)]
            change = "" if name == PRESET else f" ({sum(differences) / len(differences):+.1f})"
            cells.append(spread(seeds, 1) + change)
        lines.append([name, *cells])
    return markdown(lines)


def argument_table(results: Results) -> str:
    """Return the table of the arguments of every row."""
    changed = [[name, f"`{shlex.join(INGREDIENTS[name])}`"] for name in results if name != PRESET]
    return markdown([["configuration", "arguments"], *changed])


def missing_rows(results: Results) -> str:
    """Return a paragraph that names the rows without results, empty if there are none."""
    missing = [name for name in INGREDIENTS if name not in results]
    if not missing:
        return ""
    return "\n\n" + textwrap.fill(f"Not in the table: {'; '.join(missing)}.", 120, break_on_hyphens=False)


if __name__ == "__main__":
    sys.exit(main())
