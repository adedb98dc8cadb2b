"""Enlarge VOC's training set with SBD's masks: `python examples/prepare_sbd.py VOC_ROOT SBD_ROOT --output VOC_ROOT`."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from tyro.conf import Positional, arg
from voc.dataset.errors import DataError
from voc.dataset.sbd import KNOWN_COUNTS, AugmentedSet, find_sets, write_augmented_set


@dataclass(frozen=True)
class Arguments:
    """Make the training set of 10,582 images ("train_aug") from VOC and SBD, without VOC's validation images.

    Masks of class indices are written to OUTPUT/SegmentationClassAug; where VOC has a mask, it is used. The list of
    names is written to OUTPUT/ImageSets/Segmentation/train_aug.txt. Images that are missing in OUTPUT/JPEGImages are
    linked there.
    """

    voc_root: Annotated[Positional[Path], arg(metavar="VOC_ROOT")]
    """Root of Pascal VOC 2012 (.../VOCdevkit/VOC2012)."""

    sbd_root: Annotated[Positional[Path], arg(metavar="SBD_ROOT")]
    """Root of SBD, with cls/*.mat, img/*.jpg, train.txt and val.txt, or the folder benchmark_RELEASE around it."""

    output: Path
    """VOC_ROOT itself, or the folder of a new data set."""

    allow_other_counts: bool = False
    """Continue if the numbers of images differ from those of the full data sets."""


def main(argv: Sequence[str] | None = None) -> int:
    """Check the numbers of images, then write the data set. Returns the exit code."""
    try:
        arguments = tyro.cli(Arguments, args=argv)
        found = find_sets(arguments.voc_root, arguments.sbd_root)
        check_counts(found, arguments.allow_other_counts)
        images = found.images()
        from_sbd = sum(path.parent == found.sbd / "img" for path in images.values())
        print(f"image files: {len(images) - from_sbd} in VOC's JPEGImages, {from_sbd} only in SBD's img")
        write_augmented_set(found, images, arguments.output)
    except (ValueError, OSError) as error:  # DataError is a ValueError
        print("prepare_sbd.py: error:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return 130
    print(f"{len(found.train_aug)} images for training: {arguments.output}")
    return 0


def check_counts(found: AugmentedSet, allow_others: bool) -> None:
    """Print the numbers of images; raise an error if they differ from the known ones."""
    counts = found.counts()
    lines = {
        name: f"{name} {count}" + (f" (expected {KNOWN_COUNTS[name]})" if count != KNOWN_COUNTS[name] else "")
        for name, count in counts.items()
    }
    print("images: " + ", ".join(lines.values()))
    if counts != KNOWN_COUNTS and not allow_others:
        wrong = ", ".join(line for name, line in lines.items() if counts[name] != KNOWN_COUNTS[name])
        raise DataError(f"not the known counts: {wrong}; --allow-other-counts continues with these")


if __name__ == "__main__":
    sys.exit(main())
