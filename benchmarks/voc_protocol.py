"""From a trained network to IoU: choices on masks of the training split, then one look at the validation split."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import product
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor
from tqdm import tqdm
from voc.crf import crf_marginals
from voc.dataset.splits import Sample, VOCDataset
from voc.evaluation.metrics import class_metrics, confusion_matrix, mean_iou
from voc.inference.masks import background_mask, highest, multi_scale_masks
from voc.model import Network

from wsseg_layers import PAMR, PAR

ColumnName = Literal["pamr", "par", "crf"]
ProtocolName = Literal["own", "given"]

# The classes of a mask are those that the network finds probable, or those of the image-level labels.
PROTOCOLS: tuple[ProtocolName, ...] = ("own", "given")

# The grids. Of choices with the same mean IoU, the first is taken.
ITERATIONS = (10, 20)
DILATIONS = ((1, 2, 4, 8, 12, 24), (1, 2, 4, 8, 16, 32, 64))

# Bytes of masks that stay in memory from one choice to the next.
MAX_STORED = 4 * 2**30


class Grid(NamedTuple):
    """What may be chosen for the raw masks of a method: see `Cut`."""

    backgrounds: tuple[float, ...]
    min_probabilities: tuple[float, ...]


class Cut(NamedTuple):
    """How soft masks become classes.

    `background` is the power of the background's mask, or the background score of CAM-GAP. Classes with a probability
    below `min_probability` are removed.
    """

    background: float
    min_probability: float


class Refinement(NamedTuple):
    """The settings of PAMR or PAR on masks at the size of the image."""

    num_iter: int
    dilations: tuple[int, ...]


class Choice(NamedTuple):
    """What was chosen for one protocol.

    `cut` is that of the raw masks. Before a refinement, the background has the power or score in `backgrounds`.
    """

    cut: Cut
    refinements: dict[ColumnName, Refinement]
    backgrounds: dict[ColumnName, float]


REFINEMENTS = tuple(Refinement(*settings) for settings in product(ITERATIONS, DILATIONS))


class Candidates(NamedTuple):
    """The masks [K, H, W] of the K classes that a pixel may have, background first, and the indices of the classes."""

    masks: Tensor
    classes: list[int]

    def classify(self) -> Tensor:
        """Return the class index of the highest mask at every pixel, [H, W]."""
        return torch.tensor(self.classes, device=self.masks.device)[highest(self.masks)]

    def refine_by_crf(self, image: Tensor) -> "Candidates":
        """Return the candidates after the dense CRF, which has the settings of the paper's authors."""
        all_classes = torch.ones(1, len(self.classes), dtype=torch.bool)
        return self._replace(masks=crf_marginals(image[None], self.masks[None], all_classes)[0])


def candidates(model: Network, masks: Tensor, probabilities: Tensor, cut: Cut) -> Candidates:
    """Return the candidates of a pixel: the background and the classes that are probable enough.

    Args:
        model: the network that made the masks.
        masks: [C + 1, H, W], background first.
        probabilities: [C] in [0, 1].
        cut: the settings.
    """
    classes = kept_classes(probabilities, cut)
    chosen = masks[classes]
    chosen[0] = background_mask(model, masks, cut.background)
    return Candidates(chosen, classes)


def kept_classes(probabilities: Tensor, cut: Cut) -> list[int]:
    """Return the indices of the background and of the classes that are probable enough, of probabilities [C]."""
    return [0, *(1 + (probabilities >= cut.min_probability).nonzero()[:, 0]).tolist()]


class Count:
    """The confusion matrix of masks and ground truth; void pixels do not count."""

    def __init__(self, dataset: VOCDataset) -> None:
        self.num_classes = 1 + len(dataset.split.classes)
        self.confusion = torch.zeros(self.num_classes, self.num_classes, dtype=torch.int64)

    def add(self, predicted: Tensor, target: Tensor) -> None:
        """Add one image: class indices [H, W] and ground truth [H, W]."""
        self.confusion += confusion_matrix(predicted, target, self.num_classes).cpu()

    def iou(self) -> Tensor:
        """Return the IoU per class [C + 1] in percent."""
        return class_metrics(self.confusion).iou

    def mean(self, class_rows: Sequence[int]) -> float:
        """Return the mean IoU of the classes `class_rows`."""
        return mean_iou(self.iou(), class_rows)


class Setting(NamedTuple):
    """How an image is classified: raw masks if there is no column."""

    protocol: ProtocolName
    cut: Cut
    column: ColumnName | None = None
    refinement: Refinement | None = None


