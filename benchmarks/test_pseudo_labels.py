"""From CAMs to pseudo labels, beside the loop of AFA and its successors; PAMR at the sizes of open vocabularies."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import published
from benchmarks.measure import Bench
from wsseg_layers import PAR, PseudoLabels
from wsseg_layers.functional import pamr

DILATIONS = (1, 2, 4, 8, 12, 24)
NUM_ITER = 10
CLASSES = 20
# VOC's training images hold 1.56 classes on average, the median is 1; a batch of four.
PRESENT = ([14], [8, 14, 17], [3], [7])


def problem(side: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Return smooth images in [0, 255], CAMs of the size of the images, and image-level labels."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(len(PRESENT), 3, 16, 16, generator=generator)
    images = 255 * F.interpolate(coarse, (side, side), mode="bicubic").clamp(0, 1)
    images = (images + 8 * torch.randn(images.shape, generator=generator)).clamp(0, 255)
    cams = torch.rand(len(PRESENT), CLASSES, 8, 8, generator=generator)
    cams = F.interpolate(cams, (side, side), mode="bilinear")
    labels = torch.zeros(len(PRESENT), CLASSES)
    for row, present in zip(labels, PRESENT, strict=True):
        row[present] = 1
    return images.to(device), cams.to(device), labels.to(device)


@torch.no_grad()
def test_pseudo_labels(bench: Bench) -> None:
    side = bench.size(smoke=32, quick=128, full=448)
    images, cams, labels = problem(side, bench.device)
    ours = PseudoLabels(PAR(DILATIONS, NUM_ITER), max_classes=max(map(len, PRESENT)))
    half = PseudoLabels(PAR(DILATIONS, NUM_ITER, affinity_dtype=torch.float16), max_classes=max(map(len, PRESENT)))
    competitors = {
        "ours": lambda: ours(images, cams, labels),
        "ours, fp16": lambda: half(images, cams, labels),
        "loop with our PAR": lambda: published.pseudo_labels(PAR(DILATIONS, NUM_ITER), images, cams, labels),
        "published": lambda: published.pseudo_labels(
            lambda image, masks: published.par(image, masks, DILATIONS, NUM_ITER), images, cams, labels
        ),
    }
    expected = ours(images, cams, labels)
    assert len(expected.unique()) > 3
    if bench.mode != "full":  # where the published way takes a minute, `compare` calls it often enough
        for function in competitors.values():
            assert (function() == expected).float().mean() >= 0.999
    size = f"{len(PRESENT)}x{CLASSES}x{side}x{side}"
    bench.compare("pseudo labels", size, competitors, tolerance=None)


# Data sets of open-vocabulary methods, which run PAMR after the network: classes, height, width of an image. The
# dilations are NACLIP's.
OPEN_VOCABULARIES = {
    "VOC21": (56, 375, 500),
    "COCO-Object": (113, 480, 640),
    "ADE20K": (150, 512, 683),
    "COCO-Stuff": (171, 480, 640),
    "Cityscapes": (19, 1024, 2048),
    "PC-459": (459, 375, 500),
}


@torch.no_grad()
@pytest.mark.parametrize("name", OPEN_VOCABULARIES)
def test_open_vocabularies(bench: Bench, name: str) -> None:
    channels, height, width = OPEN_VOCABULARIES[name]
    divisor = bench.size(smoke=64, quick=8, full=1)
    shape = (1, channels, height // divisor, width // divisor)
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(1, 3, *shape[2:], generator=generator).to(bench.device)
    mask = torch.rand(shape, generator=generator).softmax(dim=1).to(bench.device)
    dilations = (8, 16)
    competitors = {"ours": partial(pamr, image, mask, NUM_ITER, dilations)}
    if name == "VOC21":  # the stack of the published form is 16 times as large as the masks
        competitors["published"] = partial(published.pamr, image, mask, dilations, NUM_ITER)
    bench.compare("PAMR, open vocabularies", f"{name}, {'x'.join(map(str, shape[1:]))}", competitors)
