"""Compare CAM-GAP, the paper's network and full supervision on a subset of Pascal VOC that is mostly animals.

    python benchmarks/voc_animals.py VOC_ROOT

VOC_ROOT is a data set in VOC's layout, whose images of the split `train` have masks. Every network is trained with
several seeds, on the same images, with the same backbone, augmentation, optimiser and epochs. Every choice at test time
is made on masks of the training split; the validation split is read for the table only. Finished parts are not
computed again: repeat the command until the table is complete. With --records, runs that were made on another machine
are not repeated either. All other arguments are passed to examples/train_voc.py, for every network.
"""

import hashlib
import json
import math
import platform
import shlex
import statistics
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import tyro
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]

from train_voc import main as train_main  # noqa: E402
from voc.arguments import parse_arguments, run_settings  # noqa: E402
from voc.checkpoints import load_trained  # noqa: E402
from voc.dataset.labels import find_labels  # noqa: E402
from voc.dataset.layout import class_indices, read_classes, read_split  # noqa: E402
from voc.dataset.splits import VOCDataset, load_split_with_masks  # noqa: E402
from voc.dataset.toy import toy_voc  # noqa: E402
from voc.devices import choose_device  # noqa: E402
from voc.evaluation.metrics import mean_iou  # noqa: E402
from voc.evaluation.network import CAM_BACKGROUNDS  # noqa: E402
from voc.evaluation.tables import iou_table, markdown  # noqa: E402
from voc.files.whole import write_text_whole  # noqa: E402
from voc.settings import Settings  # noqa: E402

from benchmarks import voc_protocol  # noqa: E402
from benchmarks.processor import cpu_model  # noqa: E402
from benchmarks.voc_protocol import (  # noqa: E402
    PROTOCOLS,
    Choice,
    ColumnName,
    Cut,
    Grid,
    ProtocolName,
    Refinement,
)
from wsseg_layers import __version__  # noqa: E402

ANIMALS = ("background", "cat", "cow", "dog", "horse", "person", "sheep")
TITLES = {"raw": "raw", "pamr": "+ PAMR", "par": "+ PAR", "crf": "+ CRF"}
PROTOCOL_TITLES = {"own": "classes chosen by the network", "given": "image labels given"}
PACKAGES = ("torch", "kornia", "accelerate", "pillow")

MIN_PROBABILITIES = (0.1, 0.2, 0.3, 0.5, 0.7)

# They do not change what is trained, and the protocol does not use them.
FREE_SETTINGS = ("resume", "device", "workers", "refine", "background_power", "min_probability")

# A training that takes seconds.
SMOKE = shlex.split(
    "--preset toy --epochs 2 --classification-epochs 1 --crop-size 65 --classification-crop-size 65 --channels 8 "
    "--batch-size 4 --scales 1 --workers 1"
)


MethodName = Literal["CAM-GAP", "ours", "ceiling"]


class Method(NamedTuple):
    """A row of the table: the arguments of its training, and what may be chosen at test time."""

    model: str
    arguments: tuple[str, ...]
    grid: Grid


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


class Measured(NamedTuple):
    """A trained network: its choices, and the IoU per class [C + 1] of every column, both by protocol."""

    choices: Mapping[ProtocolName, Choice]
    iou: Mapping[ProtocolName, Mapping[str, Tensor]]
    training_seconds: float
    measuring_seconds: float
    where: str  # the date, the machine and the versions


Results = Mapping[MethodName, Sequence[Measured]]  # by method, one per seed


@dataclass(frozen=True)
class Comparison:
    """The benchmark's own arguments, after VOC_ROOT."""

    methods: tuple[MethodName, ...] = tuple(METHODS)
    """Rows of the table: the networks to train and to measure."""

    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the trainings."""

    output: Path = Path("runs/voc_animals")
    """Folder of the trainings and of the numbers behind the table."""

    labels: Path | None = None
    """File of image-level labels. Default: VOC_ROOT/image_labels.txt if there is one, else as in train_voc.py."""

    records: Path | None = None
    """Folder with one small file per finished run: its settings, choices and numbers. A run with a file there is not
    repeated, even if --output is empty. Default: `records` in --output."""

    columns: tuple[ColumnName, ...] = ("pamr", "par", "crf")
    """Columns of refined masks beside the raw ones."""

    table_classes: tuple[str, ...] = ANIMALS
    """Classes of the table and its mean."""

    page: Path = ROOT / "benchmarks/results/voc_animals.md"
    """The file of the table."""

    smoke: bool = False
    """Run everything on a toy data set of a few images, to see that it works. The page is in the output folder."""


class Unfinished(Exception):  # noqa: N818  # not an error
    """A training ended early; `code` is its exit code."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