class Seen:
    """An image and its masks [C + 1, H, W].

    `classify` takes settings whose background is one of `backgrounds`. It keeps its results.
    """

    def __init__(
        self, model: Network, sample: Sample, masks: Tensor, probabilities: Tensor, backgrounds: Collection[float]
    ) -> None:
        self.model = model
        self.sample = sample
        self.masks = masks
        self.probabilities: dict[ProtocolName, Tensor] = {"own": probabilities, "given": sample.labels}
        self.backgrounds = backgrounds
        self.found: dict[Any, dict[float, Candidates]] = {}  # by background
        self.known: dict[Any, Tensor] = {}  # class indices

    def classify(self, setting: Setting) -> Tensor:
        """Return the class indices [H, W]."""
        protocol, cut, column, refinement = setting
        # Both protocols, and several cuts, often keep the same classes.
        classes = tuple(kept_classes(self.probabilities[protocol], cut))
        key = (classes, column, refinement, cut.background)
        if key not in self.known:
            if (classes, column, refinement) not in self.found:
                self.found[classes, column, refinement] = self.candidates(classes, column, refinement)
            found = self.found[classes, column, refinement][cut.background]
            if column == "crf":
                found = found.refine_by_crf(self.sample.image)
            self.known[key] = found.classify()
        return self.known[key]

    def candidates(
        self, classes: Sequence[int], column: ColumnName | None, refinement: Refinement | None
    ) -> dict[float, Candidates]:
        """Return the candidates of every background, after PAMR or PAR if there is a refinement."""
        levels = torch.stack([background_mask(self.model, self.masks, one) for one in self.backgrounds])  # [S, H, W]
        foreground = self.masks[list(classes[1:])]  # [K, H, W]
        if refinement is not None:
            # PAMR and PAR refine every mask by itself, so the backgrounds share one call.
            possible = contenders(levels, foreground)
            classes, foreground = [0, *(classes[1 + index] for index in possible)], foreground[possible]
            num_iter, dilations = refinement
            layer = PAMR(num_iter, dilations) if column == "pamr" else PAR(dilations, num_iter)
            refined = layer(self.sample.image[None], torch.cat([levels, foreground])[None])[0]
            levels, foreground = refined.split([len(levels), len(foreground)])
        return {
            background: Candidates(torch.cat([level[None], foreground]), list(classes))
            for background, level in zip(self.backgrounds, levels, strict=True)
        }


def contenders(levels: Tensor, foreground: Tensor) -> list[int]:
    """Return the indices of the foreground masks that can be the highest at a pixel after PAMR or PAR.

    PAMR and PAR replace the masks of a pixel by weighted sums over its neighbours, with the same weights for every
    mask. The highest of these sums is at least the weighted sum of the mean mask. So a mask that is lower everywhere
    than the minimum of the mean mask can never be the highest. This leaves out most masks when all classes are kept.

    Args:
        levels: the background's masks [S, H, W].
        foreground: the masks of the K classes [K, H, W].
    """
    # The lowest background has the lowest mean, so no mask is left out that is needed beside another background.
    mean = (levels.amin(dim=0) + foreground.sum(dim=0)) / (1 + len(foreground))  # [H, W]
    return (foreground.amax(dim=(1, 2)) >= mean.amin()).nonzero()[:, 0].tolist()


class Images:
    """The images of a set with the multi-scale masks of a network.

    The masks of an image are stored if there is room for them in `max_bytes`. Then the next pass does not run the
    network on this image again. Masks that no choice uses are not stored: those of classes that are neither in the
    image-level labels nor at least as probable as `min_probability`.
    """

    def __init__(
        self, model: Network, dataset: VOCDataset, scales: Sequence[float], min_probability: float, max_bytes: int
    ) -> None:
        self.model = model.eval()
        self.dataset = dataset
        self.scales = scales
        self.min_probability = min_probability
        self.max_bytes = max_bytes
        self.stored: dict[int, tuple[Tensor, Tensor, Tensor]] = {}  # see `look`
        self.stored_bytes = 0

    @torch.no_grad()
    def see(self, description: str, backgrounds: Collection[float]) -> Iterator[Seen]:
        """Yield every image, to be classified with these backgrounds."""
        device = next(self.model.parameters()).device
        for index in tqdm(range(len(self.dataset)), description, unit="image", leave=False):
            sample = self.dataset[index]
            sample = sample._replace(**{key: getattr(sample, key).to(device) for key in ("image", "labels", "mask")})
            stored, rows, probabilities = self.stored.get(index) or self.look(index, sample)
            masks = stored.new_zeros(1 + len(probabilities), *stored.shape[1:])
            masks[rows] = stored
            yield Seen(self.model, sample, masks, probabilities, backgrounds)

    def look(self, index: int, sample: Sample) -> tuple[Tensor, Tensor, Tensor]:
        """Return the stored masks [K, H, W], their rows [K] of all masks, and the probabilities [C]."""
        masks, probabilities = multi_scale_masks(self.model, sample.image, self.scales)
        possible = (probabilities >= self.min_probability) | (sample.labels > 0)
        rows = torch.cat([possible.new_ones(1), possible]).nonzero()[:, 0]
        found = (masks[rows], rows, probabilities)
        size = found[0].nbytes
        if self.stored_bytes + size <= self.max_bytes:
            self.stored[index] = found
            self.stored_bytes += size
        return found


