"""The quality of pseudo labels, counted by hand; and the pseudo labels of the settings."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from PIL import Image
from torch import Tensor, nn
from voc.dataset.errors import DataError
from voc.dataset.images import IGNORE, save_mask
from voc.dataset.layout import read_classes, read_split
from voc.dataset.splits import VOCDataset, first_with_masks, load_split
from voc.evaluation.network import evaluate, evaluate_pseudo_labels
from voc.inference.masks import multi_scale_masks
from voc.inference.refine import refine_masks
from voc.model import Output, resize
from voc.presets import PAPER
from voc.self_supervision import labels_from_masks
from voc.train.distribution import ALONE, Group

from tests.no_backbone import NoBackbone
from wsseg_layers import PAMR, DenseCRF
from wsseg_layers.functional import threshold_pseudo_labels


class Halves(nn.Module):
    """A network that is sure of the background in the left half, of class 2 on the right, and unsure in a stripe."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = NoBackbone()

    def forward(self, image: Tensor) -> Output:
        masks = torch.full((1, 6, *image.shape[-2:]), 0.02)
        half = image.shape[-1] // 2
        masks[:, 0, :, : half - 4] = 0.9
        masks[:, 2, :, half:] = 0.9
        return Output(masks[:, 1:].amax(dim=(2, 3)), masks, masks)


@pytest.fixture
def dataset(toy_root: Path) -> VOCDataset:
    classes = read_classes(toy_root)
    split = load_split(toy_root, read_split(toy_root, "train"), classes)
    with_flag = [index for index, labels in enumerate(split.labels) if 1 in labels][:2]
    return VOCDataset(
        replace(
            split,
            names=tuple(split.names[index] for index in with_flag),
            images=tuple(split.images[index] for index in with_flag),
            labels=tuple(frozenset({1}) for _ in with_flag),
            masks=tuple(toy_root / f"SegmentationClass/{split.names[index]}.png" for index in with_flag),
        )
    )


def test_quality_of_pseudo_labels(dataset: VOCDataset) -> None:
    settings = replace(PAPER, pamr_iterations=0)
    quality = evaluate_pseudo_labels(Halves(), dataset, settings, torch.device("cpu"), ALONE)  # type: ignore[arg-type]
    pairs = []
    for sample in (dataset[index] for index in range(len(dataset))):
        half = sample.mask.shape[1] // 2
        for column in range(sample.mask.shape[1]):
            label = 0 if column < half - 4 else None if column < half else 2
            pairs += [(label, true) for true in sample.mask[:, column].tolist() if true != IGNORE]
    labelled = [pair for pair in pairs if pair[0] is not None]
    assert quality.coverage == pytest.approx(100 * len(labelled) / len(pairs))
    assert quality.num_images == len(dataset) == 2
    for index in range(6):
        both = sum(pair == (index, index) for pair in labelled)
        either = sum(index in pair for pair in labelled)
        expected = 100 * both / either if either else float("nan")
        assert quality.iou[index].item() == pytest.approx(expected, nan_ok=True)


@pytest.mark.parametrize("method", ["par", "crf"])
def test_a_column_of_refined_masks(method: Any, dataset: VOCDataset) -> None:
    settings = replace(PAPER, scales=(1.0,), background_power=2.0)
    device, title = torch.device("cpu"), f"ours + {method.upper()}"
    iou = evaluate(Halves(), dataset, settings, device, ALONE, refine=method).iou  # type: ignore[arg-type]
    assert list(iou) == ["ours", title]
    both, either = np.zeros(6), np.zeros(6)
    for sample in (dataset[index] for index in range(len(dataset))):
        masks, probabilities = multi_scale_masks(Halves(), sample.image)  # type: ignore[arg-type]
        masks[0] = masks[0] ** 2
        refined = refine_masks(sample.image, masks, probabilities >= 0.1, method).argmax(dim=0).numpy()
        truth = sample.mask.numpy()
        for index in range(6):
            found, true = (refined == index) & (truth != IGNORE), truth == index
            both[index] += (found & true).sum()
            either[index] += (found | true).sum()
    with np.errstate(invalid="ignore"):
        np.testing.assert_allclose(iou[title].numpy(), 100 * both / either, rtol=1e-5)
    assert not torch.equal(iou["ours"], iou[title])
    assert list(evaluate(Halves(), dataset, settings, device, ALONE).iou) == ["ours"]  # type: ignore[arg-type]


