"""The dense CRF against mean field written from its equations (Krähenbühl & Koltun, NIPS 2011)."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from voc.crf import crf_marginals

Array = NDArray[np.float64]


def kernel(features: list[list[float]]) -> Array:
    """k(f_i, f_j) = exp(-|f_i - f_j|^2 / 2), over the roots of its row sums and of its column sums."""
    values = np.array(
        [[np.exp(-sum((a - b) ** 2 for a, b in zip(p, q, strict=True)) / 2) for q in features] for p in features]
    )
    root = np.sqrt(values.sum(axis=1))
    return values / root[:, None] / root[None]


def mean_field(image: NDArray[np.uint8], probabilities: NDArray[np.float32]) -> Array:
    """Ten parallel updates of the marginals, Potts compatibilities 3 and 10."""
    num_classes, height, width = probabilities.shape
    pixels = [(x, y, *map(float, image[y, x])) for y in range(height) for x in range(width)]
    gaussian = kernel([[x / 3, y / 3] for x, y, *_ in pixels])
    bilateral = kernel([[x / 80, y / 80, *(value / 13 for value in rgb)] for x, y, *rgb in pixels])
    log_unary = np.log(probabilities.astype(np.float64).reshape(num_classes, -1))
    marginals = np.exp(log_unary)
    for _ in range(10):
        # A Potts model penalises the other classes of the neighbours: up to a constant, it rewards the same class.
        energy = log_unary + 3 * marginals @ gaussian + 10 * marginals @ bilateral
        marginals = np.exp(energy - energy.max(axis=0))
        marginals /= marginals.sum(axis=0)
    return marginals.reshape(probabilities.shape)


def scene(seed: int) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Return an image of three areas, each of one colour with noise, and noisy probabilities of the areas."""
    random = np.random.default_rng(seed)
    areas = np.zeros((10, 14), dtype=int)
    areas[2:7, 4:11] = 1
    areas[5:9, 1:6] = 2
    colours = random.integers(40, 220, (3, 3))
    image = (colours[areas] + random.normal(0, 8, (10, 14, 3))).clip(0, 255).astype(np.uint8)
    scores = random.normal(0, 1.5, (3, 10, 14)) + (areas == np.arange(3)[:, None, None])
    weights = np.exp(scores)
    return image, (weights / weights.sum(axis=0)).astype(np.float32)


def scenes(count: int) -> tuple[Tensor, Tensor]:
    """Return images [B, 3, H, W] in [0, 1] and masks [B, 3, H, W]."""
    images, masks = zip(*(scene(seed) for seed in range(count)), strict=True)
    return torch.from_numpy(np.stack(images)).movedim(-1, 1).float() / 255, torch.from_numpy(np.stack(masks))


def all_of(masks: Tensor) -> Tensor:
    return torch.ones(masks.shape[:2], dtype=torch.bool)


def test_the_crf_is_mean_field() -> None:
    images, masks = scenes(6)
    found = crf_marginals(images, masks, all_of(masks)).numpy()
    expected = np.stack([mean_field(*scene(seed)) for seed in range(6)])
    # On a CPU the kernels are approximated on a lattice. The mean error here is 0.001. Without the Gaussian kernel it
    # would be 20 times larger, without the bilateral kernel 300 times.
    assert np.abs(found - expected).mean() < 0.003
    assert (found.argmax(axis=1) == expected.argmax(axis=1)).mean() > 0.99
    assert (found.argmax(axis=1) != masks.numpy().argmax(axis=1)).mean() > 0.2


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (7, 1), (5, 3)])
def test_shapes_and_marginals(size: tuple[int, int]) -> None:
    masks = torch.rand(2, 4, *size)
    before = masks.clone()
    marginals = crf_marginals(torch.full((2, 3, *size), 0.4), masks, all_of(masks))
    assert marginals.shape == masks.shape
    torch.testing.assert_close(marginals.sum(dim=1), torch.ones(2, *size))
    assert torch.equal(masks, before)


def test_a_lone_pixel_follows_its_colour() -> None:
    image = torch.full((1, 3, 12, 16), 0.8)
    image[..., 8:] = torch.tensor([0.1, 0.2, 0.5])[:, None, None]
    masks = torch.full((1, 2, 12, 16), 0.2)
    masks[:, 0, :, :8] = masks[:, 1, :, 8:] = 0.8
    masks[0, :, 6, 3] = torch.tensor([0.3, 0.7])
    masks[0, :, 6, 12] = torch.tensor([0.7, 0.3])
    expected = torch.zeros(1, 12, 16, dtype=torch.int64)
    expected[..., 8:] = 1
    assert torch.equal(crf_marginals(image, masks, all_of(masks)).argmax(dim=1), expected)


def test_masks_need_not_sum_to_one() -> None:
    images, masks = scenes(1)
    torch.testing.assert_close(
        crf_marginals(images, 0.1 * masks, all_of(masks)), crf_marginals(images, masks, all_of(masks))
    )
    nothing_known, anything_possible = masks.clone(), masks.clone()
    nothing_known[..., 4, 4] = 0
    anything_possible[..., 4, 4] = 1 / 3
    torch.testing.assert_close(
        crf_marginals(images, nothing_known, all_of(masks)), crf_marginals(images, anything_possible, all_of(masks))
    )


def test_only_the_given_classes_compete() -> None:
    images, masks = scenes(2)
    classes = torch.tensor([[True, False, True], [False, True, False]])
    found = crf_marginals(images, masks, classes)
    expected = crf_marginals(images[:1], masks[:1, ::2], torch.ones(1, 2, dtype=torch.bool))
    torch.testing.assert_close(found[:1, ::2], expected)
    assert (found[1, 1] == 1).all()
    assert not found[~classes].any()


def test_half_precision_and_gradients() -> None:
    images, masks = scenes(1)
    found = crf_marginals(images, masks.bfloat16().requires_grad_(), all_of(masks))
    assert found.dtype == torch.bfloat16
    assert not found.requires_grad
    torch.testing.assert_close(
        found.float(), crf_marginals(images, masks.bfloat16().float(), all_of(masks)), atol=4e-3, rtol=0
    )
