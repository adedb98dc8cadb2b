"""Refinement at test time, compared with loops in float64."""

import numpy as np
import pytest
import torch
from voc.crf import crf_marginals
from voc.inference.refine import Refinement, refine_masks

from tests.reference import pamr_affinity, pamr_propagate

DILATIONS = (1, 2, 4, 8, 12, 24)  # the default of PAMR and PAR


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


@pytest.mark.parametrize("method", ["none", "pamr", "par", "crf"])
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


def test_crf() -> None:
    image, masks, kept = scene()
    found = refine_masks(image, masks, kept, "crf")
    expected = crf_marginals(image[None], masks[None, [0, 1, 4]], torch.ones(1, 3, dtype=torch.bool))[0]
    torch.testing.assert_close(found[[0, 1, 4]], expected)
    assert not found[[2, 3]].any()