def test_images_without_masks_are_left_out(toy_root: Path, tmp_path: Path) -> None:
    split = load_split(toy_root, read_split(toy_root, "train"), read_classes(toy_root))
    assert len(first_with_masks(tmp_path, split, 5)) == 0
    (tmp_path / "SegmentationClassAug").mkdir()
    with Image.open(split.images[1]) as image:
        width, height = image.size
    for index in (1, 4, 7):
        save_mask(tmp_path / f"SegmentationClassAug/{split.names[index]}.png", np.zeros((height, width), np.uint8))
    found = first_with_masks(tmp_path, split, 2)
    assert found.names == (split.names[1], split.names[4])
    assert found.labels == (split.labels[1], split.labels[4])
    assert found.images == (split.images[1], split.images[4])
    assert [path.stem for path in found.masks] == list(found.names)
    for mask, message in ((np.zeros((2, 2), np.uint8), "is 2x2, but its image"), (np.full((height, width), 77), "77")):
        save_mask(tmp_path / f"SegmentationClassAug/{split.names[4]}.png", mask.astype(np.uint8))
        with pytest.raises(DataError, match=message):
            first_with_masks(tmp_path, split, 2)


def test_pseudo_labels_of_the_settings() -> None:
    torch.manual_seed(0)
    image, masks = torch.rand(2, 3, 24, 20), (3 * torch.randn(2, 4, 6, 5)).softmax(dim=1)
    labels = torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 0.0]])
    settings = replace(PAPER, pamr_iterations=2, pamr_dilations=(1, 2))
    # Pillow's bilinear resizing has the same antialiasing.
    pictures = [Image.fromarray(channel.numpy()) for channel in image.flatten(0, 1)]
    channels = [picture.resize((5, 6), Image.Resampling.BILINEAR) for picture in pictures]
    small = torch.from_numpy(np.stack([np.asarray(channel) for channel in channels])).view(2, 3, 6, 5)
    published = PAMR(2, (1, 2))(small, masks)
    printed = PAMR(2, (1, 2), "paper")(small, masks)
    assert not torch.equal(published, printed)
    assert torch.equal(labels_from_masks(image, masks, labels, settings), threshold_pseudo_labels(published, labels))
    found = labels_from_masks(image, masks, labels, replace(settings, pamr_variant="paper"))
    assert torch.equal(found, threshold_pseudo_labels(printed, labels))
    refined = resize(PAMR(2, (1, 2), resize="image")(image, masks), (24, 20))  # bilinear, no antialiasing
    expected = threshold_pseudo_labels(refined, labels, discard="all")
    assert torch.equal(labels_from_masks(image, masks, labels, replace(settings, loss="published")), expected)


@pytest.mark.parametrize("loss", ["paper", "published"])
def test_pseudo_labels_of_the_crf(loss: Any) -> None:
    image, masks = torch.rand(2, 3, 24, 20), (3 * torch.randn(2, 4, 6, 5)).softmax(dim=1)
    labels = torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 0.0]])
    found = labels_from_masks(image, masks, labels, replace(PAPER, pseudo_labels="crf", loss=loss))
    expected: list[Tensor] = []
    for one, mask, kept in zip(image, masks, ([0, 1, 3], [0, 2]), strict=True):
        refined = torch.zeros(1, 4, 24, 20)
        large = resize(mask[None, kept], (24, 20))
        refined[:, kept] = DenseCRF()(255 * one[None], large / large.sum(dim=1, keepdim=True))
        size, discard = ((24, 20), "all") if loss == "published" else ((6, 5), "classes")
        own = labels[len(expected)][None]
        expected.append(threshold_pseudo_labels(resize(refined, size), own, discard=discard))  # type: ignore[arg-type]
    assert torch.equal(found, torch.cat(expected))
    assert found.unique().numel() > 1


def test_each_process_has_its_share(dataset: VOCDataset) -> None:
    settings = replace(PAPER, pamr_iterations=0)
    shares = [
        evaluate_pseudo_labels(Halves(), dataset, settings, torch.device("cpu"), Group(rank, 2))  # type: ignore[arg-type]
        for rank in range(2)
    ]
    assert not torch.equal(shares[0].iou.nan_to_num(), shares[1].iou.nan_to_num())


def evaluate_with_another_process(rank: int, store: str, dataset: VOCDataset, results: dict[int, list[Tensor]]) -> None:
    """Evaluate a data set together with another process."""
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    found = evaluate(Halves(), dataset, PAPER, torch.device("cpu"), Group(rank, 2))  # type: ignore[arg-type]
    results[rank] = [found.iou["ours"], found.average_precision]
    dist.destroy_process_group()


def test_more_processes_than_images(dataset: VOCDataset, tmp_path: Path) -> None:
    one = VOCDataset(dataset.split.first(1))
    expected = evaluate(Halves(), one, PAPER, torch.device("cpu"), ALONE)  # type: ignore[arg-type]
    with mp.Manager() as manager:
        shared = manager.dict()
        mp.spawn(evaluate_with_another_process, (str(tmp_path / "store"), one, shared), nprocs=2)
        assert sorted(shared.keys()) == [0, 1]
        for iou, average_precision in shared.values():
            torch.testing.assert_close(iou, expected.iou["ours"], equal_nan=True)
            torch.testing.assert_close(average_precision, expected.average_precision, equal_nan=True)
