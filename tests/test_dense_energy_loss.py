from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from torch import Tensor

from tests import reference
from tests.strategies import CPU_BACKENDS, exact, map_shapes, seeds, uniform
from wsseg_layers import DenseEnergyLoss
from wsseg_layers.functional import dense_energy_loss
from wsseg_layers.kernels import BackendName


def expected_loss(
    images: Tensor, segmentations: Tensor, rois: Tensor, unlabelled: Tensor, sigmas: tuple[float, float], backend: str
) -> tuple[float, Tensor]:
    size = (images.shape[2], images.shape[3])
    energy, gradients = 0.0, []
    for b in range(len(images)):
        sigma_rgb, sigma_xy = sigmas
        if backend == "cpp":
            weights = reference.lattice_weights(exact(images[b]), size, sigma_xy, sigma_rgb)
        else:
            weights = reference.gaussian_weights(exact(images[b]), size, sigma_xy, sigma_rgb)
        # The published filter weighs a lattice's blur, with 1 in its centre, by 1 / (1 + 2^-D).
        weights *= 64 / (1 + 1 / 32) / ((4 * torch.pi / 3) ** 2.5 * 6**0.5)
        one, gradient = reference.dense_energy(exact(segmentations[b]), exact(rois[b]), unlabelled[b].numpy(), weights)
        energy += one / len(images)
        gradients.append(torch.from_numpy(gradient) / len(images))
    return energy, torch.stack(gradients)


