"""The comparison on VOC animals: what is chosen on which images, what is computed when, and the table."""

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("kornia", reason="the examples are not installed")

from voc.arguments import parse_arguments
from voc.dataset.images import IGNORE
from voc.dataset.layout import read_classes, read_split
from voc.dataset.splits import VOCDataset, load_split_with_masks
from voc.model import CAMNet, Output

from benchmarks import voc_animals, voc_protocol
from benchmarks.voc_protocol import Choice, Cut, Grid, Refinement, choose, measure
from tests import reference


class Ramps(nn.Module):
    """A network whose masks are functions of the image, and whose probabilities are spread over [0, 1]."""

    def __init__(self) -> None:
        super().__init__()
        self.offset = nn.Parameter(torch.zeros(()))
        self.backbone = nn.Module()
        self.backbone.mean, self.backbone.std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)  # type: ignore[assignment]

    def forward(self, image: Tensor) -> Output:
        red, green, blue = image.unbind(dim=1)
        logits = torch.stack([1.5 + 0 * red, 6 * red - 2, 6 * green - 2, 6 * blue - 2, 3 * red - blue, green], dim=1)
        scores = torch.tensor([[-2.5, -1.0, 0.2, -1.8, 3.0]])
        return Output(scores, logits, logits.softmax(dim=1))


class CamRamps(Ramps, CAMNet):  # the class decides how the background is used
    pass


@pytest.fixture(scope="module")
def dataset(toy_root: Path) -> VOCDataset:
    split = load_split_with_masks(toy_root, read_split(toy_root, "train"), read_classes(toy_root))
    return VOCDataset(split.first(3))


def iou(pairs: Sequence[tuple[Tensor, Tensor]], rows: Sequence[int]) -> Tensor:
    """Return the IoU per class in percent, counted pixel set by pixel set."""
    values = []
    for index in rows:
        both = sum(int(((predicted == index) & (target == index)).sum()) for predicted, target in pairs)
        either = sum(
            int((((predicted == index) & (target != IGNORE)) | (target == index)).sum()) for predicted, target in pairs
        )
        values.append(100 * both / either if either else float("nan"))
    return torch.tensor(values, dtype=torch.float64)


def masks_by_hand(image: Tensor, labels: Tensor, is_cam: bool, cut: Cut, given: bool) -> Tensor:
    """Return masks [6, H, W] with zeros in the removed classes; the network is pixel-wise, so no flip changes it."""
    output = Ramps()(image[None])
    masks = output.masks[0].detach().clone()
    probable = labels.bool() if given else output.class_scores[0].sigmoid() >= cut.min_probability
    masks[0] = cut.background if is_cam else masks[0] ** cut.background
    masks[1:][~probable] = 0
    return masks


@pytest.mark.parametrize("is_cam", [False, True])
def test_choices_have_the_highest_mean_iou_of_the_grid(
    dataset: VOCDataset, is_cam: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    refinements = (Refinement(1, (1, 2)), Refinement(3, (1, 4)))
    monkeypatch.setattr(voc_protocol, "REFINEMENTS", refinements)
    grid = Grid((0.1, 0.3, 0.6), (0.1, 0.3)) if is_cam else Grid((1.0, 2.0, 4.0), (0.1, 0.3))
    network = CamRamps.__new__(CamRamps) if is_cam else Ramps()
    if is_cam:
        Ramps.__init__(network)
    rows = [0, 1, 2, 3]
    found = choose(network, dataset, (1.0,), grid, ("pamr",), rows)  # type: ignore[arg-type]
    samples = [dataset[index] for index in range(len(dataset))]

    def mean(cut: Cut, given: bool, refinement: Refinement | None = None) -> float:
        pairs = []
        for sample in samples:
            masks = masks_by_hand(sample.image, sample.labels, is_cam, cut, given)
            if refinement is not None:
                masks = reference.pamr(sample.image[None], masks[None], refinement.num_iter, refinement.dilations)[0]
            pairs.append((masks.argmax(dim=0), sample.mask))
        return iou(pairs, rows).nanmean().item()

    for protocol, given in (("own", False), ("given", True)):
        cuts = [Cut(*values) for values in itertools.product(*grid)]
        cut, chosen = found[protocol]  # type: ignore[index]
        assert cut.background in grid.backgrounds
        assert mean(cut, given) == pytest.approx(max(mean(other, given) for other in cuts), abs=1e-3)
        means = {one: mean(cut, given, one) for one in refinements}
        assert means[chosen["pamr"]] == pytest.approx(max(means.values()), abs=1e-2)


def test_measured_columns(dataset: VOCDataset) -> None:
    choices: dict[Any, Choice] = {
        "own": Choice(Cut(2.0, 0.3), {"pamr": Refinement(2, (1, 3)), "par": Refinement(1, (2,))}),
        "given": Choice(Cut(1.0, 0.5), {"pamr": Refinement(1, (1,)), "par": Refinement(2, (1, 2))}),
    }
    found = measure(Ramps(), dataset, (1.0,), choices, ("pamr", "par"))  # type: ignore[arg-type]
    refine: dict[str, Any] = {"pamr": reference.pamr, "par": reference.par}
    for protocol, (cut, refinements) in choices.items():
        pairs: dict[str, list[tuple[Tensor, Tensor]]] = {"raw": [], "pamr": [], "par": []}
        for sample in (dataset[index] for index in range(len(dataset))):
            masks = masks_by_hand(sample.image, sample.labels, False, cut, protocol == "given")
            pairs["raw"].append((masks.argmax(dim=0), sample.mask))
            for name, (num_iter, dilations) in refinements.items():
                refined = refine[name](sample.image[None], masks[None], num_iter, dilations)[0]
                pairs[name].append((refined.argmax(dim=0), sample.mask))
        assert list(found[protocol]) == list(pairs)
        for name, column in found[protocol].items():
            torch.testing.assert_close(column, iou(pairs[name], range(6)), atol=0.02, rtol=0, equal_nan=True)
