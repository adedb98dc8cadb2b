"""One step of the self-supervised training: what a faster PAMR is worth in it."""

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from benchmarks import published
from benchmarks.measure import Bench
from wsseg_layers.functional import pamr, threshold_pseudo_labels

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

from voc.backbones import build_backbone
from voc.backbones.base import normalise
from voc.dataset.images import IGNORE
from voc.losses import classification_loss, confident_pixels, segmentation_loss
from voc.model import SingleStageNet
from voc.train.optimizer import build_optimizer, freeze, freeze_norm_statistics

DILATIONS = (1, 2, 4, 8, 12, 24)
NUM_ITER = 10
Refine = Callable[[Tensor, Tensor], Tensor]
FULL = {"efficientnet_lite0": (8, 193, 128), "resnet50": (4, 321, 256)}  # images, side of the crops, channels


@pytest.mark.parametrize("backbone", FULL)
def test_training_step(bench: Bench, backbone: str) -> None:
    batch, crop, channels = bench.size(smoke=(2, 33, 8), quick=(2, 97, 32), full=FULL[backbone])
    torch.manual_seed(0)
    model = SingleStageNet(build_backbone(backbone), 20, channels).to(bench.device)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # not in the stubs
    freeze(model)
    model.train()
    freeze_norm_statistics(model)
    optimizer = build_optimizer(model, lr=0.0, weight_decay=0.0)  # every step the same
    with torch.no_grad():  # otherwise no pixel is confident, and the segmentation loss is 0
        model.decoder[-1].get_parameter("weight").mul_(20)
    coarse = torch.rand(batch, 3, 8, 8, device=bench.device)
    image = functional.interpolate(coarse, (crop, crop), mode="bilinear")
    torch.manual_seed(1)
    with torch.no_grad():
        masks = model(normalise(image, model.backbone)).masks
    # One class per image: that of the largest mask.
    labels = functional.one_hot(masks[:, 1:].mean(dim=(2, 3)).argmax(dim=1), 20).float()
    present = torch.cat([torch.ones_like(labels[:, :1]), labels], dim=1) > 0  # as in the training

    def pseudo_labels(refine: Refine, masks: Tensor) -> Tensor:
        small = functional.interpolate(image, masks.shape[-2:], mode="bilinear", align_corners=True)
        return threshold_pseudo_labels(refine(small, masks), labels)

    def step(refine: Refine | None) -> Tensor:
        torch.manual_seed(1)  # the same dropout and gate
        prediction = model(normalise(image, model.backbone))
        loss = classification_loss(prediction.class_scores, labels)
        if refine is not None:
            target = pseudo_labels(refine, prediction.masks.detach())
            loss = loss + segmentation_loss(prediction.logits, target, confident_pixels(target))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    ours: Refine = partial(pamr, num_iter=NUM_ITER, dilations=DILATIONS, classes=present)
    theirs: Refine = partial(published.pamr, dilations=DILATIONS, num_iter=NUM_ITER)
    assert (pseudo_labels(ours, masks) != IGNORE).any()
    competitors = {
        "with our PAMR": partial(step, ours),
        "with the published PAMR": partial(step, theirs),
        "without PAMR": partial(step, None),
    }
    title, size = f"training step, {backbone}", f"{batch}x3x{crop}x{crop}"
    bench.compare(title, size, competitors, tolerance=1e-2, unchecked=["without PAMR"])
