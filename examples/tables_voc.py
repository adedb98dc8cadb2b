"""Make a table of the paper from trained networks: `python examples/tables_voc.py --table 5 --runs RUN --data VOC`.

All other arguments are passed to infer_voc.py (for Table 8: to train_voc.py). Finished steps are not repeated: if the
command was interrupted, repeat it. Tables 1a, 1b, 1c and 7 are made by ablate_voc.py.
"""

import json
import sys
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

import evaluate_voc
import infer_voc
import train_voc
import tyro
from torch import Tensor
from voc.arguments import run_settings
from voc.checkpoints import best_checkpoint, read_checkpoint
from voc.dataset.layout import SPLIT_FOLDER, read_classes, read_split
from voc.evaluation.metrics import mean_iou
from voc.evaluation.tables import load_iou_csv, markdown, method_lines
from voc.files.whole import write_csv_whole, write_text_whole, write_whole
from voc.inference.records import file_digest
from voc.settings import BackboneName

TABLE_9_SCALES = ("1", "0.75", "1.25", "1.5")
SERVER_FOLDER = "results/VOC2012/Segmentation/comp6_test_cls"  # comp6: trained on more than VOC's own images


class StepError(RuntimeError):
    """A step ended with an error, which it has printed."""


@dataclass(frozen=True)
class Arguments:
    """Make a table of the paper from trained networks. All other arguments go to infer_voc.py or train_voc.py."""

    table: Literal["2", "5", "6", "8", "9"]
    """2: masks with image labels, train and val; 5: IoU per class, val; 6: an archive for VOC's test server; 8: a
    second stage, trained on the masks; 9: masks with image labels, several backbones. Table 3 has the means of 5 and
    6."""

    data: Path
    """Root of a data set in VOC's layout."""

    runs: tuple[Path, ...] = ()
    """Output folder of train_voc.py; for Table 9 one per backbone."""

    released: Path | None = None
    """File of the authors' published network, instead of --runs."""

    backbone: BackboneName | None = None
    """Backbone of the published network, for --released."""

    crf: bool = True
    """Also make the rows or columns with the dense CRF."""

    output: Path = Path("runs/tables")
    """Folder for the masks and the table."""

    def __post_init__(self) -> None:
        """Refuse arguments without effect."""
        if (self.released is None) == (not self.runs):
            raise ValueError("give --runs, or --released with --backbone")
        if (self.released is None) != (self.backbone is None):
            raise ValueError("--released and --backbone belong together")
        if len(self.runs) > 1 and self.table != "9":
            raise ValueError(f"--table {self.table} is made from one run, got {len(self.runs)}")
        if self.released is not None and self.table == "8":
            raise ValueError("--table 8 trains a second stage with the settings of a run: give --runs")


class Method(NamedTuple):
    """A network: its name in the table, its backbone, the folder of its masks, and how infer_voc.py loads it."""

    name: str
    backbone: str
    folder: str
    load: list[str]


def main(argv: Sequence[str] | None = None) -> int:
    """Make the table. Returns the exit code."""
    try:
        arguments, others = tyro.cli(Arguments, args=argv, description=__doc__, return_unknown_args=True)
        make = {"2": table_2, "5": table_5, "6": table_6, "8": table_8, "9": table_9}[arguments.table]
        print(f"\n{make(arguments, others)}")
    except StepError as error:
        print(f"tables_voc.py: {error}", file=sys.stderr)
        return 1
    except (ValueError, OSError) as error:  # the errors of data and checkpoints are ValueErrors
        print(f"tables_voc.py: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped; repeat the command to continue", file=sys.stderr)
        return 130
    return 0


def table_2(arguments: Arguments, others: Sequence[str]) -> str:
    """Table 2: IoU on the training and validation images, if only the classes of the image labels are kept."""
    lines = [["Method", "IoU (train, %)", "IoU (val, %)"]]
    splits = ("train", "val")
    for method in methods(arguments):
        folders = [segment(arguments, method, split, ["--clean", *others]) for split in splits]
        for kind, suffix in kinds(arguments.crf):
            pairs = zip(folders, splits, strict=True)
            means = [mean_iou(measure(folder, kind, arguments.data, split)) for folder, split in pairs]
            lines.append([method.name + suffix, *(f"{mean:.1f}" for mean in means)])
    return write_table(arguments, lines)


