"""Mean IoU after the dense CRF of pydensecrf2 and after `DenseCRF`, of the same soft masks."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from voc.checkpoints import load_trained
from voc.dataset.images import IGNORE
from voc.dataset.layout import class_indices, read_classes, read_split
from voc.dataset.splits import Sample, VOCDataset, load_split_with_masks
from voc.evaluation.metrics import mean_iou
from voc.evaluation.tables import markdown
from voc.inference.masks import multi_scale_masks

from benchmarks.crf_peer import pydensecrf
from benchmarks.voc_protocol import Candidates, Count, Cut, candidates

# Of the masks that are made from the ground truth. A network's masks are as coarse, and as certain of themselves.
STRIDE, NOISE, SHARPNESS = 32, 0.2, 20.0


class Compared(NamedTuple):
    """Mean IoU in percent by column, and the share of pixels with the same label after both."""

    miou: dict[str, float]
    equal: float
    num_images: int


@torch.no_grad()
def compare_iou(root: Path, num_images: int, checkpoint: Path | None, table_classes: Sequence[str]) -> Compared:
    """Compare on the first images of the split `val`, by the mean IoU of `table_classes` (none: all)."""
    classes = read_classes(root)
    names = ("background", *classes)
    indices = class_indices(table_classes or names, names, source="--table-classes")
    split = load_split_with_masks(root, read_split(root, "val"), classes).first(num_images)
    dataset = VOCDataset(split)
    counts = {name: Count(dataset) for name in ("masks", "pydensecrf2", "DenseCRF")}
    equal, total = 0, 0
    soft = soft_masks(dataset) if checkpoint is None else predicted_masks(dataset, checkpoint)
    for sample, found in soft:
        ours = found.refine_by_crf(sample.image)
        # As `refine_by_crf` does: the CRF sees the masks divided by their sum.
        probabilities = found.masks / found.masks.sum(dim=0).clamp(min=1e-30)
        theirs = found._replace(masks=pydensecrf(255 * sample.image[None], probabilities[None])[0])
        for name, one in {"masks": found, "pydensecrf2": theirs, "DenseCRF": ours}.items():
            counts[name].add(one.classify(), sample.mask)
        equal += int((ours.classify() == theirs.classify()).sum())
        total += sample.mask.numel()
    miou = {name: mean_iou(count.iou(), indices) for name, count in counts.items()}
    return Compared(miou, equal / total, len(dataset))


def predicted_masks(dataset: VOCDataset, checkpoint: Path) -> Iterator[tuple[Sample, Candidates]]:
    """Yield the images with the masks of a network of train_voc.py, with its own settings at test time."""
    model, classes, settings = load_trained(checkpoint)
    if classes != dataset.split.classes:
        raise ValueError(f"{checkpoint} was trained on other classes: {', '.join(classes)}")
    cut = Cut(settings.background_power, settings.min_probability)
    for index in range(len(dataset)):
        sample = dataset[index]
        masks, probabilities = multi_scale_masks(model, sample.image, settings.scales)
        yield sample, candidates(model, masks, probabilities, cut)


def soft_masks(dataset: VOCDataset) -> Iterator[tuple[Sample, Candidates]]:
    """Yield the images with masks of their classes made from the ground truth: reduced, with noise, enlarged again."""
    for index in range(len(dataset)):
        sample = dataset[index]
        classes = [0, *(1 + sample.labels.nonzero().flatten()).tolist()]
        yield sample, Candidates(blur(sample.mask, classes, index), classes)


def blur(mask: Tensor, classes: Sequence[int], seed: int) -> Tensor:
    """Return soft masks [K, H, W] of the classes of a mask [H, W]; void counts as background."""
    height, width = mask.shape
    one_hot = torch.stack([(mask == index) | ((mask == IGNORE) & (index == 0)) for index in classes]).float()
    size = (max(2, height // STRIDE), max(2, width // STRIDE))
    coarse = F.adaptive_avg_pool2d(one_hot[None], size)
    coarse = coarse + NOISE * torch.randn(coarse.shape, generator=torch.Generator().manual_seed(seed))
    return F.interpolate(SHARPNESS * coarse, size=(height, width), mode="bilinear").softmax(dim=1)[0]


def iou_text(compared: Compared, source: str) -> str:
    """Return the table."""
    titles = {"masks": "soft masks", "pydensecrf2": "after pydensecrf2", "DenseCRF": "after `DenseCRF`"}
    lines = [["", "mean IoU, %"], *([title, f"{compared.miou[name]:.2f}"] for name, title in titles.items())]
    return (
        f"{compared.num_images} images of the split `val`, {source}. Both CRFs see the same masks;"
        f" {100 * compared.equal:.3f} % of all pixels have the same label after both.\n\n{markdown(lines)}"
    )
