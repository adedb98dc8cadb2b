"""Segment images with a trained network: `python examples/infer_voc.py CHECKPOINT INPUT [--output DIR]`.

With a checkpoint of the authors: `python examples/infer_voc.py --released FILE --backbone wide_resnet38 INPUT`.
Several processes share the images: `torchrun --nproc-per-node 2 examples/infer_voc.py CHECKPOINT INPUT`, or the same
command started several times. Images that are done are not segmented again.
"""

import math
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import tyro
from tqdm import tqdm
from tyro.conf import Positional
from voc.checkpoints import Trained, load_trained
from voc.dataset.errors import DataError
from voc.dataset.images import IGNORE
from voc.devices import choose_device
from voc.inference.outputs import Outputs, write_scores
from voc.inference.pipeline import Outcome, Pipeline
from voc.inference.records import file_digest
from voc.inference.refine import refinement
from voc.inference.segmenter import Segmenter
from voc.inference.sharing import gather, join_group, leave_group, own_device
from voc.inference.sources import Source, add_labels, find_sources, split_sources
from voc.model import CAMNet
from voc.released import load_released
from voc.settings import BackboneName, Refinement


@dataclass(frozen=True)
class Arguments:
    """Segment images with a trained network; no ground truth is needed.

    Masks are palette PNGs of class indices in VOC's colours, on the pixel grid of the stored image. An image that
    cannot be read is reported and skipped. An image whose outputs were made by the same network and arguments is not
    segmented again. Exit code: 0 all images done, 1 some skipped, 2 none done or wrong arguments.
    """

    checkpoint: Positional[Path]
    """Checkpoint of train_voc.py: of the single-stage network or of CAM-GAP. With --released, a file of the authors."""

    input: Positional[Path]
    """An image, a folder of images (without its subfolders), or with --split a data set in VOC's layout."""

    output: Path = Path("runs/predictions")
    """Folder for masks/NAME.png, the masks of the network, and for the outputs of the other arguments."""

    released: bool = False
    """CHECKPOINT is a file of the authors' published network, for VOC's 20 classes; --backbone names its backbone. The
    scales, the lowest probability and the power of the background are those of their configuration files."""

    backbone: BackboneName | None = None
    """Backbone of the published network, for --released."""

    split: str | None = None
    """Segment the images of ImageSets/Segmentation/SPLIT.txt."""

    clean: bool = False
    """Keep exactly the classes of an image's labels instead of the probable ones. `train_voc.py --supervision masks
    --masks DIR/crf` can train on these masks."""

    labels: Path | None = None
    """File of image-level labels for --clean, lines `id class class ...`. Default, with --split: Annotations/*.xml
    if there are any, else the classes of the ground truth."""

    scales: tuple[float, ...] | None = None
    """Scales of each image. Default: the checkpoint's."""

    flip: bool = True
    """Also use the mirrored image, at each scale."""

    pad_to: int | None = None
    """Show the network every scaled image in the centre of a square of this side, with the mean colour around it. The
    authors use 1024 for wide_resnet38 and 768 for the other backbones. Padding changes the probabilities of classes.
    Default: no padding."""

    min_probability: float | None = None
    """Remove classes with a lower probability. Default: the checkpoint's."""

    background_power: float | None = None
    """Raise the background's mask to this power. Default: the checkpoint's."""

    cam_background: float | None = None
    """Score of the background at every pixel, for a CAM-GAP checkpoint. Default: 0.1."""

    max_pixels: int = 2_500_000
    """A larger image is reduced to this number of pixels, and its mask enlarged. With the default, an image needs up to
    6 GB of memory for EfficientNet-Lite0, 20 classes and the paper's scales."""

    refine: Refinement = "crf"
    """Also write the masks after a refinement that aligns them with the edges of the image, to a folder of this name.
    `crf` is 10 iterations of a dense CRF with the parameters of the paper's authors, on the CPU; `par` and `pamr` are
    20 iterations of PAR and PAMR. `none` writes masks/ only."""

    overlays: bool = False
    """Also write overlays/NAME.jpg: the mask before and after the refinement, over the image as the network saw it,
    upright, and reduced if it is large."""

    scores: bool = False
    """Also write scores.csv: the probability of each class in each image, including removed classes."""

    soft: bool = False
    """Also write soft/NAME.npz: the masks before a class is chosen, for `evaluate_voc.py --clean`. Up to 15 MB
    per image of VOC."""

    workers: int = 2
    """Number of threads that read images while the network runs, and of threads that refine and write."""

    device: str = "auto"
    """`auto` (cuda, then mps, then cpu) or any name that torch.device takes."""

    def __post_init__(self) -> None:
        """Refuse arguments without effect or out of range."""
        if self.labels is not None and not self.clean:
            raise ValueError("--labels is for --clean, which is not given")
        if self.min_probability is not None and self.clean:
            raise ValueError("--min-probability and --clean exclude each other")
        if self.min_probability is not None and not 0 <= self.min_probability <= 1:
            raise ValueError(f"--min-probability must be in [0, 1], got {self.min_probability}")
        if self.scales is not None and not (self.scales and all(map(math.isfinite, self.scales))):
            raise ValueError(f"--scales: expected one or more finite numbers, got {self.scales}")
        if self.cam_background is not None and not self.cam_background >= 0:
            raise ValueError(f"--cam-background must be at least 0, got {self.cam_background}")
        if self.released and self.backbone is None:
            raise ValueError("--released needs --backbone, the backbone of the published network")
        if self.backbone is not None and not self.released:
            raise ValueError("--backbone is for --released, which is not given: a checkpoint names its backbone")
        limits = {"max-pixels": self.max_pixels, "workers": self.workers, "pad-to": self.pad_to}
        for name, value in limits.items():
            if value is not None and value < 1:
                raise ValueError(f"--{name} must be at least 1, got {value}")


