"""Segment images with a trained network: `python examples/infer_voc.py CHECKPOINT INPUT [--output DIR]`.

With a checkpoint of the authors: `python examples/infer_voc.py --released FILE --backbone wide_resnet38 INPUT`.
"""

import math
import sys
from collections.abc import Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import tyro
from numpy.typing import NDArray
from tqdm import tqdm
from tyro.conf import Positional
from voc.checkpoints import Trained, load_trained
from voc.dataset.errors import DataError
from voc.dataset.images import IGNORE
from voc.devices import choose_device
from voc.inference.crf import check_crf
from voc.inference.outputs import write_mask, write_overlay, write_scores, write_soft
from voc.inference.segmenter import Result, Segmenter, choose_classes, segment_images, with_crf
from voc.inference.sources import Source, add_labels, find_sources, split_sources
from voc.model import CAMNet
from voc.released import load_released
from voc.settings import BackboneName


@dataclass(frozen=True)
class Arguments:
    """Segment images with a trained network; no ground truth is needed.

    Masks are palette PNGs of class indices in VOC's colours, on the pixel grid of the stored image. An image that
    cannot be read is reported and skipped. Exit code: 0 all images done, 1 some skipped, 2 none done or wrong
    arguments.
    """

    checkpoint: Positional[Path]
    """Checkpoint of train_voc.py: of the single-stage network or of CAM-GAP. With --released, a file of the authors."""

    input: Positional[Path]
    """An image, a folder of images (without its subfolders), or with --split a data set in VOC's layout."""

    output: Path = Path("runs/predictions")
    """Folder for masks/NAME.png, and for what other arguments ask for."""

    released: bool = False
    """CHECKPOINT is a file of the authors' published network, for VOC's 20 classes; --backbone says which. The scales,
    the lowest probability and the power of the background are those of their configuration files."""

    backbone: BackboneName | None = None
    """Backbone of the published network, for --released."""

    split: str | None = None
    """Segment the images of ImageSets/Segmentation/SPLIT.txt."""

    clean: bool = False
    """Keep exactly the classes of an image's labels instead of the probable ones. `train_voc.py --supervision masks
    --masks DIR/masks` can train on these masks."""

    labels: Path | None = None
    """File of image-level labels for --clean, lines `id class class ...`. Default, with --split: Annotations/*.xml
    if there are any, else the classes of the ground truth."""

    scales: tuple[float, ...] | None = None
    """Scales of each image. Default: the checkpoint's."""

    flip: bool = True
    """Use the mirrored image too, at each scale."""

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
    6 GB of memory for the default backbone, 20 classes and the paper's scales."""

    overlays: bool = False
    """Also write overlays/NAME.jpg: the mask over the image as the network saw it, upright, and reduced if it is large.
    With --crf, also overlays_crf/NAME.jpg."""

    scores: bool = False
    """Also write scores.csv: the probability of each class in each image, of removed classes too."""

    soft: bool = False
    """Also write soft/NAME.npz: the masks before a class is chosen, for `evaluate_voc.py --clean`. Up to 15 MB
    per image of VOC."""

    crf: bool = False
    """Also write crf/NAME.png: the masks after a dense CRF (extra `crf`) of 10 iterations, with the parameters of the
    paper's authors."""

    workers: int = 2
    """Processes for --crf."""

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
        sources = find_all(arguments, trained.classes)
        if arguments.crf:
            check_crf()
        for name in folders(arguments):
            (arguments.output / name).mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:  # the errors of data and checkpoints are ValueErrors
        say(f"error: {error}")
        return 2
    return run(arguments, trained.classes, segmenter, sources)


def folders(arguments: Arguments) -> list[str]:
    """Return the names of the folders to write."""
    names = ["masks", "crf"] if arguments.crf else ["masks"]
    names += ["overlays", "overlays_crf"][: len(names)] if arguments.overlays else []
    return [*names, "soft"] if arguments.soft else names


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
    device = choose_device(arguments.device)
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


def run(arguments: Arguments, classes: Sequence[str], segmenter: Segmenter, sources: Sequence[Source]) -> int:
    """Segment the images and write the outputs. Returns the exit code."""
    scores: list[tuple[str, list[float]]] = []
    failed = False
    try:
        results = segment_images(
            sources, segmenter, arguments.max_pixels, lambda path, reason: say(f"skipped {path}: {reason}")
        )
        pairs = with_crf(results, arguments.workers) if arguments.crf else ((result, None) for result in results)
        for result, crf_mask in pairs:
            write_outputs(arguments, result, crf_mask)
            scores.append((result.source.name, result.soft.probabilities.tolist()))
        if arguments.scores and scores:
            write_scores(arguments.output / "scores.csv", classes, scores)
    except (OSError, BrokenProcessPool, MemoryError) as error:  # a full disk would stop the other images too
        say(f"error: {error}")
        failed = True
    except KeyboardInterrupt:
        say("stopped")
        return 130
    finally:
        tqdm.write(f"{len(scores)} of {len(sources)} images have a mask in {arguments.output / 'masks'}")
    return 2 if not scores else 1 if failed or len(scores) < len(sources) else 0


def write_outputs(arguments: Arguments, result: Result, crf_mask: NDArray[np.uint8] | None) -> None:
    """Write the files of one image; its mask comes last, so that a mask on the disk means that the others are there."""
    output, name, picture = arguments.output, result.source.name, result.picture
    if arguments.soft:
        write_soft(output / "soft" / f"{name}.npz", picture, result.soft)
    for mask, suffix in ((crf_mask, "_crf"), (choose_classes(result.soft), "")):
        if mask is not None:
            if arguments.overlays:
                write_overlay(output / f"overlays{suffix}" / f"{name}.jpg", picture, mask)
            write_mask(output / (suffix.removeprefix("_") or "masks") / f"{name}.png", picture, mask)


def say(message: str) -> None:
    """Print one line to stderr without breaking the progress bar; line breaks in names of files become spaces."""
    tqdm.write(f"infer_voc.py: {' '.join(message.splitlines())}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
