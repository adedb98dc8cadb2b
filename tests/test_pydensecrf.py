"""DenseCRF and the filter of the energy loss against pydensecrf2, on images that have what photographs have.

These are areas, shading, texture and noise.
"""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.crf_peer import pydensecrf
from tests.strategies import CPU_BACKENDS
from wsseg_layers import DenseCRF
from wsseg_layers.functional import dense_energy_loss

dcrf = pytest.importorskip("pydensecrf.densecrf", reason="pydensecrf2 is not installed")
pytestmark = pytest.mark.skipif("cpp" not in CPU_BACKENDS, reason="no C++ compiler: exact sums differ from a lattice's")


def photograph(height: int, width: int) -> tuple[Tensor, Tensor]:
    """Return an image [1, 3, H, W] of whole numbers in 0 to 255, and the areas [H, W] it shows, 0 to 2."""
    y, x = torch.meshgrid(torch.arange(height) / height, torch.arange(width) / width, indexing="ij")
    areas = torch.zeros(height, width, dtype=torch.int64)
    areas[(x - 0.35) ** 2 + 2 * (y - 0.5) ** 2 < 0.06] = 1
    areas[(x + y > 1.3) & (x - y < 0.3)] = 2
    colours = 60 + 140 * torch.tensor([[0.2, 0.9, 0.4], [0.9, 0.3, 0.2], [0.1, 0.2, 0.9]])
    image = colours[areas].permute(2, 0, 1)[None]
    for side in (3, 9, 40):  # shading, and texture
        coarse = 15 * torch.randn(1, 3, side, side)
        image = image + F.interpolate(coarse, size=(height, width), mode="bicubic", align_corners=False)
    return (image + 4 * torch.randn(image.shape)).round().clamp(0, 255), areas


def blobs(channels: int, height: int, width: int) -> Tensor:
    """Return probabilities [1, C, H, W] of smooth blobs: most pixels are undecided."""
    coarse = 3 * torch.randn(1, channels, 2 + height // 20, 2 + width // 20)
    return F.interpolate(coarse, size=(height, width), mode="bilinear").softmax(dim=1)


def coarse_masks(areas: Tensor) -> Tensor:
    """Return what a network says about the areas: blurred, and wrong in places; some probabilities are 0."""
    one_hot = F.one_hot(areas, 3).permute(2, 0, 1)[None].float()
    blurred = F.avg_pool2d(one_hot, 15, stride=1, padding=7)
    noise = F.interpolate(0.4 * torch.rand(1, 3, 6, 6), size=areas.shape, mode="nearest")
    masks = (blurred + noise - 0.1).clamp(min=0)
    return masks / masks.sum(dim=1, keepdim=True)


def assert_equal_results(image: Tensor, scores: Tensor, num_iter: int = 10) -> None:
    theirs, ours = pydensecrf(image, scores, num_iter), DenseCRF(num_iter)(image, scores)
    assert (ours.argmax(dim=1) == theirs.argmax(dim=1)).float().mean() >= 0.995
    # It uses the same lattice, so that only the order of sums differs.
    assert (ours - theirs).abs().mean() <= 1e-4


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("height", "width", "channels"), [(120, 160, 3), (97, 131, 21), (48, 60, 2), (64, 50, 30)])
def test_undecided_pixels(height: int, width: int, channels: int, seed: int) -> None:
    torch.manual_seed(seed)
    image, _ = photograph(height, width)
    scores = blobs(channels, height, width)
    assert_equal_results(image, scores)
    changed = DenseCRF()(image, scores).argmax(dim=1) != scores.argmax(dim=1)
    assert changed.float().mean() > 0.02  # the CRF has something to do


@pytest.mark.parametrize("seed", range(3))
def test_coarse_masks(seed: int) -> None:
    torch.manual_seed(seed)
    image, areas = photograph(150, 200)
    scores = coarse_masks(areas)
    assert_equal_results(image, scores)
    before, after = ((one.argmax(dim=1)[0] == areas).float().mean() for one in (scores, DenseCRF()(image, scores)))
    assert after > before


@pytest.mark.parametrize("num_iter", [0, 1, 2])
def test_few_steps(num_iter: int) -> None:
    image, _ = photograph(60, 80)
    assert_equal_results(image, blobs(4, 60, 80), num_iter)


@pytest.mark.parametrize(("height", "width"), [(1, 200), (200, 1), (1, 1), (2, 3)])
def test_lines_and_pixels(height: int, width: int) -> None:
    image = torch.rand(1, 3, height, width).mul_(255).round()
    assert_equal_results(image, torch.rand(1, 3, height, width).softmax(dim=1))


@pytest.mark.parametrize("value", [0.0, 128.0, 255.0])
def test_a_constant_image(value: float) -> None:
    assert_equal_results(torch.full((1, 3, 40, 50), value), blobs(3, 40, 50))


def test_extreme_contrast() -> None:
    image = 255.0 * (torch.rand(1, 3, 40, 50) > 0.5)
    assert_equal_results(image, blobs(3, 40, 50))


def published_sums(image: Tensor, values: Tensor, sigma_xy: float, sigma_rgb: float) -> Tensor:
    """Return the sums of values [H, W] by the lattice of pydensecrf2, which is that of the published energy loss.

    The library returns marginals only. One step of mean field with two classes adds the difference of their sums, times
    a weight, to the difference of their logits.
    """
    height, width = values.shape
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    features = torch.cat([torch.stack([x, y]) / sigma_xy, image[0] / sigma_rgb]).flatten(1).float()
    probability = (1 + values) / 2
    start, weight = torch.stack([probability, 1 - probability]).flatten(1).log(), 1e-3
    crf = dcrf.DenseCRF(height * width, 2)
    crf.setUnaryEnergy((-start).numpy())
    crf.addPairwiseEnergy(features.numpy(), weight, dcrf.CONST_KERNEL, dcrf.NO_NORMALIZATION)
    marginals = torch.from_numpy(np.array(crf.inference(1))).double()
    change = (marginals[0] / marginals[1]).log() - (start[0].double() - start[1].double())
    return change.view(height, width) / weight


@pytest.mark.parametrize(("sigma_xy", "sigma_rgb"), [(50.0, 15.0), (10.0, 5.0)])
def test_energy_loss_has_the_scale_of_the_published_filter(sigma_xy: float, sigma_rgb: float) -> None:
    torch.manual_seed(0)
    image, _ = photograph(60, 80)
    values = 0.05 + 0.9 * torch.rand(60, 80)
    loss = dense_energy_loss(
        image, values[None, None], torch.ones(1, 60, 80), torch.ones(1, 60, 80).bool(), sigma_rgb, sigma_xy
    )
    expected = -(values * published_sums(image, values, sigma_xy, sigma_rgb)).sum()
    torch.testing.assert_close(loss.double(), expected.double(), rtol=1e-4, atol=0)