def main(argv: Sequence[str] | None = None) -> int:
    """Segment all images. Returns the exit code."""
    try:
        arguments = tyro.cli(Arguments, args=argv)
        if arguments.backbone is None:
            trained = load_trained(arguments.checkpoint)
        else:
            trained = load_released(arguments.checkpoint, arguments.backbone)
        segmenter = build_segmenter(trained, arguments)
        outputs = Outputs(arguments.output, folders(arguments), key_values(arguments))
        sources = find_all(arguments, trained.classes)
        outputs.make_folders()
    except (ValueError, OSError) as error:  # the errors of data and checkpoints are ValueErrors
        say(f"error: {error}")
        return 2
    except KeyboardInterrupt:
        say("stopped")
        return 130
    return run(arguments, trained.classes, segmenter, outputs, sources)


def folders(arguments: Arguments) -> list[str]:
    """Return the names of the folders to write."""
    wanted = {"masks": True, arguments.refine: arguments.refine != "none"}
    wanted |= {"overlays": arguments.overlays, "soft": arguments.soft}
    return [name for name, written in wanted.items() if written]


def key_values(arguments: Arguments) -> dict[str, Any]:
    """Return the values that all outputs depend on: the network and the arguments. Labels are compared per image."""
    others = {"checkpoint", "input", "split", "labels", "output", "scores", "workers", "device"}
    values = {name: value for name, value in asdict(arguments).items() if name not in others}
    return {**values, "checkpoint": file_digest(arguments.checkpoint)}


def build_segmenter(trained: Trained, arguments: Arguments) -> Segmenter:
    """Return the network with the checkpoint's settings, which the arguments override."""
    model, classes, settings = trained
    if len(classes) >= IGNORE:
        raise ValueError(f"a mask holds at most {IGNORE - 1} classes, the checkpoint has {len(classes)}")
    if isinstance(model, CAMNet) and arguments.background_power is not None:
        raise ValueError("--background-power is not for a CAM-GAP checkpoint: see --cam-background")
    if not isinstance(model, CAMNet) and arguments.cam_background is not None:
        raise ValueError("--cam-background is for a CAM-GAP checkpoint, which this is not: see --background-power")
    names = ("scales", "min_probability", "background_power")
    given = {name: value for name in names if (value := getattr(arguments, name)) is not None}
    cam_background = CAMNet.background if arguments.cam_background is None else arguments.cam_background
    device = choose_device(own_device(arguments.device))
    return Segmenter(model, replace(settings, **given), device, arguments.flip, cam_background, arguments.pad_to)


def find_all(arguments: Arguments, classes: Sequence[str]) -> list[Source]:
    """Return the images, with their labels if they are needed."""
    if arguments.split is None:
        root, sources = None, find_sources(arguments.input)
    else:
        root, sources = arguments.input, split_sources(arguments.input, arguments.split)
    written = {(arguments.output / name).resolve() for name in folders(arguments)}
    if written & {source.path.parent.resolve() for source in sources}:
        raise DataError(f"images of {arguments.input} would be overwritten: choose another --output")
    return add_labels(sources, classes, root, arguments.labels) if arguments.clean else sources