def main(argv: Sequence[str] | None = None) -> int:
    """Train and measure what is missing, then write the page. Returns the exit code."""
    given = list(sys.argv[1:] if argv is None else argv)
    root = Path(given.pop(0)) if given and not given[0].startswith("-") else None
    comparison, others = tyro.cli(Comparison, args=given, description=__doc__, return_unknown_args=True)
    try:
        comparison, data, others = prepare(comparison, root, others)
        results = {
            name: [run_one(comparison, data, name, seed, others) for seed in comparison.seeds]
            for name in comparison.methods
        }
        arguments = shlex.join(given).replace(str(data), "VOC_ROOT")
        text = page(comparison, data, arguments if comparison.smoke else f"VOC_ROOT {arguments}".strip(), results)
        comparison.page.parent.mkdir(parents=True, exist_ok=True)
        write_text_whole(comparison.page, text)
    except Unfinished as stop:
        return stop.code
    except (ValueError, OSError) as error:
        print(f"voc_animals.py: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped; repeat the command to continue", file=sys.stderr)
        return 130
    print(f"\n{text}\n{comparison.page}")
    return 0


def prepare(comparison: Comparison, root: Path | None, others: Sequence[str]) -> tuple[Comparison, Path, list[str]]:
    """Return the comparison, the root of its data, and the other arguments of every training; wrong ones are errors."""
    for option in ("methods", "seeds"):
        if not getattr(comparison, option):
            raise ValueError(f"--{option} needs at least one value")
    if comparison.smoke:
        data = toy_voc(comparison.output / "data", num_train=8, num_val=2)
        classes = ("background", *read_classes(data))
        page_path = comparison.output / "voc_animals.md"
        return replace(comparison, table_classes=classes, page=page_path), data, [*SMOKE, *others]
    if root is None:
        raise ValueError("VOC_ROOT is missing: give the root of the data set first, or --smoke")
    for split in ("train", "val"):  # what is missing is reported before hours of training
        load_split_with_masks(root, read_split(root, split), read_classes(root))
    labels = root / "image_labels.txt"
    if comparison.labels is None and labels.is_file():
        comparison = replace(comparison, labels=labels)
    return comparison, root, list(others)


def run_one(comparison: Comparison, data: Path, name: MethodName, seed: int, others: Sequence[str]) -> Measured:
    """Return the numbers of one network, from its record or after `train_and_measure`."""
    method = METHODS[name]
    folder = comparison.output / f"{name.lower()}_{seed}"
    arguments = ["--data", str(data), *others, *method.arguments, "--seed", str(seed), "--output", str(folder)]
    if comparison.labels is not None:
        arguments += ["--labels", str(comparison.labels)]
    arguments += ["--table-classes", *comparison.table_classes]
    settings = parse_arguments(arguments)
    if settings.checkpoint != "last":
        raise ValueError("--checkpoint best chooses an epoch on validation images: the protocol takes the last one")
    question = {
        "grid": method.grid,
        "refinements": voc_protocol.REFINEMENTS,
        "columns": comparison.columns,
        "classes": comparison.table_classes,
    }
    records = comparison.records or comparison.output / "records"
    records.mkdir(parents=True, exist_ok=True)
    found = remembered(
        records / f"{folder.name}.json",
        {**question, "settings": settings_of_training(settings), "data": fingerprint(data, settings.labels)},
        lambda: train_and_measure(comparison, data, name, settings, arguments, question),
    )
    iou = {
        protocol: {column: torch.tensor(values, dtype=torch.float64) for column, values in columns.items()}
        for protocol, columns in found["iou"].items()
    }
    choices = {protocol: load_choice(found["choices"][protocol]) for protocol in PROTOCOLS}
    return Measured(choices, iou, found["training_seconds"], found["measuring_seconds"], found["where"])


