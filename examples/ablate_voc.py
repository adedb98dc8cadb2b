"""Train the rows of an ablation table: `python examples/ablate_voc.py --table 1b --data VOC_ROOT`.

All other arguments are passed to train_voc.py, for every row. Finished rows are not trained again, and an interrupted
row is resumed: repeat the command until the table is complete.
"""

import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro
from tables_voc import StepError, measure, segment_once, trained_methods
from torch import Tensor
from voc.arguments import check_same_run, parse_arguments
from voc.dataset.layout import class_indices
from voc.dataset.toy import toy_voc
from voc.evaluation.metrics import mean_iou
from voc.evaluation.tables import load_iou_csv, markdown
from voc.files.whole import write_csv_whole, write_text_whole
from voc.settings import Settings

TRAIN = Path(__file__).resolve().parent / "train_voc.py"
PHOTOGRAPHS = ["--preset", "photographs"]
HALF = ["--mixing-rate", "0.5"]  # Tables 1a, 1b and 7 were made with psi = 0.5

# They do not change what is trained or measured.
FREE_SETTINGS = ("resume", "device", "workers", "keep_checkpoints", "table_classes")

Rows = dict[str, list[str]]


def kernel_row(dilations: str) -> list[str]:
    """Return the arguments of a row of Table 1b."""
    return [*HALF, "--pamr-dilations", *dilations.split("-")]


INGREDIENTS: Rows = {
    "the preset": [],
    "backbone trained in classification": ["--no-freeze-backbone"],
    "EfficientNet-Lite0": ["--backbone", "efficientnet_lite0"],
    "batches of 16": ["--batch-size", "16"],
    "SGD": ["--optimizer", "sgd", "--lr", "1e-3", "--weight-decay", "5e-4"],
    "constant learning rate": ["--lr-decay", "0"],
    "no restart of the learning rate": ["--no-lr-restart"],
    "averaged weights": ["--ema-decay", "0.999"],
    "ASPP with dilations 4, 8, 12": ["--aspp-dilations", "4", "8", "12"],
    "ASPP with the mean of the image": ["--aspp-image-pool"],
    "no features of stride 8 in the skip": ["--no-skip-stride8"],
    "size penalty of the paper": ["--penalty-lambda", "0.01"],
    "PAMR with the paper's dilations": ["--pamr-dilations", "1", "2", "4", "8", "12", "24"],
    "no PAMR": ["--pamr-iterations", "0"],
    "no dense energy loss": ["--energy-loss", "0"],
    "loss of the published code": ["--loss", "published"],
    # The energy is a sum over pairs of pixels: larger crops need a smaller weight.
    "crops of 257 in self-supervision, energy loss of 0.6": [
        "--crop-size",
        "257",
        "--classification-crop-size",
        "193",
        "--energy-loss",
        "0.6",
    ],
}

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
    "photographs": {name: [*PHOTOGRAPHS, *changes] for name, changes in INGREDIENTS.items()},
}


@dataclass(frozen=True)
class Ablation:
    """Train the rows of an ablation table. All other arguments are those of train_voc.py."""

    table: Literal["1a", "1b", "1c", "7", "photographs"]
    """Tables of the paper, 1a: focal size penalty; 1b: PAMR's kernel; 1c: stochastic gate; 7: PAMR's iterations.
    photographs: the preset of this name, with one ingredient changed per row. The tables of the paper also need
    --preset paper, --backbone and --weights: otherwise their rows change the preset that train_voc.py takes."""

    output: Path = Path("runs/ablation")
    """Folder for the runs and the table."""

    crf: bool = False
    """Add a column with the dense CRF, as Tables 1a, 1c and 7 have."""

    dry_run: bool = False
    """Print the commands, and train nothing."""


def main(argv: Sequence[str] | None = None) -> int:
    """Train the missing rows of the table and write it. Returns the exit code."""
    ablation, others = tyro.cli(Ablation, args=argv, description=__doc__, return_unknown_args=True)
    try:
        return fill_table(ablation, others)
    except StepError as error:
        print(f"ablate_voc.py: {error}", file=sys.stderr)
        return 1
    except (ValueError, OSError) as error:
        print(f"ablate_voc.py: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped; repeat the command to continue", file=sys.stderr)
        return 130


