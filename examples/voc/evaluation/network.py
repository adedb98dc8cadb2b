"""A network's masks on a test set, and its pseudo labels on training images: IoU per class, and pictures."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from ..backbones import normalise
from ..dataset.images import IGNORE
from ..dataset.splits import VOCDataset
from ..inference.masks import background_mask, highest, multi_scale_masks, segment
from ..inference.refine import refine_masks
from ..model import CAMNet, Network
from ..self_supervision import labels_from_masks
from ..settings import Refinement, Settings
from ..train.distribution import Group
from .metrics import IoUMeter, average_precision, class_metrics, mean_iou

CAM_BACKGROUNDS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)  # the first is the authors'


class Evaluation(NamedTuple):
    """Results on a test set in percent: IoU per class [C + 1] of every column, and average precision per class [C]."""

    iou: dict[str, Tensor]
    average_precision: Tensor


class PseudoLabelQuality(NamedTuple):
    """IoU per class [C + 1] over the pixels with a pseudo label, and the share of these pixels, both in percent."""

    iou: Tensor
    coverage: float
    num_images: int


@torch.no_grad()
def evaluate(
    model: Network,
    dataset: VOCDataset,
    settings: Settings,
    device: torch.device,
    group: Group,
    scales: Sequence[float] | None = None,
    flip: bool = True,
    refine: Refinement = "none",
    backgrounds: Sequence[float] = CAM_BACKGROUNDS,
) -> Evaluation:
    """Evaluate the single-stage model, or CAM-GAP with a column for every background score.

    With `refine`, every column is followed by one for the refined masks, such as "ours + PAR". Each process evaluates
    its share of the images; the result covers all images.
    """
    model.eval()
    is_cam = isinstance(model, CAMNet)
    names = [f"CAM-GAP (background {score})" for score in backgrounds] if is_cam else ["ours"]
    columns = names if refine == "none" else [column for name in names for column in (name, refined_name(name, refine))]
    meters = {column: IoUMeter(1 + len(dataset.split.classes)) for column in columns}
    for meter in meters.values():
        meter.confusion.to(device)
    scores = torch.zeros(len(dataset), 2, len(dataset.split.classes), device=device)  # probabilities and labels
    indices = range(group.rank, len(dataset), group.size)
    for index in tqdm(indices, "evaluating", leave=False, disable=group.rank > 0):
        sample = dataset[index]
        image, target = sample.image.to(device), sample.mask.to(device)
        masks, probabilities = multi_scale_masks(model, image, scales or settings.scales, flip)
        scores_or_power = backgrounds if is_cam else [settings.background_power]
        levels = [background_mask(model, masks, one) for one in scores_or_power]  # [H, W] each
        for name, level in zip(names, levels, strict=True):
            masks[0] = level
            meters[name].update(segment(masks, probabilities, settings.min_probability), target)
            if refine != "none":
                refined = refine_masks(image, masks, probabilities >= settings.min_probability, refine)
                meters[refined_name(name, refine)].update(highest(refined), target)
        scores[index] = torch.stack([probabilities, sample.labels.to(device)])
    if group.size > 1:
        torch.distributed.all_reduce(scores)  # every process has filled the rows of its images
    gathered, labels = scores.cpu().unbind(dim=1)
    return Evaluation({name: meter.iou().cpu() for name, meter in meters.items()}, average_precision(gathered, labels))


def evaluate_quickly(
    model: Network,
    dataset: VOCDataset,
    train_with_masks: VOCDataset,
    settings: Settings,
    device: torch.device,
    group: Group,
) -> Evaluation:
    """Evaluate at one scale: one column, for CAM-GAP that of the background score that is best on training images."""
    rows = range(1 + len(dataset.split.classes))
    backgrounds = cam_backgrounds(model, train_with_masks, rows, settings, device, group, scales=(1.0,), flip=False)
    return evaluate(model, dataset, settings, device, group, scales=(1.0,), flip=False, backgrounds=backgrounds[-1:])


def refined_name(column: str, refine: Refinement) -> str:
    """Return the name of a column after refinement."""
    return f"{column} + {refine.upper()}"


def cam_backgrounds(
    model: Network,
    dataset: VOCDataset,
    rows: Sequence[int],
    settings: Settings,
    device: torch.device,
    group: Group,
    scales: Sequence[float] | None = None,
    flip: bool = True,
) -> tuple[float, ...]:
    """Return the background scores of CAM-GAP for the table: the authors' score, and the best one on training images.

    `dataset` has the training images with masks, so no score is chosen on test images. `rows` are the classes of the
    mean.
    """
    authors = CAM_BACKGROUNDS[0]
    if not isinstance(model, CAMNet) or len(dataset) == 0:
        return (authors,)
    iou = evaluate(model, dataset, settings, device, group, scales, flip).iou.values()
    best, _ = max(zip(CAM_BACKGROUNDS, iou, strict=True), key=lambda pair: mean_iou(pair[1], rows))
    return tuple(dict.fromkeys((authors, best)))


@torch.no_grad()
def evaluate_pseudo_labels(
    model: Network, dataset: VOCDataset, settings: Settings, device: torch.device, group: Group
) -> PseudoLabelQuality:
    """Compare the pseudo labels of whole training images with their masks. Void pixels do not count."""
    model.eval()
    none = 1 + len(dataset.split.classes)  # index of "no pseudo label" among the predictions
    meter = IoUMeter(1 + none)
    meter.confusion.to(device)
    for index in range(group.rank, len(dataset), group.size):
        sample = dataset[index]
        image, labels = sample.image[None].to(device), sample.labels[None].to(device)
        masks = model(normalise(image, model.backbone)).masks
        target = enlarge(labels_from_masks(image, masks, labels, settings), sample.mask.shape)
        meter.update(target.masked_fill(target == IGNORE, none), sample.mask.to(device))
    confusion = meter.confusion.compute().double().cpu()
    labelled = confusion[:none, :none]
    coverage = 100 * (labelled.sum() / confusion.sum()).item()
    return PseudoLabelQuality(class_metrics(labelled).iou, coverage, len(dataset))


class Pictures(NamedTuple):
    """Images, and for every title one mask per image."""

    images: list[Tensor]
    masks: dict[str, list[Tensor]]


@torch.no_grad()
def draw(model: Network, dataset: VOCDataset, settings: Settings, device: torch.device, count: int = 6) -> Pictures:
    """Return the first images: mask, refined mask, pseudo label of the masks at scale 1, and ground truth."""
    model.eval()
    samples = [dataset[index] for index in range(min(count, len(dataset)))]
    titles = ["mask", "pseudo label", "ground truth"]
    if settings.refine != "none":
        titles.insert(1, refined_name("mask", settings.refine))
    masks: dict[str, list[Tensor]] = {title: [] for title in titles}
    for sample in samples:
        image = sample.image.to(device)
        averaged, probabilities = multi_scale_masks(model, image, settings.scales)
        coarse = model(normalise(image[None], model.backbone)).masks
        target = labels_from_masks(image[None], coarse, sample.labels[None].to(device), settings)
        background = CAM_BACKGROUNDS[0] if isinstance(model, CAMNet) else settings.background_power
        averaged[0] = background_mask(model, averaged, background)
        masks["mask"].append(segment(averaged, probabilities, settings.min_probability).cpu())
        if settings.refine != "none":
            kept = probabilities >= settings.min_probability
            refined = highest(refine_masks(image, averaged, kept, settings.refine))
            masks[refined_name("mask", settings.refine)].append(refined.cpu())
        masks["pseudo label"].append(enlarge(target, sample.mask.shape).cpu())
        masks["ground truth"].append(sample.mask)
    return Pictures([sample.image for sample in samples], masks)


def enlarge(mask: Tensor, size: torch.Size) -> Tensor:
    """Resize class indices [1, h, w] to [H, W]; each pixel takes the index of its nearest neighbour."""
    return F.interpolate(mask[:, None].float(), size=tuple(size), mode="nearest")[0, 0].to(mask.dtype)
