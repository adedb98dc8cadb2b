import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given

from tests import reference
from tests.strategies import DTYPES, assert_close, dtypes, exact, layouts, map_shapes, seeds, uniform
from wsseg_layers import FocalSizePenalty
from wsseg_layers.functional import focal_size_penalty

POWERS = (0, 0.1, 0.5, 1, 1.5, 3)


def test_smoke(device: torch.device) -> None:
    penalty = FocalSizePenalty().to(device)
    assert repr(penalty) == "FocalSizePenalty(p=3.0, lam=0.01)"
    assert penalty(torch.rand(1, 2, 3, 4, device=device)).device.type == device.type


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 20, 9, 7), (3, 1, 2, 5), (0, 20, 4, 4)])
def test_cardinality(shape: tuple[int, ...]) -> None:
    assert focal_size_penalty(torch.rand(shape)).shape == shape[:2]


@given(map_shapes(), st.sampled_from(POWERS), st.sampled_from([1e-3, 0.01, 1.0]), dtypes, layouts, seeds)
def test_reference(
    device: torch.device, shape: tuple[int, ...], p: float, lam: float, dtype: torch.dtype, layout: str, seed: int
) -> None:
    masks = uniform(shape, dtype, layout, seed)
    expected = reference.focal_size_penalty(exact(masks), p, lam)
    assert_close(focal_size_penalty(masks.to(device), p, lam), expected, dtype=dtype, precision=dtype)


@given(map_shapes(), seeds)
def test_power_zero_is_the_plain_penalty(shape: tuple[int, ...], seed: int) -> None:
    masks = uniform(shape, torch.float64, "contiguous", seed)
    expected = np.log(0.01 + exact(masks).mean(axis=(2, 3)))  # eq. 4
    assert_close(focal_size_penalty(masks, p=0), expected, dtype=torch.float64, precision=torch.float64)


def test_power_zero_is_the_plain_penalty_on_a_full_mask() -> None:
    plain = focal_size_penalty(torch.ones(1, 1, 4, 4, dtype=torch.float64), p=0)
    assert plain.item() == pytest.approx(np.log(1.01))  # 0^0 = 1