Key = TypeVar("Key")


def best_settings(
    images: Images, groups: Mapping[Key, Sequence[Setting]], class_rows: Sequence[int], description: str
) -> dict[Key, Setting]:
    """Return the setting of every group with the highest mean IoU of the classes `class_rows`."""
    counts = {one: Count(images.dataset) for group in groups.values() if len(group) > 1 for one in group}
    backgrounds = {setting.cut.background for setting in counts}
    for seen in images.see(description, backgrounds) if counts else ():
        for setting, count in counts.items():
            count.add(seen.classify(setting), seen.sample.mask)
    means = {setting: count.mean(class_rows) for setting, count in counts.items()}
    return {key: max(group, key=lambda one: means.get(one, 0.0)) for key, group in groups.items()}


def choose(
    model: Network,
    dataset: VOCDataset,
    scales: Sequence[float],
    grid: Grid,
    columns: Sequence[ColumnName],
    class_rows: Sequence[int],
) -> dict[ProtocolName, Choice]:
    """Return the settings with the highest mean IoU of the classes `class_rows` on a set of training images.

    First, the background and the lowest probability are chosen for the raw masks. Iterations and dilations follow with
    these settings, and then the background of every column.
    """
    images = Images(model, dataset, scales, min(grid.min_probabilities), MAX_STORED)
    cuts = {
        "own": [Cut(*values) for values in product(*grid)],
        "given": [Cut(background, 0.5) for background in grid.backgrounds],  # labels are 0 or 1
    }
    raw = best_settings(
        images, {one: [Setting(one, cut) for cut in cuts[one]] for one in PROTOCOLS}, class_rows, "choosing the cut"
    )
    refined = best_settings(
        images,
        {
            (protocol, column): [raw[protocol]._replace(column=column, refinement=one) for one in settings_of(column)]
            for protocol, column in product(PROTOCOLS, columns)
        },
        class_rows,
        "choosing the refinement",
    )
    with_background = best_settings(
        images,
        {
            key: [one._replace(cut=one.cut._replace(background=background)) for background in grid.backgrounds]
            for key, one in refined.items()
        },
        class_rows,
        "choosing the backgrounds",
    )
    chosen = {}
    for protocol in PROTOCOLS:
        of_columns = {column: with_background[protocol, column] for column in columns}
        refinements = {column: one.refinement for column, one in of_columns.items() if one.refinement is not None}
        backgrounds = {column: one.cut.background for column, one in of_columns.items()}
        chosen[protocol] = Choice(raw[protocol].cut, refinements, backgrounds)
    return chosen


def settings_of(column: ColumnName) -> Sequence[Refinement | None]:
    """Return what may be chosen for a column; the CRF has no choice."""
    return (None,) if column == "crf" else REFINEMENTS


def measure(
    model: Network,
    dataset: VOCDataset,
    scales: Sequence[float],
    choices: Mapping[ProtocolName, Choice],
    columns: Sequence[ColumnName],
) -> dict[ProtocolName, dict[str, Tensor]]:
    """Return the IoU per class [C + 1] in percent of every protocol, of the raw masks and of every column."""
    settings: dict[ProtocolName, dict[str, Setting]] = {}
    for protocol, (cut, refinements, backgrounds) in choices.items():
        settings[protocol] = {"raw": Setting(protocol, cut)}
        for column in columns:
            with_background = cut._replace(background=backgrounds[column])
            settings[protocol][column] = Setting(protocol, with_background, column, refinements.get(column))
    counts = {protocol: {name: Count(dataset) for name in named} for protocol, named in settings.items()}
    cuts = [setting.cut for named in settings.values() for setting in named.values()]
    images = Images(model, dataset, scales, min(cut.min_probability for cut in cuts), max_bytes=0)
    for seen in images.see("measuring", {cut.background for cut in cuts}):
        for protocol, named in settings.items():
            for name, setting in named.items():
                counts[protocol][name].add(seen.classify(setting), seen.sample.mask)
    return {protocol: {name: count.iou() for name, count in found.items()} for protocol, found in counts.items()}
