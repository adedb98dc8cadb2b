"""The losses and pseudo labels against plain loops written from the paper."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from voc.dataset.images import IGNORE
from voc.losses import (
    classification_loss,
    confident_pixels,
    mask_loss,
    published_segmentation_loss,
    segmentation_loss,
)

from tests.reference import resize
from wsseg_layers.functional import threshold_pseudo_labels

Array = NDArray[np.float64] | NDArray[np.int64]


def soft_margin(y: Array, z: Array) -> float:
    """Eq. 12 (eq. 6), the mean over the batch."""
    batch, classes = y.shape
    total = 0.0
    for b in range(batch):
        for c in range(classes):
            probability = 1 / (1 + math.exp(-y[b, c]))
            total -= (z[b, c] * math.log(probability) + (1 - z[b, c]) * math.log(1 - probability)) / classes
    return total / batch


def balanced_cross_entropy(masks: Array, target: Array) -> float:
    """Eq. 21-23."""
    batch, _, h, w = masks.shape
    numerator, m_all = 0.0, 0.0
    for b in range(batch):
        pixels = [(i, j) for i in range(h) for j in range(w) if target[b, i, j] != IGNORE]
        m_total = len(pixels)
        image_loss = 0.0
        for i, j in pixels:
            c = int(target[b, i, j])
            m_c = sum(target[b, k, n] == c for k, n in pixels)
            image_loss += -(m_total - m_c) / (1 + m_total) * math.log(masks[b, c, i, j])
        numerator += m_total * image_loss
        m_all += m_total
    return numerator / (h * w) / m_all if m_all else 0.0


def published_cross_entropy(logits: Array, target: Array) -> float:
    """The published segmentation loss: resized logits, the mean over all pixels, then over all images."""
    losses = []
    for scores, labels in zip(logits, target, strict=True):
        height, width = labels.shape
        scores = resize(scores[None], height, width)[0]
        total = np.sum(labels != IGNORE)
        loss = 0.0
        for i in range(height):
            for j in range(width):
                if (c := int(labels[i, j])) != IGNORE:
                    log_sum = math.log(sum(math.exp(score) for score in scores[:, i, j]))
                    loss += (total - np.sum(labels == c)) / (1 + total) * (log_sum - scores[c, i, j])
        losses.append(loss / (height * width))
    return sum(losses) / len(losses)


def pseudo_labels_by_loops(masks: Array, labels: Array, background_required: bool) -> Array:
    """Section 3.3, pixel by pixel."""
    batch, classes, h, w = masks.shape
    target = np.full((batch, h, w), IGNORE)
    for b in range(batch):
        present = [0] + [c for c in range(1, classes) if labels[b, c - 1]]
        cut = {c: max(0.2, (0.6 if c else 0.7) * masks[b, c].max()) for c in present}
        for i in range(h):
            for j in range(w):
                claims = [c for c in present if masks[b, c, i, j] > cut[c]]
                if len(claims) == 1:
                    target[b, i, j] = claims[0]
        if any((target[b] == c).sum() == 0 for c in present[0 if background_required else 1 :]):
            target[b] = IGNORE
    return target


@given(st.integers(1, 3), st.integers(1, 5), st.integers(0, 2**31))
def test_classification_loss(batch: int, classes: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    y, z = 3 * rng.standard_normal((batch, classes)), rng.integers(0, 2, (batch, classes)).astype(float)
    loss = classification_loss(torch.tensor(y), torch.tensor(z)).item()
    assert loss == pytest.approx(soft_margin(y, z), abs=1e-9)


@given(st.integers(1, 3), st.integers(2, 4), st.integers(1, 5), st.integers(1, 5), st.integers(0, 2**31))
def test_segmentation_loss(batch: int, classes: int, h: int, w: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    logits = torch.tensor(rng.standard_normal((batch, classes, h, w)), dtype=torch.float32)
    target = rng.integers(0, classes, (batch, h, w))
    target[rng.random((batch, h, w)) < 0.3] = IGNORE
    expected = balanced_cross_entropy(logits.double().softmax(1).numpy(), target)
    labels = torch.tensor(target)
    assert segmentation_loss(logits, labels, confident_pixels(labels)).item() == pytest.approx(expected, abs=1e-5)


@given(st.integers(1, 3), st.integers(2, 4), st.integers(1, 4), st.integers(1, 7), st.integers(0, 2**31))
def test_published_segmentation_loss(batch: int, classes: int, size: int, target_size: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    logits = rng.standard_normal((batch, classes, size, size + 1))
    target = rng.integers(0, classes, (batch, target_size, target_size + 2))
    target[rng.random(target.shape) < 0.3] = IGNORE
    loss = published_segmentation_loss(torch.tensor(logits), torch.tensor(target))
    assert loss.item() == pytest.approx(published_cross_entropy(logits, target), abs=1e-5)


def test_losses_of_two_halves_are_that_of_the_whole() -> None:
    torch.manual_seed(0)
    logits, target = torch.randn(4, 3, 6, 5), torch.randint(0, 3, (4, 6, 5))
    target[torch.rand(4, 6, 5) < 0.4] = IGNORE
    mean = confident_pixels(target) / 2
    for loss in (segmentation_loss, mask_loss):
        halves = [loss(*half, mean).item() for half in zip(logits.chunk(2), target.chunk(2), strict=True)]
        assert sum(halves) / 2 == pytest.approx(loss(logits, target, confident_pixels(target)).item(), rel=1e-5)
    parts = zip(logits.chunk(2), target.chunk(2), strict=True)
    halves = [published_segmentation_loss(*part).item() for part in parts]
    assert sum(halves) / 2 == pytest.approx(published_segmentation_loss(logits, target).item(), rel=1e-5)


@given(st.integers(1, 3), st.integers(2, 4), st.integers(1, 5), st.integers(0, 2**31))
def test_mask_loss(batch: int, classes: int, size: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    logits = torch.tensor(rng.standard_normal((batch, classes, size, size)))
    mask = rng.integers(0, classes, (batch, size, size))
    mask[rng.random(mask.shape) < 0.3] = IGNORE
    probability = logits.softmax(1).numpy()
    terms = [-math.log(probability[b, c, i, j]) for (b, i, j), c in np.ndenumerate(mask) if c != IGNORE]
    expected = sum(terms) / len(terms) if terms else 0.0
    labels = torch.tensor(mask)
    assert mask_loss(logits, labels, confident_pixels(labels)).item() == pytest.approx(expected, abs=1e-5)


def test_segmentation_loss_of_nothing_is_zero_and_has_a_gradient() -> None:
    logits = torch.randn(2, 3, 4, 4, requires_grad=True)
    loss = segmentation_loss(logits, torch.full((2, 4, 4), IGNORE), torch.tensor(0))
    loss.backward()
    assert loss.item() == 0
    assert logits.grad is not None
    assert logits.grad.abs().max() == 0


@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 6), st.integers(1, 6), st.integers(0, 2**31), st.booleans())
def test_pseudo_labels(batch: int, classes: int, h: int, w: int, seed: int, background_required: bool) -> None:
    rng = np.random.default_rng(seed)
    masks = torch.tensor(2 * rng.standard_normal((batch, classes + 1, h, w))).softmax(dim=1)
    labels = rng.integers(0, 2, (batch, classes)).astype(float)
    expected = pseudo_labels_by_loops(masks.numpy(), labels, background_required)
    found = threshold_pseudo_labels(masks, torch.tensor(labels), discard="all" if background_required else "classes")
    assert (found.numpy() == expected).all()


def test_pseudo_labels_by_hand() -> None:
    #            only sky  only cat  both claim  neither claims
    background = [0.90, 0.05, 0.70, 0.50]
    cat = [0.05, 0.90, 0.60, 0.40]
    dog = [0.05, 0.05, 0.00, 0.90]  # not in the image
    masks = torch.tensor([[background, cat, dog]])[:, :, None]
    assert threshold_pseudo_labels(masks, torch.tensor([[1.0, 0.0]]))[0, 0].tolist() == [0, 1, IGNORE, IGNORE]


def test_an_image_without_one_of_its_classes_is_ignored() -> None:
    masks = torch.tensor([[[0.9, 0.1], [0.1, 0.8], [0.05, 0.1]]])[:, :, None]
    assert threshold_pseudo_labels(masks, torch.tensor([[1.0, 0.0]]))[0, 0].tolist() == [0, 1]
    assert threshold_pseudo_labels(masks, torch.tensor([[1.0, 1.0]]))[0, 0].tolist() == [IGNORE, IGNORE]
    with_background = threshold_pseudo_labels(masks, torch.tensor([[1.0, 0.0]]), discard="all")
    assert with_background[0, 0].tolist() == [0, 1]
    masks[:, 0] = 0.15
    assert threshold_pseudo_labels(masks, torch.tensor([[1.0, 0.0]]))[0, 0].tolist() == [IGNORE, 1]
    nothing = threshold_pseudo_labels(masks, torch.tensor([[1.0, 0.0]]), discard="all")
    assert nothing[0, 0].tolist() == [IGNORE, IGNORE]