def run(
    arguments: Arguments, classes: Sequence[str], segmenter: Segmenter, outputs: Outputs, sources: Sequence[Source]
) -> int:
    """Segment the images, or this process's share of them, and write the outputs. Returns the exit code."""
    group = join_group()
    share = sources[group.rank :: group.size]
    found: list[tuple[Source, Outcome]] = []
    failed = False
    start = time.perf_counter()
    bar = tqdm(total=len(share), desc="segmenting", unit="image", leave=False, disable=group.rank > 0)

    def report(source: Source, outcome: Outcome) -> None:
        found.append((source, outcome))
        bar.update()
        if outcome.status == "skipped":
            say(f"skipped {source.path}: {outcome.reason}")

    try:
        refine = refinement(arguments.refine)
        with bar:
            Pipeline(segmenter, arguments.max_pixels, outputs, refine, arguments.workers).run(share, sources, report)
    except (OSError, MemoryError) as error:  # a full disk would stop the other images too
        say(f"error: {error}")
        failed = True
    except KeyboardInterrupt:
        say("stopped")
        summarise(arguments, [outcome for _, outcome in found], len(share), time.perf_counter() - start)
        return 130
    seconds = time.perf_counter() - start
    outcomes = [recheck_elsewhere(outcome, outputs, source) for source, outcome in found]
    shares = gather((outcomes, seconds, failed), group)
    outcomes = [outcome for share_outcomes, _, _ in shares for outcome in share_outcomes]
    failed = any(share_failed for _, _, share_failed in shares)
    if group.rank == 0:
        summarise(arguments, outcomes, len(sources), max(share_seconds for _, share_seconds, _ in shares))
        failed = not write_all_scores(arguments, classes, sources, outcomes) or failed
    # All processes end at once with the same code: if one ends earlier with an error, torchrun ends the others.
    code, *_ = gather(exit_code(outcomes, failed), group)
    leave_group()
    return code


def recheck_elsewhere(outcome: Outcome, outputs: Outputs, source: Source) -> Outcome:
    """Look again for the outputs of an image that another process was segmenting."""
    if outcome.status != "elsewhere":
        return outcome
    try:
        probabilities = outputs.find(source, outputs.key(source))
    except DataError:  # the image was deleted
        return outcome
    return outcome if probabilities is None else Outcome(source.name, "done before", probabilities)


def summarise(arguments: Arguments, outcomes: Sequence[Outcome], total: int, seconds: float) -> None:
    """Print how many images have a mask, and the speed of those that were segmented now."""
    count = Counter(outcome.status for outcome in outcomes)
    folder = arguments.output / ("masks" if arguments.refine == "none" else arguments.refine)
    line = f"{count['segmented'] + count['done before']} of {total} images have a mask in {folder}"
    if count["segmented"]:
        line += f"; {count['segmented']} new ones, {count['segmented'] / seconds:.2f} images per second"
    if count["elsewhere"]:
        line += f"; another process is segmenting {count['elsewhere']}"
    tqdm.write(line)


def write_all_scores(
    arguments: Arguments, classes: Sequence[str], sources: Sequence[Source], outcomes: Sequence[Outcome]
) -> bool:
    """Write the probabilities of all images with a mask, in the order of the images, if they are wanted."""
    known = {one.name: one.probabilities for one in outcomes if one.status in ("segmented", "done before")}
    lines = [(name, known[name]) for name in dict.fromkeys(source.name for source in sources) if name in known]
    try:
        if arguments.scores and lines:
            write_scores(arguments.output / "scores.csv", classes, lines)
    except OSError as error:
        say(f"error: {error}")
        return False
    return True


def exit_code(outcomes: Sequence[Outcome], failed: bool) -> int:
    """Return 0 if all images are done or in progress, 1 if some are skipped or a step failed, 2 if all are skipped."""
    skipped = sum(outcome.status == "skipped" for outcome in outcomes)
    if skipped == len(outcomes):
        return 2
    return 1 if failed or skipped else 0


def say(message: str) -> None:
    """Print one line to stderr without breaking the progress bar; line breaks in names of files become spaces."""
    tqdm.write(f"infer_voc.py: {' '.join(message.splitlines())}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