def fill_table(ablation: Ablation, others: Sequence[str]) -> int:
    """Train the missing rows of the table and write it. Returns the exit code."""
    folder = ablation.output / f"table_{ablation.table}"
    rows = {
        name: ["--output", str(folder / slug(name)), "--no-baseline", *others, *changes]
        for name, changes in TABLES[ablation.table].items()
    }
    settings = {name: parse_arguments(row) for name, row in rows.items()}  # stops at a wrong argument
    for one in settings.values():
        if one.resume is not None:
            raise ValueError("--resume is not for this command, which resumes by itself: repeat it")
        if one.model != "single_stage":
            raise ValueError("--model cam: the rows of the table are single-stage networks")
    for name, one in settings.items():
        command = [sys.executable, str(TRAIN), *rows[name]]
        if (one.output / "settings.json").is_file():
            check_same_run(one.output, one, FREE_SETTINGS)
            command += ["--resume", str(one.output)]
        if ablation.dry_run:
            print(shlex.join(command))
        elif not (one.output / "iou.csv").is_file():
            print(f"\n{name}: {shlex.join(command)}", flush=True)
            code = run_command(command)
            if code:
                print(f"ablate_voc.py: {name} ended with exit code {code}", file=sys.stderr)
                return code
    if not ablation.dry_run:
        with_crf = [crf_iou(one) for one in settings.values()] if ablation.crf else []
        print(f"\n{write_table(folder, list(rows), next(iter(settings.values())).table_classes, with_crf)}")
    return 0


def run_command(command: Sequence[str]) -> int:
    """Run a command and return its exit code. Ctrl-C reaches the command too: wait until it has saved its state."""
    previous = signal.signal(signal.SIGINT, lambda *_: None)  # not SIG_IGN, which the command would inherit
    try:
        return subprocess.run(command, check=False).returncode
    finally:
        signal.signal(signal.SIGINT, previous)


def crf_iou(settings: Settings) -> Tensor:
    """Return the IoU per class of a row on the validation images, after the CRF."""
    root = settings.data or toy_voc(settings.output / "data", seed=settings.seed)
    (method,) = trained_methods(settings.output)
    folder = settings.output / "val"
    command = [
        *method.load,
        str(root),
        "--split",
        "val",
        "--refine",
        "crf",
        "--output",
        str(folder),
        "--device",
        settings.device,
    ]
    return measure(segment_once(folder, command), "crf", root, "val")


def slug(name: str) -> str:
    """Return the folder name for the name of a row."""
    return "_".join("".join(letter if letter.isalnum() or letter in ".-" else " " for letter in name).split())


def write_table(
    folder: Path, names: Sequence[str], table_classes: Sequence[str], with_crf: Sequence[Tensor] = ()
) -> str:
    """Write the mean IoU of every row to `table.csv` and `table.md`, and return the text of the latter.

    The mean is over `table_classes`, or over all classes if it is empty. `with_crf`, if given, is the IoU per class of
    every row after the CRF, and adds a second column.
    """
    columns = ["mean IoU, %", "mean IoU (+ CRF), %"] if with_crf else ["mean IoU, %"]
    means = []
    for index, name in enumerate(names):
        path = folder / slug(name) / "iou.csv"
        classes, found = load_iou_csv(path)
        if "ours" not in found:
            raise ValueError(f"{path} has no column 'ours': the rows are trainings of the single-stage network")
        rows = class_indices(table_classes or classes, classes, source="--table-classes")
        means.append([mean_iou(iou, rows) for iou in (found["ours"], *with_crf[index : index + 1])])

    def lines(digits: int) -> list[list[str]]:
        cells = [[name, *(f"{mean:.{digits}f}" for mean in row)] for name, row in zip(names, means, strict=True)]
        return [["configuration", *columns], *cells]

    write_csv_whole(folder / "table.csv", lines(digits=4))
    table = markdown(lines(digits=1)) + "\n"
    write_text_whole(folder / "table.md", table)
    return table


if __name__ == "__main__":
    sys.exit(main())