def table_5(arguments: Arguments, others: Sequence[str]) -> str:
    """Table 5: IoU per class on the validation images."""
    rows: dict[str, Tensor] = {}
    for method in methods(arguments):
        folder = segment(arguments, method, "val", others)
        for kind, suffix in kinds(arguments.crf):
            rows[method.name + suffix] = measure(folder, kind, arguments.data, "val")
    classes = ("background", *read_classes(arguments.data))
    return write_table(arguments, method_lines(classes, rows, None, digits=1))


def table_6(arguments: Arguments, others: Sequence[str]) -> str:
    """Table 6: archives of the masks of the test images, in the layout of VOC's evaluation server."""
    lines = []
    names = read_split(arguments.data, "test")
    for method in methods(arguments):
        folder = segment(arguments, method, "test", others)
        for kind, _ in kinds(arguments.crf):
            path = arguments.output / "table_6" / f"{method.folder}_{kind}.tar.gz"
            write_whole(path, lambda partial: pack(partial, folder / kind, names))  # noqa: B023  # called at once
            lines.append(f"for the server, {len(names)} masks: {path}")
    return "\n".join(lines)


def table_8(arguments: Arguments, others: Sequence[str]) -> str:
    """Table 8: the validation IoU of a network that is trained on the masks of the first one."""
    (run,) = arguments.runs
    one_stage = mean_of_ours(run)  # refuses a run of CAM-GAP before its masks are made
    (*_, method) = methods(arguments)  # the single-stage network
    labels = run_settings(run).labels
    split = "train_aug" if (arguments.data / SPLIT_FOLDER / "train_aug.txt").is_file() else "train"
    folder = segment(arguments, method, split, ["--clean", *([] if labels is None else ["--labels", str(labels)])])
    kind, _ = kinds(arguments.crf)[-1]
    masks = folder / kind
    second = arguments.output / "table_8" / method.folder / f"second_stage_{kind}"
    made_by, record = second / "made_by.json", json.dumps([*map(file_digest, map(Path, method.load)), *others])
    if made_by.is_file() and made_by.read_text() != record:
        raise ValueError(f"{second} is of another network or other arguments: give another --output")
    if not (second / "iou.csv").is_file():
        if not (second / "settings.json").is_file():
            settings = replace(run_settings(run), supervision="masks", masks=masks, data=arguments.data)
            # A training on masks does not train the class scores, so no class is removed by its probability.
            settings = replace(settings, min_probability=0.0, background_power=1.0)
            settings = replace(settings, output=second, checkpoint="last")
            second.mkdir(parents=True, exist_ok=True)
            write_text_whole(made_by, record)
            write_text_whole(second / "settings.json", json.dumps(settings.to_json()))
        step("train_voc.py", train_voc.main(["--resume", str(second), *others]))
    lines = [["Method", "IoU (val, %)"], ["one stage", one_stage], ["two stages", mean_of_ours(second)]]
    return write_table(arguments, lines)


def mean_of_ours(run: Path) -> str:
    """Return the mean IoU of the single-stage network in a run's table, as it is printed."""
    _, found = load_iou_csv(run / "iou.csv")
    if "ours" not in found:
        raise ValueError(f"{run / 'iou.csv'} has no column 'ours': Table 8 needs a single-stage network")
    return f"{mean_iou(found['ours']):.1f}"


def table_9(arguments: Arguments, others: Sequence[str]) -> str:
    """Table 9: IoU on the validation images for several backbones, if only the classes of the image labels are kept."""
    cells: dict[str, dict[str, float]] = {}
    for method in methods(arguments):
        folder = segment(arguments, method, "val", ["--clean", "--scales", *TABLE_9_SCALES, *others])
        row = cells.setdefault(method.backbone, {})
        for kind, suffix in kinds(arguments.crf):
            row[method.name + suffix] = mean_iou(measure(folder, kind, arguments.data, "val"))
    columns = list(dict.fromkeys(column for row in cells.values() for column in row))
    lines = [["Backbone", *columns]]
    for backbone, row in cells.items():
        lines.append([backbone, *(f"{row[column]:.1f}" if column in row else "" for column in columns)])
    return write_table(arguments, lines)