def train_and_measure(
    comparison: Comparison,
    data: Path,
    name: MethodName,
    settings: Settings,
    arguments: Sequence[str],
    question: Mapping[str, Any],
) -> dict[str, Any]:
    """Train one network, choose on the training split and measure on the validation split, where that is missing."""
    method, folder, seed = METHODS[name], settings.output, settings.seed
    rows = class_indices(comparison.table_classes, ("background", *read_classes(data)), source="--table-classes")
    started = (folder / "settings.json").is_file()
    if started:
        check_same_run(folder, settings)
    if not (folder / "iou.csv").is_file():
        print(f"\n{name}, seed {seed}: python examples/train_voc.py {shlex.join(arguments)}", flush=True)
        with stopwatch(folder / "training_seconds.txt"):
            code = train_main([*arguments, *(["--resume", str(folder)] if started else [])])
        if code:
            raise Unfinished(code)

    def network() -> Any:
        return load_trained(folder / f"{method.model}.pt").model.to(choose_device(settings.device))

    def choose() -> Any:
        chosen = voc_protocol.choose(
            network(), load_set(settings, data, "train"), settings.scales, method.grid, comparison.columns, rows
        )
        return {protocol: choice._asdict() for protocol, choice in chosen.items()}

    def measure() -> Any:
        found = voc_protocol.measure(
            network(), load_set(settings, data, "val"), settings.scales, choices, comparison.columns
        )
        return {protocol: {column: iou.tolist() for column, iou in by.items()} for protocol, by in found.items()}

    print(f"{name}, seed {seed}: choices on the training split, then the validation split", flush=True)
    with stopwatch(folder / "measuring_seconds.txt"):
        stored = remembered(folder / "choices.json", question, choose)
        choices = {protocol: load_choice(stored[protocol]) for protocol in PROTOCOLS}
        measured = remembered(folder / "measured.json", {**question, "choices": stored}, measure)
    return {
        "choices": stored,
        "iou": measured,
        **{f"{part}_seconds": read_seconds(folder / f"{part}_seconds.txt") for part in ("training", "measuring")},
        "where": f"{date.today()}, {machine()}. {versions()}",
    }


def settings_of_training(settings: Settings) -> dict[str, Any]:
    """Return the settings that change what is trained, without those that name a place."""
    places = ("data", "labels", "output", "keep_checkpoints")
    return {key: value for key, value in settings.to_json().items() if key not in (*FREE_SETTINGS, *places)}


def fingerprint(data: Path, labels: Path | None) -> str:
    """Return a hash of the names of the images in both splits, and of the image-level labels if they are in a file."""
    content = [repr(read_split(data, split)) for split in ("train", "val")]
    if labels is not None:
        content.append(labels.read_text())
    return hashlib.sha256("\n".join(content).encode()).hexdigest()[:16]


def check_same_run(folder: Path, settings: Settings) -> None:
    """Raise a ValueError if the run in a folder was made with other settings than these."""
    wanted, found = asdict(settings), asdict(run_settings(folder))
    for key, value in wanted.items():
        if key not in FREE_SETTINGS and value != found[key]:
            option = f"--{key.replace('_', '-')}"
            raise ValueError(f"the run in {folder} has {option} {found[key]}, not {value}: give another --output")


def load_set(settings: Settings, data: Path, split: str) -> VOCDataset:
    """Return the images of a split, with masks and with the image-level labels of the training."""
    classes = read_classes(data)
    names = read_split(data, split)
    labels = find_labels(data, names, classes, settings.labels)
    return VOCDataset(replace(load_split_with_masks(data, names, classes), labels=labels))


def load_choice(stored: Mapping[str, Any]) -> Choice:
    """Return the choice that was written as JSON."""
    refinements = {
        name: Refinement(num_iter, tuple(dilations)) for name, (num_iter, dilations) in stored["refinements"].items()
    }
    return Choice(Cut(*stored["cut"]), refinements, stored["backgrounds"])


def remembered(path: Path, question: Mapping[str, Any], compute: Callable[[], Any]) -> Any:
    """Return the answer in a file if it belongs to this question; otherwise compute and write it."""
    asked = json.loads(json.dumps(question))
    if path.is_file():
        stored = json.loads(path.read_text())
        if stored["question"] == asked:
            return stored["answer"]
    answer = json.loads(json.dumps(compute()))
    write_text_whole(path, json.dumps({"question": asked, "answer": answer}, indent=2) + "\n")
    return answer


@contextmanager
def stopwatch(path: Path) -> Iterator[None]:
    """Add the seconds of the context to those in a file; an interrupted command counts too."""
    started = time.perf_counter()
    try:
        yield
    finally:
        if path.parent.is_dir():
            write_text_whole(path, f"{read_seconds(path) + time.perf_counter() - started:.1f}\n")


def read_seconds(path: Path) -> float:
    """Return the seconds in a file, 0 without one."""
    return float(path.read_text()) if path.is_file() else 0.0