def draw(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, _, height, width = shape
    images = uniform((batch, 3, height, width), torch.float32, "contiguous", seed)
    segmentations = uniform(shape, dtype, "contiguous", seed + 1).softmax(dim=1).requires_grad_()
    drawn = uniform((batch, 2, height, width), torch.float32, "contiguous", seed + 2)
    return images, segmentations, (drawn[:, 0] > 0.3).float(), drawn[:, 1] > 0.5


@settings(max_examples=15)
@given(map_shapes(max_side=6), st.sampled_from(CPU_BACKENDS), st.sampled_from([torch.float32, torch.float64]), seeds)
def test_value_and_gradient(shape: tuple[int, ...], backend: BackendName, dtype: torch.dtype, seed: int) -> None:
    images, segmentations, rois, unlabelled = draw(shape, dtype, seed)
    loss = dense_energy_loss(images, segmentations, rois, unlabelled, 0.37, 2.3, backend)
    loss.backward()
    energy, gradient = expected_loss(images, segmentations, rois, unlabelled, (0.37, 2.3), backend)
    assert loss.dtype == dtype
    assert loss.shape == ()
    torch.testing.assert_close(loss.double(), torch.tensor(energy).double(), rtol=1e-4, atol=1e-5)
    assert segmentations.grad is not None
    torch.testing.assert_close(segmentations.grad.double(), gradient, rtol=1e-4, atol=1e-5)


def reverse_over_reverse(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Return the Hessian as torch.autograd.grad gives it."""

    def hessian(x: Tensor) -> Tensor:
        leaf = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(function(leaf), leaf, create_graph=True)
        return torch.stack([torch.autograd.grad(one, leaf, retain_graph=True)[0] for one in gradient.flatten()])

    return hessian


@pytest.mark.parametrize(
    "second",
    [torch.func.hessian, lambda f: torch.func.jacfwd(torch.func.jacfwd(f)), reverse_over_reverse],
    ids=["hessian", "forward over forward", "reverse over reverse"],
)
def test_second_derivatives(second: Callable[[Callable[[Tensor], Tensor]], Callable[[Tensor], Tensor]]) -> None:
    images, segmentations, rois, unlabelled = draw((1, 2, 2, 3), torch.float64, seed=3)
    x, pixels = segmentations.detach(), 6

    def loss(segmentations: Tensor) -> Tensor:
        return dense_energy_loss(images, segmentations, rois, unlabelled, 0.37, 2.3, "eager")

    weights = torch.from_numpy(reference.gaussian_weights(exact(images[0]), (2, 3), 2.3, 0.37))
    inside = rois[0].double().flatten()
    gate = torch.where(unlabelled[0], 1.0, (rois[0] - x[0].amax(dim=0)).clamp(min=0)).flatten()
    similar = inside[:, None] * weights * inside * 64 / (1 + 1 / 32) / ((4 * torch.pi / 3) ** 2.5 * 6**0.5)
    # The gate is a constant, and classes do not interact.
    block = -(gate[:, None] * similar + (gate[:, None] * similar).T)
    expected = torch.block_diag(block, block)
    assert 0 < gate.min() < gate.max()
    torch.testing.assert_close(second(loss)(x).reshape(2 * pixels, 2 * pixels), expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("label_dtype", [torch.uint8, torch.int64, torch.float32])
@pytest.mark.parametrize("scale_factor", [0.5, 1.0, 0.4])
def test_the_module_resizes(scale_factor: float, label_dtype: torch.dtype) -> None:
    images, segmentations, rois, unlabelled = draw((2, 3, 12, 15), torch.float32, seed=0)
    labels = torch.where(unlabelled, 255, 3).to(label_dtype)[:, None]
    module = DenseEnergyLoss(1e-2, 0.37, 4.6, scale_factor)
    actual = module(images, segmentations, rois, labels)

    def nearest(maps: Tensor) -> Tensor:
        return F.interpolate(maps, scale_factor=scale_factor, recompute_scale_factor=True)

    scaled = F.interpolate(
        segmentations, scale_factor=scale_factor, mode="bilinear", align_corners=False, recompute_scale_factor=True
    )
    small = (nearest(images), scaled, nearest(rois[:, None])[:, 0], nearest(unlabelled[:, None].float())[:, 0] > 0)
    expected = 1e-2 * dense_energy_loss(*small, 0.37, 4.6 * scale_factor)
    assert torch.equal(actual, expected)
    (gradient,) = torch.autograd.grad(actual, segmentations)
    assert gradient.abs().max() > 0


@pytest.mark.parametrize(
    ("ignore_index", "label_dtype"), [(-1, torch.int64), (254, torch.uint8), (-100, torch.float32)]
)
def test_the_label_of_ignored_pixels(ignore_index: int, label_dtype: torch.dtype) -> None:
    images, segmentations, rois, unlabelled = draw((2, 3, 12, 15), torch.float32, seed=0)
    usual, mine = (torch.where(unlabelled, index, 3)[:, None] for index in (255, ignore_index))
    expected = DenseEnergyLoss()(images, segmentations, rois, usual)
    actual = DenseEnergyLoss(ignore_index=ignore_index)(images, segmentations, rois, mine.to(label_dtype))
    assert torch.equal(actual, expected)
    with pytest.raises(ValueError, match=r"ignore_index must be in 0 to 255, the range of torch.uint8, got 256"):
        DenseEnergyLoss(ignore_index=256)(images, segmentations, rois, usual.to(torch.uint8))


def test_arguments_are_left_as_they_are() -> None:
    images, segmentations, rois, unlabelled = draw((1, 3, 6, 8), torch.float32, seed=0)
    before = [images.clone(), segmentations.detach().clone(), rois.clone(), unlabelled.clone()]
    DenseEnergyLoss(1e-7, 0.4, 3, 0.5)(images, segmentations, rois, unlabelled[:, None])
    for given_tensor, kept in zip((images, segmentations.detach(), rois, unlabelled), before, strict=True):
        assert torch.equal(given_tensor, kept)


def test_pixels_outside_the_region_have_no_effect() -> None:
    images, segmentations, rois, unlabelled = draw((1, 3, 6, 8), torch.float32, seed=0)
    other = torch.where(rois[:, None] > 0, segmentations, torch.rand_like(segmentations))
    ours, theirs = (dense_energy_loss(images, s, rois, unlabelled, 0.4, 3.0) for s in (segmentations, other))
    torch.testing.assert_close(ours, theirs)


def test_half_precision_is_summed_in_single() -> None:
    images, segmentations, rois, unlabelled = draw((1, 3, 6, 8), torch.float32, seed=0)
    loss = dense_energy_loss(images.half(), segmentations.half(), rois.half(), unlabelled, 0.4, 3.0)
    assert loss.dtype == torch.float32
    expected = dense_energy_loss(images, segmentations, rois, unlabelled, 0.4, 3.0)
    torch.testing.assert_close(loss, expected, rtol=2e-2, atol=1e-3)


def test_compiles_without_a_graph_break() -> None:
    images, segmentations, rois, unlabelled = draw((2, 3, 6, 8), torch.float32, seed=0)
    module = DenseEnergyLoss(1e-2, 0.4, 3.0, 0.5)
    labels = torch.where(unlabelled, 255, 0).to(torch.uint8)[:, None]
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        compiled(images, segmentations, rois, labels), module(images, segmentations, rois, labels)
    )


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"weight": -1}, ValueError, "weight must be at least 0"),
        ({"sigma_rgb": 0}, ValueError, "sigma_rgb must be positive"),
        ({"sigma_xy": "100"}, TypeError, "sigma_xy must be a number"),
        ({"scale_factor": 0}, ValueError, "scale_factor must be positive"),
        ({"scale_factor": 2}, ValueError, "scale_factor must be at most 1, got 2"),
        ({"backend": "gpu"}, ValueError, "backend must be one of"),
        ({"ignore_index": 255.0}, TypeError, "ignore_index must be an integer"),
    ],
)
def test_wrong_settings(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        DenseEnergyLoss(**{"weight": 1e-7, "sigma_rgb": 15, "sigma_xy": 100, "scale_factor": 0.5, **arguments})


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            {"images": torch.rand(1, 3, 4, 5)},
            ValueError,
            "images and segmentations must have the same height and width",
        ),
        ({"segmentations": torch.rand(4, 6)}, ValueError, "segmentations must have 4 dimensions"),
        ({"ROIs": torch.rand(1, 4, 5)}, ValueError, r"ROIs must be \[B, H, W\] for segmentations \[1, 2, 4, 6\]"),
        ({"ROIs": None}, TypeError, "ROIs must be a torch.Tensor, got NoneType"),
        ({"seg_label": torch.zeros(1, 4, 6)}, ValueError, r"seg_label must be \[B, 1, H, W\]"),
        ({"ROIs": torch.ones(1, 4, 6).to_sparse()}, TypeError, "ROIs must be a dense tensor, got layout"),
        ({"seg_label": torch.ones(1, 1, 4, 6).to_sparse()}, TypeError, "seg_label must be a dense tensor, got layout"),
        ({"seg_label": None}, TypeError, "seg_label must be a torch.Tensor, got NoneType"),
        ({"seg_label": torch.zeros(1, 1, 4, 6, device="meta")}, ValueError, "images and seg_label must be on one devi"),
        ({"segmentations": torch.rand(1, 0, 4, 6)}, ValueError, "segmentations must have at least one channel"),
        (
            {
                "images": torch.rand(1, 3, 1, 6),
                "segmentations": torch.rand(1, 2, 1, 6),
                "ROIs": torch.ones(1, 1, 6),
                "seg_label": torch.zeros(1, 1, 1, 6),
            },
            ValueError,
            "scale_factor must leave at least one pixel of images 1 x 6, got 0.5",
        ),
    ],
)
def test_wrong_tensors(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    right = {
        "images": torch.rand(1, 3, 4, 6),
        "segmentations": torch.rand(1, 2, 4, 6),
        "ROIs": torch.ones(1, 4, 6),
        "seg_label": torch.zeros(1, 1, 4, 6),
    }
    with pytest.raises(error, match=message):
        DenseEnergyLoss(1e-7, 15, 100, 0.5)(**{**right, **arguments})


@pytest.mark.parametrize(
    ("rois", "unlabelled", "message"),
    [
        (torch.ones(1, 4, 6, dtype=torch.bool), torch.ones(1, 4, 6).bool(), "rois must be a floating-point tensor"),
        (torch.ones(1, 4, 6), torch.ones(1, 4, 6), "unlabelled must be a torch.bool tensor"),
    ],
)
def test_wrong_regions(rois: Tensor, unlabelled: Tensor, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        dense_energy_loss(torch.rand(1, 3, 4, 6), torch.rand(1, 2, 4, 6), rois, unlabelled, 15, 100)
