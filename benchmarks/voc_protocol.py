"""From a trained network to IoU: choices on masks of the training split, then one look at the validation split."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm
from voc.crf import crf_marginals
from voc.dataset.splits import Sample, VOCDataset
from voc.evaluation.metrics import class_metrics, confusion_matrix, mean_iou
from voc.inference.masks import multi_scale_masks
from voc.model import CAMNet, Network

from wsseg_layers import PAMR, PAR

ColumnName = Literal["pamr", "par", "crf"]
ProtocolName = Literal["own", "given"]

# The classes of a mask are those that the network finds probable, or those of the image-level labels.
PROTOCOLS: tuple[ProtocolName, ...] = ("own", "given")

# The grids. Of choices with the same mean IoU, the first is taken.
ITERATIONS = (10, 20)
DILATIONS = ((1, 2, 4, 8, 12, 24), (1, 2, 4, 8, 16, 32, 64))


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
        return torch.tensor(self.classes, device=self.masks.device)[self.masks.argmax(dim=0)]

    def refine(self, image: Tensor, column: ColumnName, refinement: Refinement | None) -> "Candidates":
        """Return the candidates of a column, with an image [3, H, W] of the size of the masks.

        PAMR and PAR need a `refinement`, the CRF has none.
        """
        if column == "crf":
            return self.refine_by_crf(image)
        assert refinement is not None, f"{column} has no settings"
        num_iter, dilations = refinement
        layer = PAMR(num_iter, dilations) if column == "pamr" else PAR(dilations, num_iter)
        return self._replace(masks=layer(image[None], self.masks[None])[0])

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
    classes = [0, *(1 + (probabilities >= cut.min_probability).nonzero().flatten()).tolist()]
    chosen = masks[classes]
    chosen[0] = cut.background if isinstance(model, CAMNet) else chosen[0] ** cut.background
    return Candidates(chosen, classes)


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

    def mean(self, rows: Sequence[int]) -> float:
        """Return the mean IoU of the classes `rows`."""
        return mean_iou(self.iou(), rows)


class Seen:
    """An image, its masks, and the results of earlier calls of `classify`."""

    def __init__(self, model: Network, sample: Sample, scales: Sequence[float]) -> None:
        self.model = model
        self.sample = sample
        self.masks, probabilities = multi_scale_masks(model, sample.image, scales)
        self.probabilities: dict[ProtocolName, Tensor] = {"own": probabilities, "given": sample.labels}
        self.known: dict[Any, Tensor] = {}

    def classify(
        self, protocol: ProtocolName, cut: Cut, column: ColumnName | None = None, refinement: Refinement | None = None
    ) -> Tensor:
        """Return the class indices [H, W] of the raw masks, or of the refined masks of a column."""
        probabilities = self.probabilities[protocol]
        # Both protocols, and several cuts, often keep the same classes.
        kept = tuple((probabilities >= cut.min_probability).tolist())
        key = (kept, cut.background, column, refinement)
        if key not in self.known:
            found = candidates(self.model, self.masks, probabilities, cut)
            if column is not None:
                found = found.refine(self.sample.image, column, refinement)
            self.known[key] = found.classify()
        return self.known[key]


@torch.no_grad()
def see(model: Network, dataset: VOCDataset, scales: Sequence[float], description: str) -> Iterator[Seen]:
    """Yield every image of a set with its multi-scale masks."""
    device = next(model.parameters()).device
    model.eval()
    for index in tqdm(range(len(dataset)), description, unit="image", leave=False):
        sample = dataset[index]
        sample = sample._replace(**{key: getattr(sample, key).to(device) for key in ("image", "labels", "mask")})
        yield Seen(model, sample, scales)


def choose(
    model: Network,
    dataset: VOCDataset,
    scales: Sequence[float],
    grid: Grid,
    columns: Sequence[ColumnName],
    rows: Sequence[int],
) -> dict[ProtocolName, Choice]:
    """Return the settings with the highest mean IoU of the classes `rows` on a set of training images.

    First, the background and the lowest probability are chosen for the raw masks. Iterations and dilations follow with
    these settings, and then the background of every column.
    """
    cuts = {
        "own": [Cut(*values) for values in product(*grid)],
        "given": [Cut(background, 0.5) for background in grid.backgrounds],  # labels are 0 or 1
    }
    raw = {(protocol, cut): Count(dataset) for protocol in PROTOCOLS for cut in cuts[protocol]}
    for seen in see(model, dataset, scales, "choosing the cut"):
        for (protocol, cut), count in raw.items():
            count.add(seen.classify(protocol, cut), seen.sample.mask)
    chosen = {protocol: max(cuts[protocol], key=lambda cut: raw[protocol, cut].mean(rows)) for protocol in PROTOCOLS}
    names: list[ColumnName] = [column for column in columns if column != "crf"]
    refined = {key: Count(dataset) for key in product(PROTOCOLS, names, REFINEMENTS)}
    for seen in see(model, dataset, scales, "choosing the refinement") if names else ():
        for (protocol, name, refinement), count in refined.items():
            count.add(seen.classify(protocol, chosen[protocol], name, refinement), seen.sample.mask)
    refinements = {
        protocol: {name: max(REFINEMENTS, key=lambda one: refined[protocol, name, one].mean(rows)) for name in names}
        for protocol in PROTOCOLS
    }
    by_background = {key: Count(dataset) for key in product(PROTOCOLS, columns, grid.backgrounds)}
    for seen in see(model, dataset, scales, "choosing the backgrounds") if columns else ():
        for (protocol, column, background), count in by_background.items():
            cut = chosen[protocol]._replace(background=background)
            predicted = seen.classify(protocol, cut, column, refinements[protocol].get(column))
            count.add(predicted, seen.sample.mask)
    return {
        protocol: Choice(
            chosen[protocol],
            refinements[protocol],
            {
                column: max(grid.backgrounds, key=lambda one: by_background[protocol, column, one].mean(rows))
                for column in columns
            },
        )
        for protocol in PROTOCOLS
    }


def measure(
    model: Network,
    dataset: VOCDataset,
    scales: Sequence[float],
    choices: Mapping[ProtocolName, Choice],
    columns: Sequence[ColumnName],
) -> dict[ProtocolName, dict[str, Tensor]]:
    """Return the IoU per class [C + 1] in percent of every protocol, of the raw masks and of every column."""
    counts = {protocol: {column: Count(dataset) for column in ("raw", *columns)} for protocol in PROTOCOLS}
    for seen in see(model, dataset, scales, "measuring"):
        for protocol, (cut, refinements, backgrounds) in choices.items():
            counts[protocol]["raw"].add(seen.classify(protocol, cut), seen.sample.mask)
            for column in columns:
                with_background = cut._replace(background=backgrounds[column])
                predicted = seen.classify(protocol, with_background, column, refinements.get(column))
                counts[protocol][column].add(predicted, seen.sample.mask)
    return {protocol: {column: count.iou() for column, count in found.items()} for protocol, found in counts.items()}
