"""Write results/dense_crf.md: `DenseCRF` beside pydensecrf2, and the lattice beside the exact sum.

    python -m benchmarks.dense_crf VOC_ROOT [--checkpoint FILE]

VOC_ROOT is a data set in VOC's layout, whose images of the split `val` have masks. pydensecrf2 is in the extra `dev`.
The scores of the timed images are smooth random numbers, so that the CRF changes many labels, and no training is
needed.
"""

import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from PIL import Image
from torch import Tensor
from tyro.conf import Positional, arg

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]

from voc.dataset.layout import find_images, read_split  # noqa: E402
from voc.evaluation.tables import markdown  # noqa: E402
from voc.files.whole import write_text_whole  # noqa: E402

from benchmarks.crf_iou import compare_iou, iou_text  # noqa: E402
from benchmarks.crf_peer import pydensecrf  # noqa: E402
from benchmarks.measure import resident_memory  # noqa: E402
from benchmarks.processor import cpu_model  # noqa: E402
from benchmarks.report import RESULTS  # noqa: E402
from benchmarks.voc_page import code_block  # noqa: E402
from wsseg_layers import DenseCRF, DenseEnergyLoss, __version__  # noqa: E402
from wsseg_layers.functional import bilateral_filter  # noqa: E402

EXACT = 5  # photographs for exact sums, each of which takes a second
SIGMAS = ((3.0, None), (80.0, 13.0), (50.0, 15.0), (20.0, 13.0), (10.0, 30.0))


@dataclass(frozen=True)
class Arguments:
    """Write the page of `DenseCRF`."""

    data: Annotated[Positional[Path], arg(metavar="VOC_ROOT")]
    """Root of a data set in VOC's layout."""

    checkpoint: Path | None = None
    """Checkpoint of train_voc.py whose masks both CRFs refine. Default: masks made from the ground truth."""

    images: int = 40
    """Number of images for the comparison of mean IoU."""

    table_classes: tuple[str, ...] = ()
    """Classes of the mean IoU; `background` may be one. Default: all."""

    page: Path | None = None
    """The file to write. Default: benchmarks/results/dense_crf.md; with --smoke, runs/dense_crf.md."""

    smoke: bool = False
    """Small sizes, to see that everything works."""


class Size(NamedTuple):
    """Images [batch, 3, height, width] with this number of classes."""

    batch: int
    height: int
    width: int
    classes: int

    def __str__(self) -> str:
        """Return the size as in the tables."""
        batch = f"{self.batch} x " if self.batch > 1 else ""
        return f"{batch}{self.width} x {self.height}, {self.classes} classes"


class Plan(NamedTuple):
    """What is measured."""

    photographs: int
    rounds: int
    timed: Sequence[Size]
    memory: Sequence[Size]
    exact: tuple[int, int]  # height and width of the images for exact sums


FULL = Plan(
    10,
    15,
    (Size(1, 240, 320, 3), Size(1, 375, 500, 21), Size(16, 193, 193, 3)),
    (Size(1, 1500, 2000, 3), Size(1, 1500, 2000, 21)),
    (72, 96),
)
SMOKE = Plan(2, 2, (Size(1, 24, 32, 3), Size(2, 20, 20, 3)), (Size(1, 60, 80, 3),), (12, 16))


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, and write the page. Returns the exit code."""
    given = list(sys.argv[1:] if argv is None else argv)
    arguments = tyro.cli(Arguments, args=given, description=__doc__)
    page = arguments.page or (Path("runs/dense_crf.md") if arguments.smoke else RESULTS / "dense_crf.md")
    plan = SMOKE if arguments.smoke else FULL
    threads = torch.get_num_threads()
    try:
        if arguments.images < 1:
            raise ValueError(f"--images must be at least 1, got {arguments.images}")
        page.parent.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(0)
        files = find_images(arguments.data, read_split(arguments.data, "val"))[: plan.photographs]
        words = ["VOC_ROOT" if word == str(arguments.data) else word for word in given]
        command = code_block(["python", "-m", "benchmarks.dense_crf", *words])
        header = f"{command}\n\n{heading(files)}"
        where = "masks of a network" if arguments.checkpoint else "masks made from the ground truth by noise and blur"
        compared = compare_iou(arguments.data, arguments.images, arguments.checkpoint, arguments.table_classes)
        parts = [
            "# `DenseCRF` beside pydensecrf2",
            header,
            f"## Agreement\n\n{agreement(files, plan)}",
            iou_text(compared, where),
            f"## Time\n\n{times(files, plan)}",
            f"## Memory\n\n{memory(files, plan)}",
            f"## The lattice beside the exact sum\n\n{lattice_errors(files[:EXACT], plan)}",
        ]
        write_text_whole(page, "\n\n".join(parts) + "\n")
    except (ImportError, OSError, ValueError) as error:  # the errors of the data are ValueErrors
        print(f"dense_crf.py: error: {error}", file=sys.stderr)
        return 2
    finally:
        torch.set_num_threads(threads)
    print(page.read_text())
    return 0


def heading(files: Sequence[Path]) -> str:
    """Return what was measured where."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    versions = f"PyTorch {torch.__version__}, pydensecrf2 {version('pydensecrf2')}, wsseg_layers {__version__}"
    busy = f"load {os.getloadavg()[0]:.1f} at the start" if hasattr(os, "getloadavg") else "load unknown"
    capability = torch.backends.cpu.get_cpu_capability()
    return (
        f"{date.today()}, {cpu_model()}, {capability}, {cores} cores, {busy}.\n"
        f"{versions}. {len(files)} photographs, scaled to the sizes below."
    )


