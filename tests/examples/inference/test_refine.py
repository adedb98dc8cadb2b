"""Refinement at test time, compared with loops in float64."""

import importlib.util

import numpy as np
import pytest
import torch
from voc.inference.crf import crf_segment
from voc.inference.refine import Refinement, refine_masks

from tests.reference import pamr_affinity, pamr_propagate

DILATIONS = (1, 2, 4, 8, 12, 24)  # the default of PAMR and PAR

needs_pydensecrf = pytest.mark.skipif(
    importlib.util.find_spec("pydensecrf") is None, reason="pydensecrf2 (extra `crf`) is not installed"
)


def scene(height: int = 11, width: int = 9) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """An image [3, H, W], masks [5, H, W], and kept classes [4]."""
    generator = torch.Generator().manual_seed(height)
    image = torch.rand(3, height, width, generator=generator)
    masks = torch.rand(5, height, width, generator=generator)
    return image, masks, torch.tensor([True, False, False, True])


@pytest.mark.parametrize("method", ["pamr", "par"])
@pytest.mark.parametrize("num_iter", [1, 20])
def test_layers(method: Refinement, num_iter: int) -> None:
    image, masks, kept = scene()
    affinity = pamr_affinity(image[None].double().numpy(), DILATIONS, method)
    expected = pamr_propagate(masks[None].double().numpy(), affinity, DILATIONS, num_iter)[0]
    expected[[2, 3]] = 0  # classes that are not kept
    found = refine_masks(image, masks, kept, method, num_iter)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method", ["none", "pamr", "par"])
def test_one_pixel_and_no_class(method: Refinement) -> None:
    image, masks, kept = scene(1, 1)
    found = refine_masks(image, masks, torch.zeros_like(kept), method)
    assert found[0] > 0
    assert not found[1:].any()


def test_without_refinement_the_other_classes_are_removed() -> None:
    image, masks, kept = scene()
    found = refine_masks(image, masks, kept, "none")
    assert torch.equal(found[[0, 1, 4]], masks[[0, 1, 4]])
    assert not found[[2, 3]].any()


@needs_pydensecrf
def test_crf() -> None:
    image, masks, kept = scene()
    pixels = (255 * image).round().byte().permute(1, 2, 0).numpy().copy()
    found = refine_masks(image, masks, kept, "crf")
    expected = crf_segment(pixels, masks[[0, 1, 4]].numpy(), [0, 1, 4])
    np.testing.assert_array_equal(found.argmax(dim=0).numpy(), expected)
    np.testing.assert_allclose(found.sum(dim=0).numpy(), 1, atol=1e-4)
    assert not found[[2, 3]].any()
