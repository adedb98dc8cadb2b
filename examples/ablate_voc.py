"""Train the rows of an ablation table of the paper: `python examples/ablate_voc.py --table 1b --data VOC_ROOT`.

All other arguments are passed to train_voc.py, for every row. Finished rows are not trained again, and an interrupted
row goes on: repeat the command until the table is complete.
"""

import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro
from voc.arguments import parse_arguments
from voc.evaluation.metrics import mean_iou
from voc.evaluation.tables import load_iou_csv
from voc.files.whole import write_csv_whole, write_text_whole

TRAIN = Path(__file__).resolve().parent / "train_voc.py"
HALF = ["--mixing-rate", "0.5"]  # Tables 1a, 1b and 7 were made with psi = 0.5

Rows = dict[str, list[str]]


def kernel_row(dilations: str) -> list[str]:
    """Return the arguments of a row of Table 1b."""
    return [*HALF, "--pamr-dilations", *dilations.split("-")]


TABLES: dict[str, Rows] = {
    "1a": {
        **{
            f"p = {power}, lambda = {value}": [*HALF, "--penalty-power", power, "--penalty-lambda", value]
            for power in ("0", "3", "5")
            for value in ("0.1", "0.01", "0.001")
        },
        "no penalty": [*HALF, "--no-size-penalty"],
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
    """Train the missing rows of the table and write it. Returns the exit code."""
    ablation, others = tyro.cli(Ablation, args=argv, description=__doc__, return_unknown_args=True)
    folder = ablation.output / f"table_{ablation.table}"
    rows = TABLES[ablation.table]
    commands = {name: row_command(folder / slug(name), [*others, *overrides]) for name, overrides in rows.items()}
    settings = [parse_arguments(command[2:]) for command in commands.values()]  # stops at a wrong argument
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
    """Return the command that trains one row, or resumes it."""
    command = [sys.executable, str(TRAIN), "--output", str(output), "--no-baseline", *arguments]
    return [*command, "--resume", str(output)] if (output / "settings.json").is_file() else command


def slug(name: str) -> str:
    """Return a row's name as the name of its folder."""
    return "_".join("".join(letter if letter.isalnum() or letter in ".-" else " " for letter in name).split())


def write_table(folder: Path, names: Sequence[str], table_classes: Sequence[str]) -> str:
    """Write the mean IoU of every row to `table.csv` and `table.md`, and return the text of the latter.

    The mean is over `table_classes`, or over all classes if there are none.
    """
    means = []
    for name in names:
        classes, columns = load_iou_csv(folder / slug(name) / "iou.csv")
        means.append((name, mean_iou(columns["ours"], [classes.index(other) for other in table_classes or classes])))
    cells = [("configuration", "mean IoU"), *((name, f"{mean:.4f}") for name, mean in means)]
    write_csv_whole(folder / "table.csv", cells)
    lines = ["| configuration | mean IoU, % |", "|:--|--:|", *(f"| {name} | {mean:.1f} |" for name, mean in means)]
    table = "\n".join(lines) + "\n"
    write_text_whole(folder / "table.md", table)
    return table


if __name__ == "__main__":
    sys.exit(main())
