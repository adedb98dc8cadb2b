"""From image files to masks, image by image: first the network, then the choice of classes, also with a CRF."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from ..dataset.errors import DataError
from ..model import CAMNet, Network
from ..settings import Settings
from .crf import crf_segment, start_workers
from .masks import multi_scale_masks, segment
from .pictures import Picture, read_picture
from .sources import Source, name_clashes


class SoftMasks(NamedTuple):
    """Masks [C + 1, H, W], background first; probabilities [C]; the classes that are kept, as bool [C]."""

    masks: Tensor
    probabilities: Tensor
    kept: Tensor


class Result(NamedTuple):
    """One image and its soft masks."""

    source: Source
    picture: Picture
    soft: SoftMasks


class Segmenter:
    """A network with its settings at test time."""

    def __init__(
        self,
        model: Network,
        settings: Settings,
        device: torch.device,
        flip: bool = True,
        cam_background: float = CAMNet.background,
        pad_to: int | None = None,
    ) -> None:
        self.model = model.to(device)
        self.settings = settings
        self.device = device
        self.flip = flip
        self.cam_background = cam_background
        self.pad_to = pad_to

    def __call__(self, picture: Picture, labels: frozenset[int] | None = None) -> SoftMasks:
        """Return the soft masks of a picture. If its labels are given, they are the classes that are kept."""
        image = picture.tensor().to(self.device)
        masks, probabilities = multi_scale_masks(self.model, image, self.settings.scales, self.flip, self.pad_to)
        if not (masks.isfinite().all() and probabilities.isfinite().all()):
            raise DataError("the network's masks are not finite")
        if isinstance(self.model, CAMNet):
            masks[0] = self.cam_background
        else:
            masks[0] = masks[0] ** self.settings.background_power
        if labels is None:
            kept = probabilities >= self.settings.min_probability
        else:
            kept = torch.zeros_like(probabilities, dtype=torch.bool)
            kept[list(labels)] = True
        return SoftMasks(masks, probabilities, kept)


def segment_images(
    sources: Sequence[Source], segmenter: Segmenter, max_pixels: int, report: Callable[[Path, str], object]
) -> Iterator[Result]:
    """Run the network on the images; an image that cannot be segmented is reported with the reason and left out."""
    clashes = name_clashes(sources)
    for source in tqdm(sources, "segmenting", unit="image", leave=False):
        if source.path in clashes:
            report(source.path, f"its mask would overwrite that of {clashes[source.path]}")
            continue
        try:
            picture = read_picture(source.path, max_pixels)
            soft = segmenter(picture, source.labels)
        except DataError as error:
            report(source.path, str(error))
        except (MemoryError, torch.cuda.OutOfMemoryError):
            report(source.path, "not enough memory: try a lower --max-pixels, or smaller --scales")
        else:
            yield Result(source, picture, soft)


def choose_classes(soft: SoftMasks) -> NDArray[np.uint8]:
    """Return class indices [H, W]: the highest mask of every pixel among the background and the kept classes."""
    chosen = segment(soft.masks, soft.kept.to(soft.masks.dtype), min_probability=0.5)
    return chosen.to(torch.uint8).cpu().numpy()


def with_crf(results: Iterable[Result], workers: int) -> Iterator[tuple[Result, NDArray[np.uint8]]]:
    """Yield every result with its class indices after a CRF, computed in worker processes beside the network."""
    waiting: deque[tuple[Result, Future[NDArray[np.uint8]]]] = deque()
    pool = start_workers(workers)
    try:
        for result in results:
            masks, _, kept = result.soft
            indices = [0, *(1 + kept.nonzero().flatten()).tolist()]
            chosen = masks[indices].cpu().numpy()
            waiting.append((result, pool.submit(crf_segment, result.picture.pixels, chosen, indices)))
            if len(waiting) > 2 * workers:  # a bound on memory
                earlier, mask = waiting.popleft()
                yield earlier, mask.result()
        for earlier, mask in waiting:
            yield earlier, mask.result()
    finally:
        pool.shutdown(cancel_futures=True)
