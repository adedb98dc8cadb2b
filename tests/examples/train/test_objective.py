"""The losses of a step: which ones an epoch has, and the dense energy loss against loops in float64."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from voc.dataset.images import IGNORE
from voc.model import Output
from voc.presets import PAPER
from voc.settings import Settings
from voc.train.objective import energy_loss, losses_of

from tests import reference
from tests.strategies import CPU_BACKENDS, exact
from wsseg_layers import DenseEnergyLoss


def energy_by_loops(image: Tensor, masks: Tensor, unlabelled: Tensor) -> tuple[float, Tensor]:
    """The energy of images [B, 3, H, W] in [0, 1] at half size, sides even, and its gradient for masks [B, C, H, W]."""
    height, width = image.shape[2] // 2, image.shape[3] // 2
    small = exact(masks).reshape(*masks.shape[:2], height, 2, width, 2).mean(axis=(3, 5))  # bilinear, by a factor of 2
    energy, gradient = 0.0, np.zeros(masks.shape)
    for b in range(len(image)):
        pixels = 255 * exact(image[b, :, ::2, ::2])
        weigh = reference.lattice_weights if "cpp" in CPU_BACKENDS else reference.gaussian_weights
        weights = weigh(pixels, (height, width), 50.0, 15.0) * 0.7055
        one, change = reference.dense_energy(
            small[b], np.ones((height, width)), unlabelled[b, ::2, ::2].numpy(), weights
        )
        energy += 1e-7 * one / len(image)
        gradient[b] = 1e-7 / len(image) / 4 * change.repeat(2, axis=1).repeat(2, axis=2)
    return energy, torch.from_numpy(gradient)


@pytest.mark.parametrize("size", [(10, 8), (5, 4)])
def test_energy_loss(size: tuple[int, int]) -> None:
    image = torch.rand(2, 3, 10, 8)
    masks = torch.randn(2, 4, 10, 8).softmax(dim=1).requires_grad_()
    target = torch.randint(0, 4, (2, *size)).masked_fill(torch.rand(2, *size) < 0.4, IGNORE)
    loss = energy_loss(image, masks, target)
    unlabelled = (target == IGNORE).repeat_interleave(10 // size[0], dim=1).repeat_interleave(8 // size[1], dim=2)
    expected, gradient = energy_by_loops(image, masks, unlabelled)
    assert loss.item() == pytest.approx(expected, rel=1e-3)
    loss.backward()
    assert masks.grad is not None
    torch.testing.assert_close(masks.grad.double(), gradient, rtol=1e-3, atol=1e-12)


def test_masks_are_enlarged_to_the_image() -> None:
    image, masks = torch.rand(1, 3, 16, 12), torch.randn(1, 3, 8, 6).softmax(dim=1)
    target = torch.zeros(1, 8, 6, dtype=torch.int64)
    large = torch.from_numpy(reference.resize(exact(masks), 16, 12)).float()
    labels = torch.zeros(1, 1, 16, 12)
    expected = DenseEnergyLoss(1e-7, 15, 100, 0.5)(255 * image, large, torch.ones(1, 16, 12), labels)
    torch.testing.assert_close(energy_loss(image, masks, target), expected)


def step(settings: Settings, epoch: int) -> tuple[list[Tensor], Tensor]:
    """Return the losses of one step, and the gradient of the logits."""
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(2, 3, 16, 12, generator=generator)
    logits = (3 * torch.randn(2, 4, 8, 6, generator=generator)).requires_grad_()
    labels, mask = torch.tensor([[1.0, 0, 1], [0, 1, 0]]), torch.randint(0, 4, (2, 16, 12), generator=generator)
    accelerator = SimpleNamespace(reduce=lambda value, reduction: value)  # noqa: ARG005
    state: Any = SimpleNamespace(settings=settings, epoch=epoch, accelerator=accelerator)
    output = Output(logits.mean(dim=(2, 3))[:, 1:], logits, logits.softmax(dim=1))
    losses = losses_of(state, output, image, labels, mask)
    (gradient,) = torch.autograd.grad(torch.stack(losses).sum(), logits)
    return losses, gradient


@pytest.mark.parametrize("loss", ["paper", "published"])
def test_the_energy_is_added_in_self_supervision(loss: Any) -> None:
    settings = replace(PAPER, loss=loss, classification_epochs=2)
    with_energy = replace(settings, energy_loss=50.0)
    for epoch in (2, 3):
        (classification, segmentation, none), gradient = step(settings, epoch)
        (same_classification, same_segmentation, energy), changed = step(with_energy, epoch)
        assert torch.equal(classification, same_classification)
        assert torch.equal(segmentation, same_segmentation)
        assert none == 0
        assert (segmentation != 0) == (epoch == 3)
        assert (energy < 0) == (epoch == 3)
        assert torch.equal(gradient, changed) == (epoch == 2)
    (_, _, twice), _ = step(replace(settings, energy_loss=100.0), 3)
    torch.testing.assert_close(twice, 2 * energy)


@pytest.mark.parametrize("settings", [replace(PAPER, supervision="masks"), replace(PAPER, model="cam")])
def test_other_trainings_have_no_energy(settings: Settings) -> None:
    losses, gradient = step(replace(settings, energy_loss=50.0), 20)
    expected, same = step(settings, 20)
    assert losses == expected
    assert losses[2] == 0
    assert torch.equal(gradient, same)


def test_the_energy_of_crf_pseudo_labels() -> None:
    settings = replace(PAPER, pseudo_labels="crf", classification_epochs=0, energy_loss=1.0)
    losses, _ = step(settings, 1)
    other, _ = step(replace(settings, pseudo_labels="pamr"), 1)
    assert all(loss.isfinite() for loss in losses)
    assert losses[1] != other[1]