def methods(arguments: Arguments) -> list[Method]:
    """Return the published network, or the networks of all runs."""
    if arguments.backbone is not None:
        load = ["--released", str(arguments.released), "--backbone", arguments.backbone]
        return [Method("ours", arguments.backbone, f"released_{arguments.backbone}", load)]
    return [method for run in arguments.runs for method in trained_methods(run)]


def trained_methods(run: Path) -> list[Method]:
    """Return the networks in a folder of train_voc.py: CAM-GAP, if it was trained, and the single-stage network."""
    settings = run_settings(run)
    if not (run / "iou.csv").is_file():
        raise ValueError(f"the training in {run} is not finished: looked for {run / 'iou.csv'}")
    found = []
    for name, model in (("CAM-GAP", "cam"), ("ours", "single_stage")):
        path = run / f"{model}.pt"
        if path.is_file():
            if settings.checkpoint == "best":
                history = read_checkpoint(path)["progress"].get("history", ())
                path = best_checkpoint(path, history) or path
            found.append(Method(name, settings.backbone, f"{run.name}_{model}", [str(path)]))
    if not found:
        raise ValueError(f"no network in {run}: looked for cam.pt and single_stage.pt")
    return found


def kinds(crf: bool) -> list[tuple[str, str]]:
    """Return the folders of masks that infer_voc.py writes, each with a suffix for the method's name in the table."""
    network, refined = ("masks", ""), ("crf", " + CRF")
    return [network, refined] if crf else [network]


def segment(arguments: Arguments, method: Method, split: str, options: Sequence[str]) -> Path:
    """Write the masks of a split, unless they are there already, and return their folder."""
    folder = arguments.output / f"table_{arguments.table}" / method.folder / split
    command = [*method.load, str(arguments.data), "--split", split, "--output", str(folder)]
    return segment_once(folder, [*command, "--refine", "crf" if arguments.crf else "none", *options])


def segment_once(folder: Path, command: list[str]) -> Path:
    """Run infer_voc.py, unless it has run with these arguments and files, and return the folder."""
    done = folder / "infer_voc.json"
    files = [Path(argument) for argument in command if Path(argument).is_file()]  # the checkpoint, the labels
    made_by = [*command, *map(file_digest, files)]
    if not done.is_file() or json.loads(done.read_text()) != made_by:
        done.unlink(missing_ok=True)
        step("infer_voc.py", infer_voc.main(command))
        write_text_whole(done, json.dumps(made_by))
    return folder


def measure(folder: Path, kind: str, data: Path, split: str) -> Tensor:
    """Return the IoU per class of the masks in `folder / kind`."""
    output = folder / f"iou_{kind}"
    arguments = [str(folder / kind), str(data), "--split", split, "--output", str(output)]
    step("evaluate_voc.py", evaluate_voc.main(arguments))
    return load_iou_csv(output / "classes.csv")[1]["IoU"]


def step(name: str, code: int) -> None:
    """Stop if a step has failed."""
    if code:
        raise StepError(f"{name} ended with exit code {code}")


def pack(path: Path, folder: Path, names: Sequence[str]) -> None:
    """Write an archive of the masks in the folders that VOC's evaluation server expects."""
    with tarfile.open(path, "w:gz") as archive:
        for name in names:
            archive.add(folder / f"{name}.png", f"{SERVER_FOLDER}/{name}.png")


def write_table(arguments: Arguments, lines: Sequence[Sequence[str]]) -> str:
    """Write the table as Markdown and CSV, and return the former."""
    folder = arguments.output / f"table_{arguments.table}"
    text = markdown(lines)
    write_text_whole(folder / "table.md", text + "\n")
    write_csv_whole(folder / "table.csv", lines)
    return text


if __name__ == "__main__":
    sys.exit(main())
