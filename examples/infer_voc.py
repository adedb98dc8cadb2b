"""Segment images with a trained network: `python examples/infer_voc.py CHECKPOINT INPUT [--output DIR]`."""

import math
import sys
from collections.abc import Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path

import tyro
from tqdm import tqdm
from tyro.conf import Positional
from voc.checkpoints import Trained, load_trained
from voc.crf import check_crf
from voc.data import IGNORE, DataError
from voc.devices import choose_device
from voc.model import CAMNet
from voc.pictures import Source, add_labels, find_sources, split_sources, write_outputs, write_scores
from voc.prediction import Predictor, choose, predict, refine


@dataclass(frozen=True)
class Arguments:
    """Segment images with a trained network; no ground truth is needed.

    Masks are palette PNGs of class indices in VOC's colours, on the pixel grid of the stored image. An image that
    cannot be read is named and skipped. Exit code: 0 all images done, 1 some skipped, 2 none done or wrong arguments.
    """

    checkpoint: Positional[Path]
    """Checkpoint of train_voc.py, of either model."""

    input: Positional[Path]
    """An image, a folder of images (not those in folders below it), or with --split a data set in VOC's layout."""

    output: Path = Path("runs/predictions")
    """Folder for masks/NAME.png and, if wanted, overlays/NAME.jpg and scores.csv."""

    split: str | None = None
    """Segment the images of ImageSets/Segmentation/SPLIT.txt."""

    clean: bool = False
    """Keep exactly the classes that are among an image's labels, instead of those that are probable: masks that
    `train_voc.py --supervision masks --masks DIR/masks` can train on."""

    labels: Path | None = None
    """File of image-level labels for --clean, lines `id class class ...`. Default, with --split: Annotations/*.xml
    where there are any, else the classes of the ground truth."""

    scales: tuple[float, ...] | None = None
    """Scales at which each image is looked at. Default: the checkpoint's."""

    flip: bool = True
    """Look at each image mirrored, too."""

    min_probability: float | None = None
    """Remove classes with a lower probability. Default: the checkpoint's."""

    background_power: float | None = None
    """Raise the background's mask to this power. Default: the checkpoint's."""

    cam_background: float | None = None
    """Score of the background at every pixel, for a CAM-GAP checkpoint. Default: 0.1."""

    max_pixels: int = 2_500_000
    """A larger image is reduced to so many pixels, and its mask enlarged. At the default, an image takes up to 6 GB of
    memory with the default backbone, 20 classes and the paper's scales."""

    overlays: bool = False
    """Also write the masks over the images, upright, and reduced where the network saw them reduced."""

    scores: bool = False
    """Also write the probability of each class in each image, whether it is kept or not."""

    crf: bool = False
    """Refine the masks by a dense CRF (extra `crf`): 10 iterations, with the parameters of the paper's authors."""

    workers: int = 2
    """Processes for --crf."""

    device: str = "auto"
    """`auto` (cuda, then mps, then cpu) or any name that torch.device takes."""

    def __post_init__(self) -> None:
        """Refuse arguments that would have no effect, or no sense."""
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
        for name, value in {"max-pixels": self.max_pixels, "workers": self.workers}.items():
            if value < 1:
                raise ValueError(f"--{name} must be at least 1, got {value}")


def main(argv: Sequence[str] | None = None) -> int:
    """Segment all images. Returns the exit code."""
    try:
        arguments = tyro.cli(Arguments, args=argv)
        trained = load_trained(arguments.checkpoint)
        predictor = build_predictor(trained, arguments)
        sources = find_all(arguments, trained.classes)
        if arguments.crf:
            check_crf()
        for name in ("masks", *(["overlays"] if arguments.overlays else [])):
            (arguments.output / name).mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:  # the errors of data and checkpoints are ValueErrors
        say(f"error: {error}")
        return 2
    return run(arguments, trained.classes, predictor, sources)


def build_predictor(trained: Trained, arguments: Arguments) -> Predictor:
    """Return the network with the checkpoint's settings, where the arguments say nothing else."""
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
    return Predictor(model, replace(settings, **given), device, arguments.flip, cam_background)


def find_all(arguments: Arguments, classes: Sequence[str]) -> list[Source]:
    """Return the images, with their labels if those are needed."""
    if arguments.split is None:
        root, sources = None, find_sources(arguments.input)
    else:
        root, sources = arguments.input, split_sources(arguments.input, arguments.split)
    written = {(arguments.output / name).resolve() for name in ("masks", "overlays")}
    if written & {source.path.parent.resolve() for source in sources}:
        raise DataError(f"images of {arguments.input} would be overwritten: choose another --output")
    return add_labels(sources, classes, root, arguments.labels) if arguments.clean else sources


def run(arguments: Arguments, classes: Sequence[str], predictor: Predictor, sources: Sequence[Source]) -> int:
    """Predict and write. Returns the exit code."""
    scores: list[tuple[str, list[float]]] = []
    failed = False
    try:
        results = predict(
            sources, predictor, arguments.max_pixels, lambda path, reason: say(f"skipped {path}: {reason}")
        )
        for result, mask in refine(results, arguments.workers) if arguments.crf else choose(results):
            name = result.source.name
            write_outputs(arguments.output, name, result.picture, mask, arguments.overlays)
            scores.append((name, result.prediction.probabilities.tolist()))
        if arguments.scores and scores:
            write_scores(arguments.output / "scores.csv", classes, scores)
    except (OSError, BrokenProcessPool, MemoryError) as error:  # a full disk would spoil the other images, too
        say(f"error: {error}")
        failed = True
    except KeyboardInterrupt:
        say("stopped")
        return 130
    finally:
        tqdm.write(f"{len(scores)} of {len(sources)} images have a mask in {arguments.output / 'masks'}")
    return 2 if not scores else 1 if failed or len(scores) < len(sources) else 0


def say(message: str) -> None:
    """Print one line to stderr, whatever names of files it holds, without breaking the progress bar."""
    tqdm.write(f"infer_voc.py: {' '.join(message.splitlines())}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