@pytest.mark.parametrize("p", POWERS)
@pytest.mark.parametrize("excess", [0.0, 1e-6])
def test_full_mask_is_finite(p: float, excess: float) -> None:
    # A softmax over many classes may sum to a little more than 1, and so may the mean of one of its masks.
    masks = torch.full((1, 1, 4, 4), 1 + excess, requires_grad=True)
    penalty = focal_size_penalty(masks, p)
    penalty.sum().backward()
    assert masks.grad is not None
    assert masks.grad.isfinite().all()
    torch.testing.assert_close(penalty.item(), float(np.log(1.01)) if p == 0 else 0.0, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mask", [0.0, 1.0])
@pytest.mark.parametrize("p", POWERS)
def test_extremes_are_finite(dtype: torch.dtype, mask: float, p: float) -> None:
    masks = torch.full((1, 3, 8, 8), mask, dtype=dtype, requires_grad=True)
    penalty = focal_size_penalty(masks, p)
    penalty.sum().backward()
    assert masks.grad is not None
    assert penalty.isfinite().all()
    assert masks.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_is_exact(device: torch.device, dtype: torch.dtype) -> None:
    # Few pixels of a large map: halves would lose them one by one.
    masks = torch.zeros(1, 1, 321, 321, dtype=dtype, device=device)
    masks[..., :3] = 0.25
    with torch.autocast(device.type, torch.bfloat16):
        penalty = focal_size_penalty(masks)
    mean = 0.25 * 3 / 321
    assert penalty.dtype == torch.float32
    assert penalty.item() == pytest.approx((1 - mean) ** 3 * np.log(0.01 + mean), rel=1e-6)


@given(map_shapes(), seeds)
def test_invariant_to_permutation_of_pixels(shape: tuple[int, ...], seed: int) -> None:
    masks = uniform(shape, torch.float64, "contiguous", seed)
    order = torch.randperm(shape[2] * shape[3], generator=torch.Generator().manual_seed(seed))
    permuted = masks.flatten(2)[:, :, order].view(shape)
    torch.testing.assert_close(focal_size_penalty(permuted), focal_size_penalty(masks))


@pytest.mark.parametrize("p", POWERS)
def test_grows_with_the_mask_until_it_vanishes(p: float) -> None:
    # Below 1 - lam the logarithm is negative: a larger mask is punished less.
    means = torch.linspace(0, 0.98, 50, dtype=torch.float64).view(1, 50, 1, 1)
    assert (focal_size_penalty(means, p).diff(dim=1) > 0).all()


def test_nan_stays_with_its_class() -> None:
    masks = torch.rand(2, 3, 4, 4)
    masks[1, 2, 0, 0] = torch.nan
    nan = focal_size_penalty(masks).isnan()
    assert nan[1, 2]
    assert nan.sum() == 1


@pytest.mark.parametrize("p", POWERS)
def test_gradcheck(device: torch.device, p: float) -> None:
    masks = 0.9 * torch.rand(2, 3, 4, 5, dtype=torch.float64, device=device)
    masks[0, 0] = 0
    assert torch.autograd.gradcheck(lambda m: focal_size_penalty(m, p), masks.requires_grad_())


def test_the_gradient_is_one_number_per_mask(device: torch.device) -> None:
    masks = torch.rand(2, 3, 8, 9, device=device, requires_grad=True)
    (gradient,) = torch.autograd.grad(focal_size_penalty(masks).sum(), masks)
    assert gradient.untyped_storage().nbytes() == 2 * 3 * gradient.element_size()


def test_dynamo(device: torch.device) -> None:
    compiled = torch.compile(FocalSizePenalty(), fullgraph=True, backend="aot_eager")
    masks = torch.rand(2, 3, 4, 5, device=device)
    torch.testing.assert_close(compiled(masks), focal_size_penalty(masks))
    with torch.autocast(device.type, torch.bfloat16):
        assert compiled(masks.bfloat16()).dtype == torch.float32


def test_module_equals_functional() -> None:
    masks = torch.rand(2, 3, 4, 5)
    assert torch.equal(FocalSizePenalty(p=1.5, lam=0.1)(masks), focal_size_penalty(masks, p=1.5, lam=0.1))
    assert torch.equal(FocalSizePenalty()(masks), focal_size_penalty(masks))


def test_module_has_no_state() -> None:
    assert FocalSizePenalty().state_dict() == {}


def test_exception() -> None:
    with pytest.raises(ValueError, match=r"masks must have 4 dimensions .* got shape \[4, 5\]"):
        focal_size_penalty(torch.rand(4, 5))
    with pytest.raises(ValueError, match=r"masks must have at least one pixel, got shape \[2, 3, 0, 5\]"):
        focal_size_penalty(torch.rand(2, 3, 0, 5))
    with pytest.raises(TypeError, match=r"masks must be a floating-point tensor, got torch\.uint8"):
        focal_size_penalty(torch.zeros(1, 1, 2, 2, dtype=torch.uint8))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"p": -1}, ValueError, "p must be at least 0, got -1"),
        ({"p": float("inf")}, ValueError, "p must be finite, got inf"),
        ({"p": None}, TypeError, "p must be a number, got NoneType"),
        ({"lam": 0.0}, ValueError, "lam must be positive, got 0.0"),
        ({"lam": -0.01}, ValueError, "lam must be positive, got -0.01"),
        ({"lam": "small"}, TypeError, "lam must be a number, got str"),
    ],
)
def test_exception_parameters(arguments: dict[str, float], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        FocalSizePenalty(**arguments)
    with pytest.raises(error, match=message):
        focal_size_penalty(torch.rand(1, 1, 2, 2), **arguments)
