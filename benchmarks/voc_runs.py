"""Networks that are trained with several seeds and measured by the protocol: the rows of a table.

A row is a name and a `Method`. `run_one` trains and measures its network for one seed.
"""

import hashlib
import json
import platform
import shlex
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from ablate_voc import slug
from torch import Tensor
from train_voc import main as train_main
from voc.arguments import check_same_run, parse_arguments
from voc.checkpoints import load_trained
from voc.dataset.labels import find_labels
from voc.dataset.layout import TRAINING_SPLITS, class_indices, read_classes, read_split
from voc.dataset.splits import VOCDataset, load_split_with_masks
from voc.dataset.toy import toy_voc
from voc.devices import choose_device
from voc.files.whole import write_text_whole
from voc.settings import Settings

from benchmarks import voc_protocol
from benchmarks.processor import cpu_model
from benchmarks.voc_protocol import PROTOCOLS, Choice, ColumnName, Cut, Grid, ProtocolName, Refinement
from wsseg_layers import __version__

ANIMALS = ("background", "cat", "cow", "dog", "horse", "person", "sheep")
PACKAGES = ("kornia", "accelerate", "pillow")  # beside torch, whose own version names its build

MIN_PROBABILITIES = (0.1, 0.2, 0.3, 0.5, 0.7)

# They do not change what is trained, and the protocol does not use them.
FREE_SETTINGS = ("resume", "device", "workers", "keep_checkpoints", "refine", "background_power", "min_probability")
# They describe the decoder of the paper's network, which CAM-GAP does not have.
DECODER_SETTINGS = (
    "channels",
    "skip_stride8",
    "aspp_dilations",
    "aspp_image_pool",
    "mixing_rate",
    "gate",
    "gci",
    "gci_norm",
    "size_penalty",
    "penalty_power",
    "penalty_lambda",
)
PLACES = ("data", "labels", "output")  # the data are compared by `fingerprint`
TABLE_SETTINGS = ("table_classes", "curve_images")  # they change what a training reports, not what it trains

# A training that takes seconds.
SMOKE = shlex.split(
    "--preset toy --epochs 2 --classification-epochs 1 --crop-size 65 --classification-crop-size 65 --channels 8 "
    "--batch-size 4 --scales 1 --workers 1"
)


class Method(NamedTuple):
    """A row of the table: the arguments of its training, and what may be chosen at test time."""

    model: str
    arguments: tuple[str, ...]
    grid: Grid


class Measured(NamedTuple):
    """A trained network: its choices, and the IoU per class [C + 1] of every column, both by protocol."""

    choices: Mapping[ProtocolName, Choice]
    iou: Mapping[ProtocolName, Mapping[str, Tensor]]
    training_seconds: float
    measuring_seconds: float
    where: str  # the date, the machine and the versions


Results = Mapping[str, Sequence[Measured]]  # by row, one per seed


@dataclass(frozen=True)
class Runs:
    """The arguments that all tables have, after VOC_ROOT."""

    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the trainings."""

    output: Path = Path("runs")
    """Folder of the trainings and of the numbers behind the table."""

    labels: Path | None = None
    """File of image-level labels. Default: VOC_ROOT/image_labels.txt if there is one, else as in train_voc.py."""

    records: Path | None = None
    """Folder with one small file per finished run: its settings, choices and numbers. A run with a file there is not
    repeated, even if --output is empty. Default: `records` in --output."""

    columns: tuple[ColumnName, ...] = ()
    """Columns of refined masks beside the raw ones."""

    table_classes: tuple[str, ...] = ANIMALS
    """Classes of the table and its mean."""

    page: Path = Path("page.md")
    """The file of the table."""

    smoke: bool = False
    """Run everything on a toy data set of a few images, to see that it works. The page is in the output folder."""


RunsT = TypeVar("RunsT", bound=Runs)


class Unfinished(Exception):  # noqa: N818  # not an error
    """A training ended early; `code` is its exit code."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


def prepare(
    runs: RunsT, root: Path | None, others: Sequence[str], rows: Collection[Method]
) -> tuple[RunsT, Path, list[str]]:
    """Return the arguments, the root of the data, and the other arguments of every training; wrong ones are errors.

    Missing masks and labels are reported here, before hours of training.
    """
    if runs.smoke:
        data = toy_voc(runs.output / "data", num_train=8, num_val=2)
        classes = ("background", *read_classes(data))
        return replace(runs, table_classes=classes, page=runs.output / runs.page.name), data, [*SMOKE, *others]
    if root is None:
        raise ValueError("VOC_ROOT is missing: give the root of the data set first, or --smoke")
    labels = root / "image_labels.txt"
    if runs.labels is None and labels.is_file():
        runs = replace(runs, labels=labels)
    for split in ("train", "val"):
        load_set(root, split, runs.labels)
    if any("masks" in method.arguments for method in rows):  # trained on masks
        load_split_with_masks(root, read_split(root, *TRAINING_SPLITS), read_classes(root))
    return runs, root, list(others)


