"""One step of the self-supervised training beside that of the published network."""

import copy
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks import published
from benchmarks.measure import Bench
from wsseg_layers.functional import pamr, threshold_pseudo_labels

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

from voc import aspp
from voc.backbones import build_backbone, efficientnet_lite, resnet
from voc.backbones.base import normalise
from voc.dataset.images import IGNORE
from voc.losses import classification_loss, confident_pixels, segmentation_loss
from voc.model import Output, SingleStageNet
from voc.train.optimizer import build_optimizer, freeze, freeze_norm_statistics

DILATIONS = (1, 2, 4, 8, 12, 24)
NUM_ITER = 10
Refine = Callable[[Tensor, Tensor], Tensor]
FORMATS = {"contiguous": torch.contiguous_format, "channels-last": torch.channels_last}
FULL = {"efficientnet_lite0": (8, 193, 128), "resnet50": (4, 321, 256)}  # images, side of the crops, channels


@contextmanager
def published_operations() -> Iterator[None]:
    """Run networks with the operations of their published code: every convolution and BatchNorm as it is."""

    def conv_norm(x: Tensor, conv: nn.Conv2d, norm: nn.BatchNorm2d) -> Tensor:
        return norm(conv(x))

    def depthwise(x: Tensor, weight: Tensor, bias: Tensor | None, dilation: int) -> Tensor:
        padding = dilation * (weight.shape[-1] // 2)
        return functional.conv2d(x, weight, bias, padding=padding, dilation=dilation, groups=x.shape[1])

    with ExitStack() as stack:
        for module in (efficientnet_lite, resnet):
            stack.enter_context(patch.object(module, "conv_norm", conv_norm))
        stack.enter_context(patch.object(efficientnet_lite, "depthwise_by_phases", depthwise))
        stack.enter_context(patch.object(aspp, "MAX_SHARE", 0.0))
        yield


class Trainer:
    """A network with the memory format of its weights and images, and its optimizer."""

    def __init__(self, model: SingleStageNet, memory_format: torch.memory_format) -> None:
        self.model = copy.deepcopy(model)
        self.model.to(memory_format=memory_format)  # type: ignore[call-overload]  # not in the stubs
        self.memory_format = memory_format
        self.optimizer = build_optimizer(self.model, lr=0.0, weight_decay=0.0)  # every step the same

    def predict(self, image: Tensor) -> Output:
        """Return the output for images [B, 3, H, W] in [0, 1]."""
        return self.model(normalise(image, self.model.backbone).contiguous(memory_format=self.memory_format))


@pytest.mark.parametrize("backbone", FULL)
def test_training_step(bench: Bench, backbone: str) -> None:
    batch, crop, channels = bench.size(smoke=(2, 33, 8), quick=(2, 97, 32), full=FULL[backbone])
    torch.manual_seed(0)
    model = SingleStageNet(build_backbone(backbone), 20, channels).to(bench.device)
    freeze(model)
    model.train()
    freeze_norm_statistics(model)
    with torch.no_grad():  # otherwise no pixel is confident, and the segmentation loss is 0
        model.decoder[-1].get_parameter("weight").mul_(20)
    coarse = torch.rand(batch, 3, 8, 8, device=bench.device)
    image = functional.interpolate(coarse, (crop, crop), mode="bilinear")
    own_format = model.backbone.memory_format(bench.device)
    own_name = next(name for name, memory_format in FORMATS.items() if memory_format == own_format)
    other_name = next(name for name in FORMATS if name != own_name)
    ours, other = (Trainer(model, FORMATS[name]) for name in (own_name, other_name))
    check_logits(ours, other, image)
    torch.manual_seed(1)
    with torch.no_grad():
        masks = ours.predict(image).masks
    # One class per image: that of the largest mask.
    labels = functional.one_hot(masks[:, 1:].mean(dim=(2, 3)).argmax(dim=1), 20).float()
    present = torch.cat([torch.ones_like(labels[:, :1]), labels], dim=1) > 0  # as in the training

    def pseudo_labels(refine: Refine, masks: Tensor) -> Tensor:
        small = functional.interpolate(image, masks.shape[-2:], mode="bilinear", align_corners=True)
        return threshold_pseudo_labels(refine(small, masks), labels)

    def step(trainer: Trainer, refine: Refine | None) -> Tensor:
        torch.manual_seed(1)  # the same dropout and gate, for one memory format
        prediction = trainer.predict(image)
        loss = classification_loss(prediction.class_scores, labels)
        if refine is not None:
            target = pseudo_labels(refine, prediction.masks.detach())
            loss = loss + segmentation_loss(prediction.logits, target, confident_pixels(target))
        trainer.optimizer.zero_grad()
        loss.backward()
        trainer.optimizer.step()
        return loss.detach()

    def published_step(trainer: Trainer) -> Tensor:
        with published_operations():
            return step(trainer, theirs)

    refine: Refine = partial(pamr, num_iter=NUM_ITER, dilations=DILATIONS, classes=present)
    theirs: Refine = partial(published.pamr, dilations=DILATIONS, num_iter=NUM_ITER)
    assert (pseudo_labels(refine, masks) != IGNORE).any()
    competitors = {
        "ours": partial(step, ours, refine),
        "ours, without PAMR": partial(step, ours, None),
        f"published, {own_name}": partial(published_step, ours),
        f"published, {other_name}": partial(published_step, other),
    }
    # Dropout and gate are drawn in the order of memory, so they differ between the formats.
    unchecked = ["ours, without PAMR", f"published, {other_name}"]
    title, size = f"training step, {backbone}", f"{batch}x3x{crop}x{crop}"
    bench.compare(title, size, competitors, tolerance=1e-2, unchecked=unchecked)


def check_logits(ours: Trainer, other: Trainer, image: Tensor) -> None:
    """Check that the published network in the other memory format has our logits, without dropout and gate."""
    logits = []
    for trainer, operations in ((ours, nullcontext()), (other, published_operations())):
        trainer.model.eval()
        with operations, torch.no_grad():
            logits.append(trainer.predict(image).logits)
        trainer.model.train()
        freeze_norm_statistics(trainer.model)
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-3, atol=1e-3 * logits[0].abs().max().item())