def photograph(file: Path, height: int, width: int) -> Tensor:
    """Return a photograph [1, 3, H, W] in 0 to 255."""
    with Image.open(file) as image:
        pixels = np.array(image.convert("RGB").resize((width, height), Image.Resampling.BILINEAR))
    return torch.from_numpy(pixels).permute(2, 0, 1)[None].float()


def smooth_scores(channels: int, height: int, width: int) -> Tensor:
    """Return probabilities [1, C, H, W] of blobs of about 32 pixels."""
    coarse = torch.randn(1, channels, 2 + height // 32, 2 + width // 32)
    return F.interpolate(3 * coarse, size=(height, width), mode="bilinear").softmax(dim=1)


def draw(files: Sequence[Path], size: Size) -> tuple[Tensor, Tensor]:
    """Return a batch of photographs and scores."""
    chosen = [files[index % len(files)] for index in range(size.batch)]
    images = torch.cat([photograph(file, size.height, size.width) for file in chosen])
    return images, torch.cat([smooth_scores(size.classes, size.height, size.width) for _ in chosen])


def agreement(files: Sequence[Path], plan: Plan) -> str:
    """Return the table of labels and marginals, of single images."""
    lines = [["size", "equal labels, lowest of all photographs", "mean difference of marginals", "largest difference"]]
    for size in (one for one in plan.timed if one.batch == 1):
        equal, mean, largest = [], [], []
        for file in files:
            image, scores = draw([file], size)
            theirs, ours = pydensecrf(image, scores), DenseCRF()(image, scores)
            equal.append(float((theirs.argmax(dim=1) == ours.argmax(dim=1)).float().mean()))
            mean.append(float((theirs - ours).abs().mean()))
            largest.append(float((theirs - ours).abs().max()))
        lines.append([str(size), f"{100 * min(equal):.3f} %", f"{max(mean):.1e}", f"{max(largest):.1e}"])
    return markdown(lines)


def with_threads(count: int, images: Tensor, scores: Tensor) -> None:
    """Call our CRF."""
    torch.set_num_threads(count)
    DenseCRF()(images, scores)


def loop(images: Tensor, scores: Tensor) -> None:
    """Call pydensecrf2 for every image. It has one thread."""
    for image, own in zip(images, scores, strict=True):
        pydensecrf(image[None], own[None])


def times(files: Sequence[Path], plan: Plan) -> str:
    """Return the table of times: medians over the rounds."""
    titles = ["size", "pydensecrf2", "one thread", "two threads"]
    lines = [[*titles, "ratio, one thread", "ratio, two threads", "ratio of CPU time, one thread"]]
    for size in plan.timed:
        inputs = draw(files, size)
        calls: dict[str, Callable[[], None]] = {
            "theirs": partial(loop, *inputs),
            "one": partial(with_threads, 1, *inputs),
            "two": partial(with_threads, 2, *inputs),
        }
        wall: dict[str, list[float]] = {name: [] for name in calls}
        cpu: dict[str, list[float]] = {name: [] for name in calls}
        for index in range(1 + plan.rounds):
            for name, call in calls.items():
                started = time.perf_counter(), time.thread_time()
                call()
                ended = time.perf_counter(), time.thread_time()
                if index > 0:  # the first round warms up
                    wall[name].append(1000 * (ended[0] - started[0]))
                    cpu[name].append(1000 * (ended[1] - started[1]))
        ratios = [ratio(wall["theirs"], wall[name]) for name in ("one", "two")] + [ratio(cpu["theirs"], cpu["one"])]
        cells = [f"{statistics.median(one):.0f} ms ({min(one):.0f} to {max(one):.0f})" for one in wall.values()]
        lines.append([str(size), *cells, *(f"{one:.1f}" for one in ratios)])
    return (
        f"Medians of {plan.rounds} rounds (fastest to slowest), all called in turn. pydensecrf2 has one thread. Ratios"
        " are its time divided by that of `DenseCRF`; other processes disturb the time of the processor (CPU) less.\n\n"
        f"{markdown(lines)}"
    )


def ratio(theirs: Sequence[float], ours: Sequence[float]) -> float:
    """Return the median of the ratios of neighbouring calls."""
    return statistics.median(one / other for one, other in zip(theirs, ours, strict=True))


def memory(files: Sequence[Path], plan: Plan) -> str:
    """Return the table of peak memory."""
    torch.set_num_threads(1)
    lines = [["size", "pydensecrf2, bytes per pixel", "`DenseCRF`, bytes per pixel"]]
    for size in plan.memory:
        image, scores = draw(files, size)
        cells = []
        for call in (lambda: pydensecrf(image, scores, 1), lambda: DenseCRF(1)(image, scores)):  # noqa: B023
            mib = resident_memory(call)
            cells.append("-" if mib is None else f"{mib * 2**20 / (size.height * size.width):.0f}")
        lines.append([str(size), *cells])
    return f"By how much a call raises the peak of the process, the result included.\n\n{markdown(lines)}"


def lattice_errors(files: Sequence[Path], plan: Plan) -> str:
    """Return the table of errors on small photographs."""
    torch.set_num_threads(1)
    height, width = plan.exact
    lines = [["sigma of position", "of colour", "normalised: relative RMS error", "not normalised: sum / exact sum"]]
    for sigma_xy, sigma_rgb in SIGMAS:
        errors, ratios = [], []
        for file in files:
            image = None if sigma_rgb is None else photograph(file, height, width)
            values = smooth_scores(3, height, width)
            sigmas = (sigma_xy, sigma_rgb or 1.0)
            ours, exact = (bilateral_filter(values, image, *sigmas, True, name) for name in ("cpp", "eager"))
            errors.append(float((ours - exact).norm() / exact.norm()))
            ours, exact = (bilateral_filter(values, image, *sigmas, False, name) for name in ("cpp", "eager"))
            ratios.append(float(ours.sum() / exact.sum()))
        colour = "-" if sigma_rgb is None else f"{sigma_rgb:g}"
        spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
        lines.append([f"{sigma_xy:g}", colour, f"{100 * np.mean(errors):.1f} %", spread])
    equal, mean, energies = [], [], []
    for file in files:
        image, scores = photograph(file, height, width), smooth_scores(5, height, width)
        ours, exact = (DenseCRF(backend=name)(image, scores) for name in ("cpp", "eager"))
        equal.append(float((ours.argmax(dim=1) == exact.argmax(dim=1)).float().mean()))
        mean.append(float((ours - exact).abs().mean()))
        rois, labels = torch.ones(1, height, width), torch.full((1, 1, height, width), 255)
        one, other = (
            DenseEnergyLoss(1e-7, 15, 100, 0.5, name)(image, scores, rois, labels) for name in ("cpp", "eager")
        )
        energies.append(float(one / other))
    return (
        f"{len(files)} photographs of {width} x {height} pixels.\n\n{markdown(lines)}\n\n"
        f"`DenseCRF` with the lattice and with exact sums, 5 classes: {100 * np.mean(equal):.1f} % equal labels, mean"
        f" difference of the marginals {np.mean(mean):.1e}. `DenseEnergyLoss`: {min(energies):.2f} to"
        f" {max(energies):.2f} times the exact value."
    )


if __name__ == "__main__":
    sys.exit(main())