def run_one(runs: Runs, data: Path, name: str, method: Method, seed: int, others: Sequence[str]) -> Measured:
    """Return the numbers of one network, from its record or after `train_and_measure`."""
    folder = runs.output / f"{slug(name).lower()}_{seed}"
    arguments = ["--data", str(data), "--refine", "none", *others, *method.arguments]
    arguments += ["--seed", str(seed), "--output", str(folder)]
    if runs.labels is not None:
        arguments += ["--labels", str(runs.labels)]
    arguments += ["--table-classes", *runs.table_classes]
    settings = parse_arguments(arguments)
    if settings.resume is not None:
        raise ValueError("--resume is not for this command, which resumes by itself: repeat it")
    if settings.checkpoint != "last":
        raise ValueError("--checkpoint best chooses an epoch on validation images: the protocol takes the last one")
    question = {
        "grid": method.grid,
        "refinements": voc_protocol.REFINEMENTS,
        "columns": runs.columns,
        "classes": runs.table_classes,
        "data": fingerprint(data, settings.labels),
    }
    records = runs.records or runs.output / "records"
    records.mkdir(parents=True, exist_ok=True)
    found = remembered(
        records / f"{folder.name}.json",
        {**question, "settings": settings_of_training(settings)},
        lambda: train_and_measure(runs, data, name, method, settings, arguments, question),
    )
    iou = {
        protocol: {column: torch.tensor(values, dtype=torch.float64) for column, values in columns.items()}
        for protocol, columns in found["iou"].items()
    }
    choices = {protocol: load_choice(found["choices"][protocol]) for protocol in PROTOCOLS}
    return Measured(choices, iou, found["training_seconds"], found["measuring_seconds"], found["where"])


def train_and_measure(
    runs: Runs,
    data: Path,
    name: str,
    method: Method,
    settings: Settings,
    arguments: Sequence[str],
    question: Mapping[str, Any],
) -> dict[str, Any]:
    """Train one network, choose on the training split and measure on the validation split, where that is missing."""
    folder, seed = settings.output, settings.seed
    class_rows = class_indices(runs.table_classes, ("background", *read_classes(data)), source="--table-classes")
    started = (folder / "settings.json").is_file()
    if started:
        check_same_run(folder, settings, (*free_settings(settings), *PLACES, *TABLE_SETTINGS))
    data_file = folder / "data.txt"
    if data_file.is_file() and data_file.read_text() != question["data"]:
        raise ValueError(f"the run in {folder} was trained on other images or labels: give another --output")
    folder.mkdir(parents=True, exist_ok=True)
    write_text_whole(data_file, question["data"])
    if not (folder / "iou.csv").is_file():
        for file in ("choices.json", "measured.json"):  # of an earlier training
            (folder / file).unlink(missing_ok=True)
        print(f"\n{name}, seed {seed}: python examples/train_voc.py {shlex.join(arguments)}", flush=True)
        with stopwatch(folder / "training_seconds.txt"):
            code = train_main([*arguments, *(["--resume", str(folder)] if started else [])])
        if code:
            raise Unfinished(code)

    def network() -> Any:
        return load_trained(folder / f"{method.model}.pt").model.to(choose_device(settings.device))

    def choose() -> Any:
        chosen = voc_protocol.choose(
            network(), load_set(data, "train", runs.labels), settings.scales, method.grid, runs.columns, class_rows
        )
        return {protocol: choice._asdict() for protocol, choice in chosen.items()}

    def measure() -> Any:
        found = voc_protocol.measure(
            network(), load_set(data, "val", runs.labels), settings.scales, choices, runs.columns
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
    left_out = (*free_settings(settings), *PLACES)
    return {key: value for key, value in settings.to_json().items() if key not in left_out}


def free_settings(settings: Settings) -> tuple[str, ...]:
    """Return the names of the settings that do not change what is trained."""
    return (*FREE_SETTINGS, *(DECODER_SETTINGS if settings.model == "cam" else ()))


def fingerprint(data: Path, labels: Path | None) -> str:
    """Return a hash of the names of all images of a run, and of the image-level labels if they are in a file."""
    content = [repr(read_split(data, *split)) for split in (TRAINING_SPLITS, ("train",), ("val",))]
    if labels is not None:
        content.append(labels.read_text())
    return hashlib.sha256("\n".join(content).encode()).hexdigest()[:16]


def load_set(data: Path, split: str, labels: Path | None) -> VOCDataset:
    """Return the images of a split, with masks and with the image-level labels of the training."""
    classes = read_classes(data)
    names = read_split(data, split)
    with_masks = load_split_with_masks(data, names, classes)
    return VOCDataset(replace(with_masks, labels=find_labels(data, names, classes, labels)))


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


def machine() -> str:
    """Return the name of the processor and the number of threads, and that of the GPU if there is one."""
    threads = torch.get_num_threads()
    cpu = f"{cpu_model()}, {threads} thread{'s' if threads > 1 else ''}"
    return f"{torch.cuda.get_device_name()}, {cpu}" if torch.cuda.is_available() else cpu


def versions() -> str:
    """Return the versions of Python, of this library and of what it runs on."""
    packages = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    return f"Python {platform.python_version()}, torch {torch.__version__}, {packages}, wsseg_layers {__version__}."