def page(comparison: Comparison, data: Path, command: str, results: Results) -> str:
    """Return the Markdown page of the results."""
    classes = ("background", *read_classes(data))
    rows = [classes.index(name) for name in comparison.table_classes]
    columns = ["raw", *comparison.columns]
    seeds = ", ".join(map(str, comparison.seeds))
    per_class: dict[str, Tensor] = {
        name: torch.stack([one.iou["own"]["raw"] for one in runs]).mean(dim=0) for name, runs in results.items()
    }
    hours = {
        part: sum(getattr(one, f"{part}_seconds") for runs in results.values() for one in runs) / 3600
        for part in ("training", "measuring")
    }
    places = sorted({one.where for runs in results.values() for one in runs})
    list_of_places = "\n".join(textwrap.fill(f"- {place}", 120, subsequent_indent="  ") for place in places)
    num_train, num_val = (len(read_split(data, split)) for split in ("train", "val"))
    what = (
        "This is a test run on drawn images: the numbers mean nothing."
        if comparison.smoke
        else "The data are a subset of Pascal VOC 2012 at reduced size: this mean is not VOC's."
    )
    return f"""# VOC animals

    python benchmarks/voc_animals.py {command}

{list_of_places}

Training took {hours["training"]:.2f} h, choices and measurements {hours["measuring"]:.2f} h.

Mean IoU in percent over {len(rows)} classes on {num_val} validation images, over seeds {seeds}: mean ± standard
deviation. {what}

{headline_table(columns, rows, results)}

Ceiling is full supervision: the same network, trained on the masks of the training images for as many steps. CAM-GAP
has the same backbone, images, image-level labels, augmentation, optimiser and epochs as ours. Ratio and difference are
those of each seed. The ratio to read is that of the raw masks: the background of the ceiling always has power 1, which
does not suit the CRF.{missing_rows(results)}

## IoU per class

Raw masks, classes chosen by the network, mean over seeds.

{iou_table(classes, per_class, rows)}

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

{choice_table(comparison, results)}
"""


def missing_rows(results: Results) -> str:
    """Return a paragraph that names the methods without results, empty if there are none."""
    missing = [name for name in METHODS if name not in results]
    return f"\n\nNot in this table, because `--methods` left it out: {', '.join(missing)}." if missing else ""


def machine() -> str:
    """Return the name of the processor and the number of threads, and that of the GPU if there is one."""
    threads = torch.get_num_threads()
    cpu = f"{cpu_model()}, {threads} thread{'s' if threads > 1 else ''}"
    return f"{torch.cuda.get_device_name()}, {cpu}" if torch.cuda.is_available() else cpu


def versions() -> str:
    """Return the versions of Python, of this library and of what it runs on."""
    packages = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    return f"Python {platform.python_version()}, {packages}, wsseg_layers {__version__}."


def numbers(values: Sequence[float]) -> str:
    """Return numbers as they are printed in the page."""
    return ", ".join(f"{value:g}" for value in values)


def headline_table(columns: Sequence[str], rows: Sequence[int], results: Results) -> str:
    """Return the table of mean IoU over seeds, with ours / ceiling and ours - CAM-GAP, for both protocols."""
    lines = [["", *(TITLES[column] for column in columns)]]
    for protocol in PROTOCOLS:
        means = {
            name: [[mean_iou(one.iou[protocol][column], rows) for one in runs] for column in columns]
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


def spread(values: Sequence[float], digits: int) -> str:
    """Return the mean and the sample standard deviation; one value has none."""
    mean = f"{statistics.fmean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def choice_table(comparison: Comparison, results: Results) -> str:
    """Return what was chosen for every network: numbers of its `Choice`."""
    columns = comparison.columns
    lines = [["network", "seed", "classes", "lowest probability", "raw", *(TITLES[column] for column in columns)]]
    for method, runs in results.items():
        for seed, run in zip(comparison.seeds, runs, strict=True):
            for protocol, (cut, refinements, backgrounds) in run.choices.items():
                lowest = f"{cut.min_probability:g}" if protocol == "own" else ""
                cells = [f"{cut.background:g}"]
                for column in columns:
                    cell = f"{backgrounds[column]:g}"
                    if column != "crf":
                        cell += f"; {refinements[column].num_iter} x {max(refinements[column].dilations)}"
                    cells.append(cell)
                lines.append([method, str(seed), protocol, lowest, *cells])
    return f"""Each cell has the power or the score of the background. For PAMR and PAR, it also has iterations x the
largest dilation. Classes: `own` are chosen by the network, `given` are those of the labels.

{markdown(lines)}"""


if __name__ == "__main__":
    sys.exit(main())
