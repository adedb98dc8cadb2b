"""The dense CRF against mean field written from its equations (Krähenbühl & Koltun, NIPS 2011)."""

import importlib.util
import sys

import numpy as np
import pytest
from numpy.typing import NDArray
from voc.inference.crf import check_crf, crf_segment, dense_crf

needs_pydensecrf = pytest.mark.skipif(
    importlib.util.find_spec("pydensecrf") is None, reason="pydensecrf2 (extra `crf`) is not installed"
)

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


@needs_pydensecrf
def test_the_crf_is_mean_field() -> None:
    scenes = [scene(seed) for seed in range(6)]
    found = np.stack([dense_crf(*scene) for scene in scenes])
    expected = np.stack([mean_field(*scene) for scene in scenes])
    # pydensecrf filters on a lattice that approximates the kernels. The mean error here is 0.001. Without the Gaussian
    # kernel it would be 20 times larger, without the bilateral kernel 300 times.
    assert np.abs(found - expected).mean() < 0.003
    assert (found.argmax(axis=1) == expected.argmax(axis=1)).mean() > 0.99
    probabilities = np.stack([probabilities for _, probabilities in scenes])
    assert (found.argmax(axis=1) != probabilities.argmax(axis=1)).mean() > 0.2


@needs_pydensecrf
@pytest.mark.parametrize("size", [(1, 1), (1, 9), (7, 1), (5, 3)])
def test_shapes_and_marginals(size: tuple[int, int]) -> None:
    image = np.full((*size, 3), 90, np.uint8)
    image.flags.writeable = False  # like NumPy's view of a Pillow image
    probabilities = np.random.default_rng(0).dirichlet(np.ones(4), size).transpose(2, 0, 1).astype(np.float32)
    before = probabilities.copy()
    marginals = dense_crf(image, probabilities)
    assert marginals.shape == probabilities.shape
    np.testing.assert_allclose(marginals.sum(axis=0), 1, atol=1e-5)
    np.testing.assert_array_equal(probabilities, before)


@needs_pydensecrf
def test_a_lone_pixel_follows_its_colour() -> None:
    image = np.full((12, 16, 3), 200, np.uint8)
    image[:, 8:] = (30, 60, 120)
    masks = np.full((2, 12, 16), 0.2, np.float32)
    masks[0, :, :8] = masks[1, :, 8:] = 0.8
    masks[:, 6, 3] = 0.3, 0.7
    masks[:, 6, 12] = 0.7, 0.3
    expected = np.zeros((12, 16), np.uint8)
    expected[:, 8:] = 5
    np.testing.assert_array_equal(crf_segment(image, masks, [0, 5]), expected)


@needs_pydensecrf
def test_masks_need_not_sum_to_one() -> None:
    image, probabilities = scene(0)
    np.testing.assert_array_equal(
        crf_segment(image, probabilities * np.float32(0.1), [0, 3, 9]), crf_segment(image, probabilities, [0, 3, 9])
    )
    nothing_known, anything_possible = probabilities.copy(), probabilities.copy()
    nothing_known[:, 4, 4] = 0
    anything_possible[:, 4, 4] = 1 / 3
    np.testing.assert_array_equal(
        crf_segment(image, nothing_known, [0, 3, 9]), crf_segment(image, anything_possible, [0, 3, 9])
    )


def test_one_class_needs_no_crf() -> None:
    mask = crf_segment(np.zeros((3, 4, 3), np.uint8), np.ones((1, 3, 4), np.float32), [0])
    assert mask.shape == (3, 4)
    assert mask.dtype == np.uint8
    assert not mask.any()


def test_the_error_names_the_package_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pydensecrf", None)
    monkeypatch.delitem(sys.modules, "pydensecrf.densecrf", raising=False)
    with pytest.raises(ValueError, match=r"^--crf needs pydensecrf2, this project's extra `crf`"):
        check_crf()
