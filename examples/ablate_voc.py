"""Train the rows of an ablation table of the paper: `python examples/ablate_voc.py --table 1b --data VOC_ROOT`.

Arguments that are not listed here go to train_voc.py, for every row. Rows that are finished are not trained again, and
one that was interrupted goes on: repeat the command until the table is complete.
"""

import csv
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro
from voc.arguments import parse_arguments
from voc.metrics import load_iou_csv, mean_iou

TRAIN = Path(__file__).resolve().parent / "train_voc.py"
HALF = ["--mixing-rate", "0.5"]  # Tables 1a, 1b and 7 were made with psi = 0.5

Rows = dict[str, list[str]]


def kernel_row(dilations: str) -> list[str]:
    """Return the arguments of a row of Table 1b."""
    return [*HALF, "--pamr-dilations", *dilations.split("-")]


TABLES: dict[str, Rows] = {
    "1a": {
        **{
            f"p = {power}, lambda = {weight}": [*HALF, "--penalty-power", power, "--penalty-weight", weight]
            for power in ("0", "3", "5")
            for weight in ("0.1", "0.01", "0.001")
        },
        "no penalty": [*HALF, "--penalty-weight", "0"],
    },
    "1b": {
        "no refinement": [*HALF, "--pamr-iterations", "0"],
        **{
            dilations: kernel_row(dilations)
            for dilations in ("1-2-4-8", "1-2-4-8-12", "1-3-6-9-12-16", "1-2-4-8-12-16", "1-2-4-8-12-24")
        },
    },
    "1c": {
        "psi = 0.5": HALF,
        "psi = 0.5, no GCI": [*HALF, "--no-gci"],
        "psi = 0.3": ["--mixing-rate", "0.3"],
        "psi = 0.3, no GCI": ["--mixing-rate", "0.3", "--no-gci"],
        "no gate": ["--mixing-rate", "0"],
        "deterministic gate": [*HALF, "--gate", "deterministic"],
    },
    "7": {f"{count} iterations": [*HALF, "--pamr-iterations", count] for count in ("5", "10", "15")},
}


@dataclass(frozen=True)
class Ablation:
    """Train the rows of an ablation table of the paper. All other arguments are those of train_voc.py."""

    table: Literal["1a", "1b", "1c", "7"]
    """1a: focal size penalty; 1b: PAMR's kernel; 1c: stochastic gate; 7: PAMR's iterations."""

    output: Path = Path("runs/ablation")
    """Folder for the runs and the table."""

    dry_run: bool = False
    """Print the commands, and train nothing."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is left of the table and write it. Returns the exit code."""
    ablation, others = tyro.cli(Ablation, args=argv, description=__doc__, return_unknown_args=True)
    folder = ablation.output / f"table_{ablation.table}"
    rows = TABLES[ablation.table]
    commands = {name: row_command(folder / slug(name), [*others, *overrides]) for name, overrides in rows.items()}
    settings = [parse_arguments(command[2:]) for command in commands.values()]  # a wrong argument ends here
    for name, command in commands.items():
        if ablation.dry_run:
            print(shlex.join(command))
        elif not (folder / slug(name) / "iou.csv").is_file():
            print(f"\n{name}: {shlex.join(command)}", flush=True)
            code = subprocess.run(command, check=False).returncode
            if code:
                print(f"ablate_voc.py: {name} ended with exit code {code}", file=sys.stderr)
                return code
    if not ablation.dry_run:
        print(f"\n{write_table(folder, list(rows), settings[0].table_classes)}")
    return 0


def row_command(output: Path, arguments: Sequence[str]) -> list[str]:
    """Return the command that trains one row, or goes on with it."""
    command = [sys.executable, str(TRAIN), "--output", str(output), "--no-baseline", *arguments]
    return [*command, "--resume", str(output)] if (output / "settings.json").is_file() else command


def slug(name: str) -> str:
    """Return a row's name as the name of its folder."""
    return "_".join("".join(letter if letter.isalnum() or letter in ".-" else " " for letter in name).split())


def write_table(folder: Path, names: Sequence[str], table_classes: Sequence[str]) -> str:
    """Collect the mean IoU of the rows (over some classes, or all) in `table.csv` and `table.md`; return the latter."""
    means = []
    for name in names:
        classes, columns = load_iou_csv(folder / slug(name) / "iou.csv")
        means.append((name, mean_iou(columns["ours"], [classes.index(other) for other in table_classes or classes])))
    with (folder / "table.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("configuration", "mean IoU"), *((name, f"{mean:.4f}") for name, mean in means)])
    lines = ["| configuration | mean IoU, % |", "|:--|--:|", *(f"| {name} | {mean:.1f} |" for name, mean in means)]
    table = "\n".join(lines) + "\n"
    (folder / "table.md").write_text(table)
    return table


if __name__ == "__main__":
    sys.exit(main())
