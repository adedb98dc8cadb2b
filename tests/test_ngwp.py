import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from tests import reference
from tests.strategies import DTYPES, assert_close, dtypes, exact, layouts, map_shapes, normal, seeds, uniform
from wsseg_layers import nGWPPool
from wsseg_layers.functional import ngwp_pool


def test_smoke(device: torch.device) -> None:
    pool = nGWPPool().to(device)
    assert repr(pool) == "nGWPPool(eps=1.0)"
    scores, masks = torch.randn(1, 2, 3, 4, device=device), torch.rand(1, 2, 3, 4, device=device)
    assert pool(scores, masks).device.type == device.type


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 20, 9, 7), (3, 1, 2, 5), (0, 20, 4, 4)])
def test_cardinality(shape: tuple[int, ...]) -> None:
    assert ngwp_pool(torch.randn(shape), torch.rand(shape)).shape == shape[:2]


@given(map_shapes(), st.sampled_from([1e-3, 0.5, 1.0]), dtypes, dtypes, layouts, layouts, seeds)
def test_reference(
    device: torch.device,
    shape: tuple[int, ...],
    eps: float,
    scores_dtype: torch.dtype,
    masks_dtype: torch.dtype,
    scores_layout: str,
    masks_layout: str,
    seed: int,
) -> None:
    scores = normal(shape, scores_dtype, scores_layout, seed)
    masks = uniform(shape, masks_dtype, masks_layout, seed + 1)
    result = torch.promote_types(scores_dtype, masks_dtype)
    expected = reference.ngwp(exact(scores), exact(masks), eps)
    assert_close(ngwp_pool(scores.to(device), masks.to(device), eps), expected, dtype=result, precision=result)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_is_exact(device: torch.device, dtype: torch.dtype) -> None:
    # A sum of 321 x 321 halves leaves float16's range and bfloat16's precision.
    scores = 60 * torch.ones(1, 2, 321, 321, dtype=dtype, device=device)
    masks = torch.ones(1, 2, 321, 321, dtype=dtype, device=device)
    with torch.autocast(device.type, torch.bfloat16):
        pooled = ngwp_pool(scores, masks)
    area = 321 * 321
    assert pooled.dtype == torch.float32
    torch.testing.assert_close(pooled.cpu(), torch.full((1, 2), 60 * area / (1 + area)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mask", [0.0, 1.0])
@pytest.mark.parametrize("score", [-1e4, 1e4])
def test_extremes_are_finite(dtype: torch.dtype, mask: float, score: float) -> None:
    scores = torch.full((1, 3, 8, 8), score, dtype=dtype, requires_grad=True)
    masks = torch.full((1, 3, 8, 8), mask, dtype=dtype, requires_grad=True)
    pooled = ngwp_pool(scores, masks)
    pooled.sum().backward()
    assert scores.grad is not None
    assert masks.grad is not None
    assert pooled.isfinite().all()
    assert scores.grad.isfinite().all()
    assert masks.grad.isfinite().all()


def test_empty_mask_scores_zero() -> None:
    assert torch.equal(ngwp_pool(torch.randn(2, 3, 4, 5), torch.zeros(2, 3, 4, 5)), torch.zeros(2, 3))  # eq. 17


@given(map_shapes(), seeds)
def test_invariant_to_permutation_of_pixels(shape: tuple[int, ...], seed: int) -> None:
    scores, masks = normal(shape, torch.float64, "contiguous", seed), uniform(shape, torch.float64, "contiguous", seed)
    order = torch.randperm(shape[2] * shape[3], generator=torch.Generator().manual_seed(seed))

    def permuted(x: torch.Tensor) -> torch.Tensor:
        return x.flatten(2)[:, :, order].view(shape)

    torch.testing.assert_close(ngwp_pool(permuted(scores), permuted(masks)), ngwp_pool(scores, masks))


@given(map_shapes(), st.floats(0.1, 5), seeds)
def test_monotone_in_the_scores(shape: tuple[int, ...], step: float, seed: int) -> None:
    scores, masks = normal(shape, torch.float64, "contiguous", seed), uniform(shape, torch.float64, "contiguous", seed)
    assert (ngwp_pool(scores + step, masks) > ngwp_pool(scores, masks)).all()


def test_nan_stays_with_its_class() -> None:
    scores, masks = torch.randn(2, 3, 4, 4), torch.rand(2, 3, 4, 4)
    scores[1, 2, 0, 0] = torch.nan
    nan = ngwp_pool(scores, masks).isnan()
    assert nan[1, 2]
    assert nan.sum() == 1


def test_gradcheck(device: torch.device) -> None:
    scores = torch.randn(2, 3, 4, 5, dtype=torch.float64, device=device, requires_grad=True)
    masks = torch.rand(2, 3, 4, 5, dtype=torch.float64, device=device)
    masks[0, 0] = 0
    assert torch.autograd.gradcheck(ngwp_pool, (scores, masks.requires_grad_()))


def test_dynamo(device: torch.device) -> None:
    compiled = torch.compile(nGWPPool(), fullgraph=True, backend="aot_eager")
    scores, masks = torch.randn(2, 3, 4, 5, device=device), torch.rand(2, 3, 4, 5, device=device)
    torch.testing.assert_close(compiled(scores, masks), ngwp_pool(scores, masks))
    with torch.autocast(device.type, torch.bfloat16):
        assert compiled(scores.bfloat16(), masks.bfloat16()).dtype == torch.float32


def test_module_equals_functional() -> None:
    scores, masks = torch.randn(2, 3, 4, 5), torch.rand(2, 3, 4, 5)
    assert torch.equal(nGWPPool(eps=0.5)(scores, masks), ngwp_pool(scores, masks, eps=0.5))
    assert torch.equal(nGWPPool()(scores, masks), ngwp_pool(scores, masks))


def test_smallest_eps() -> None:
    eps = torch.finfo(torch.float32).tiny
    assert torch.equal(nGWPPool(eps)(torch.ones(1, 1, 2, 2), torch.zeros(1, 1, 2, 2)), torch.zeros(1, 1))


def test_mixed_dtypes_are_summed_in_the_wider_one() -> None:
    values = 1 + torch.rand(1, 2, 3, 3, dtype=torch.float64) / 1e6
    for scores, masks in ((values, values.half()), (values.half(), values)):
        expected = reference.ngwp(exact(scores), exact(masks), 1.0)
        assert_close(ngwp_pool(scores, masks), expected, dtype=torch.float64, precision=torch.float64)


def test_module_has_no_state() -> None:
    assert nGWPPool().state_dict() == {}


def test_exception() -> None:
    maps = torch.rand(2, 3, 4, 5)
    with pytest.raises(
        ValueError, match=r"masks must hold the foreground classes only, .*\[2, 4, 4, 5\].*masks\[:, 1:\]"
    ):
        ngwp_pool(maps, torch.rand(2, 4, 4, 5))
    with pytest.raises(ValueError, match=r"masks must have the shape of scores \[2, 3, 4, 5\], got \[2, 1, 4, 5\]"):
        ngwp_pool(maps, torch.rand(2, 1, 4, 5))
    with pytest.raises(ValueError, match=r"scores must have 4 dimensions .* got shape \[3, 4, 5\]"):
        ngwp_pool(maps[0], maps[0])
    with pytest.raises(TypeError, match=r"masks must be a floating-point tensor, got torch\.int64"):
        ngwp_pool(maps, maps.long())
    with pytest.raises(TypeError, match=r"scores must be a torch\.Tensor, got list"):
        ngwp_pool([1.0], maps)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="scores and masks must be on one device, got scores on cpu, masks on meta"):
        ngwp_pool(maps, maps.to("meta"))


@pytest.mark.parametrize(
    ("eps", "error", "message"),
    [
        (0, ValueError, "eps must be positive, got 0"),
        (-1.0, ValueError, "eps must be positive, got -1.0"),
        (float("nan"), ValueError, "eps must be finite, got nan"),
        (10**400, ValueError, r"eps must be at most 3.4e\+38, the largest float32, got 10000"),
        (1e-46, ValueError, "eps must be at least 1.18e-38, below which it is 0 in float32, got 1e-46"),
        ("1", TypeError, "eps must be a number, got str"),
        (True, TypeError, "eps must be a number, got bool"),
    ],
)
def test_exception_eps(eps: float, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        nGWPPool(eps=eps)
    with pytest.raises(error, match=message):
        ngwp_pool(torch.rand(1, 1, 2, 2), torch.rand(1, 1, 2, 2), eps=eps)
