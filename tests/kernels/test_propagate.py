from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given
from torch import Tensor

from tests import reference
from tests.strategies import CPU_BACKENDS, assert_close, backends, dtypes, exact, layouts, map_shapes, seeds, uniform
from wsseg_layers.kernels import BackendName, pamr_affinity, pamr_propagate
from wsseg_layers.kernels.backends.eager import propagation

dilation_lists = st.lists(st.sampled_from([1, 2, 3, 5, 24]), min_size=1, max_size=3)


def some_weights(mask: Tensor, dilations: list[int], layout: str, seed: int) -> Tensor:
    """Weights in no way special: they do not sum to 1 and some are negative."""
    batch, _, height, width = mask.shape
    return uniform((batch, 8 * len(dilations), height, width), torch.float32, layout, seed + 1) / 8 - 0.03


@given(map_shapes(max_channels=6), dilation_lists, st.integers(0, 3), backends, dtypes, layouts, layouts, seeds)
def test_equals_the_definition(
    shape: tuple[int, ...],
    dilations: list[int],
    num_iter: int,
    backend: BackendName,
    dtype: torch.dtype,
    layout: str,
    affinity_layout: str,
    seed: int,
) -> None:
    mask = uniform(shape, dtype, layout, seed)
    affinity = some_weights(mask, dilations, affinity_layout, seed)
    expected = reference.pamr_propagate(exact(mask), exact(affinity), dilations, num_iter)
    actual = pamr_propagate(mask, affinity, dilations, num_iter, backend)
    assert actual.is_contiguous()
    assert_close(actual, expected, dtype=dtype, precision=dtype)


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5, 21, 150])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["auto", "eager"])
def test_equals_the_definition_for_any_number_of_channels(
    backend: BackendName, channels: int, dtype: torch.dtype, device: torch.device
) -> None:
    mask = torch.rand(2, channels, 7, 5, dtype=dtype)
    affinity = pamr_affinity(torch.rand(2, 3, 7, 5), [1, 4])
    expected = reference.pamr_propagate(exact(mask), exact(affinity), [1, 4], 2)
    actual = pamr_propagate(mask.to(device), affinity.to(device), [1, 4], 2, backend)
    assert_close(actual, expected, dtype=dtype, precision=dtype)


def test_gathers_in_chunks_of_channels(monkeypatch: pytest.MonkeyPatch) -> None:
    mask, affinity = torch.rand(2, 21, 6, 7), pamr_affinity(torch.rand(2, 3, 6, 7), [1, 2])
    at_once = pamr_propagate(mask, affinity, [1, 2], 3, "eager")
    gather, widths = torch.embedding_bag, set()

    def recorded(table: Tensor, *arguments: Any, **options: Any) -> Any:
        widths.add(table.shape[1])
        return gather(table, *arguments, **options)

    monkeypatch.setattr(torch, "embedding_bag", recorded)
    monkeypatch.setattr(propagation, "GATHER_TABLE_BYTES", 6 * 7 * 4 * 8)  # 8 channels
    torch.testing.assert_close(pamr_propagate(mask, affinity, [1, 2], 3, "eager"), at_once)
    assert widths == {7}  # 21 in three chunks


@pytest.mark.parametrize("rows", [1, 2, 4, 5])
def test_gathers_in_blocks_of_rows(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    mask, affinity = torch.rand(2, 5, 6, 7), pamr_affinity(torch.rand(2, 3, 6, 7), [1, 2, 24])
    at_once = pamr_propagate(mask, affinity, [1, 2, 24], 3, "eager")
    index_of, blocks = propagation._neighbour_index, []

    def recorded(rows: int, *arguments: Any) -> Tensor:
        blocks.append(rows)
        return index_of(rows, *arguments)

    monkeypatch.setattr(propagation, "_neighbour_index", recorded)
    monkeypatch.setattr(propagation, "GATHER_INDEX_BYTES", 4 * 24 * 7 * rows)
    assert torch.equal(pamr_propagate(mask, affinity, [1, 2, 24], 3, "eager"), at_once)
    assert blocks == [rows]


def test_the_index_is_as_narrow_as_it_can_be() -> None:
    assert propagation._neighbour_index(5, 6, 2, [1, 2]).dtype == torch.int32


@pytest.mark.parametrize("channels", [2, 5])
@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_dilations_far_beyond_the_image_cost_nothing(backend: BackendName, channels: int) -> None:
    image, mask = torch.rand(1, 3, 6, 7), torch.rand(1, channels, 6, 7, requires_grad=True)
    for variant in ("pamr", "par"):
        affinity = pamr_affinity(image, [1, 2**31 - 1], variant, backend=backend)
        assert affinity.isfinite().all()
    affinity = pamr_affinity(image, [1, 50], backend=backend)
    far, near = (pamr_propagate(mask, affinity, [1, d], 3, backend) for d in (2**31 - 1, 50))
    assert torch.equal(far, near)
    assert torch.equal(*(torch.autograd.grad(result.square().sum(), mask)[0] for result in (far, near)))


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_takes_a_half_precision_affinity(backend: BackendName) -> None:
    mask = torch.rand(1, 21, 6, 7)
    affinity = pamr_affinity(torch.rand(1, 3, 6, 7), [1, 2], backend=backend).half()
    expected = reference.pamr_propagate(exact(mask), exact(affinity), [1, 2], 3)
    actual = pamr_propagate(mask, affinity, [1, 2], 3, backend)
    assert_close(actual, expected, dtype=torch.float32, precision=torch.float32)


@pytest.mark.parametrize("channels", [2, 21])
@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_leaves_its_arguments_alone(backend: BackendName, channels: int) -> None:
    mask, affinity = torch.rand(1, channels, 6, 6), pamr_affinity(torch.rand(1, 3, 6, 6), [1], backend=backend)
    mask_before, affinity_before = mask.clone(), affinity.clone()
    for num_iter in (0, 1, 2):
        pamr_propagate(mask, affinity, [1], num_iter, backend).zero_()
    assert torch.equal(mask, mask_before)
    assert torch.equal(affinity, affinity_before)


@pytest.mark.parametrize("channels", [2, 21])
@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_nan_spreads_one_neighbourhood_an_iteration(backend: BackendName, channels: int) -> None:
    mask = torch.zeros(1, channels, 9, 9)
    mask[0, 1, 4, 4] = torch.nan
    uniform_weights = torch.full((1, 8, 9, 9), 1 / 8)
    once, twice = (pamr_propagate(mask, uniform_weights, [1], n, backend).isnan() for n in (1, 2))
    assert once.sum() == 8
    assert twice.sum() == 25
    assert not once[0, 0].any()


@pytest.mark.parametrize("channels", [2, 21])
@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_iterations_compose(backend: BackendName, channels: int) -> None:
    mask, affinity = torch.rand(1, channels, 6, 7), pamr_affinity(torch.rand(1, 3, 6, 7), [1, 2], backend=backend)
    twice = pamr_propagate(pamr_propagate(mask, affinity, [1, 2], 1, backend), affinity, [1, 2], 2, backend)
    torch.testing.assert_close(pamr_propagate(mask, affinity, [1, 2], 3, backend), twice)


@pytest.mark.parametrize("channels", [2, 21])
@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_keeps_the_range_of_the_masks(backend: BackendName, channels: int) -> None:
    mask = torch.rand(2, channels, 12, 11)
    affinity = pamr_affinity(torch.rand(2, 3, 12, 11), [1, 2, 4], backend=backend)
    refined = pamr_propagate(mask, affinity, [1, 2, 4], 10, backend)
    assert refined.min() >= mask.min() - 1e-6
    assert refined.max() <= mask.max() + 1e-6


def test_keeps_the_dtype_under_autocast(device: torch.device) -> None:
    mask = torch.rand(1, 21, 6, 6, device=device)
    affinity = pamr_affinity(torch.rand(1, 3, 6, 6, device=device), [1])
    with torch.autocast(device.type, dtype=torch.bfloat16):
        refined = pamr_propagate(mask, affinity, [1], 2)
    assert refined.dtype == torch.float32
    assert torch.equal(refined, pamr_propagate(mask, affinity, [1], 2))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("channels", [2, 21])
@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_halves_are_rounded_once_at_the_end(backend: BackendName, channels: int, dtype: torch.dtype) -> None:
    affinity = pamr_affinity(torch.rand(1, 3, 6, 7), [1, 2, 4], backend=backend)
    mask = torch.rand(1, channels, 6, 7).to(dtype).requires_grad_()
    wide = mask.detach().float().requires_grad_()
    refined, wide_refined = (pamr_propagate(x, affinity, [1, 2, 4], 10, backend) for x in (mask, wide))
    assert torch.equal(refined, wide_refined.to(dtype))
    weight = torch.rand_like(refined)
    (grad,) = torch.autograd.grad(refined, mask, weight)
    (wide_grad,) = torch.autograd.grad(wide_refined, wide, weight.float())
    assert torch.equal(grad, wide_grad.to(dtype))


@pytest.mark.parametrize("channels", [2, 21])
@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_takes_an_empty_batch(backend: BackendName, channels: int) -> None:
    refined = pamr_propagate(torch.rand(0, channels, 4, 5), torch.rand(0, 16, 4, 5), [1, 2], 3, backend)
    assert refined.shape == (0, channels, 4, 5)


@given(map_shapes(max_channels=5, max_side=6), dilation_lists, st.integers(0, 2), seeds)
def test_gradient_is_the_transposed_propagation(
    shape: tuple[int, ...], dilations: list[int], num_iter: int, seed: int
) -> None:
    # Linear, so that one column of the Jacobian a pixel says everything: <g, P e> = <P^T g, e>.
    mask = uniform(shape, torch.float64, "contiguous", seed).requires_grad_()
    affinity = some_weights(mask, dilations, "contiguous", seed)
    grad = uniform(shape, torch.float64, "sliced", seed + 2)
    (actual,) = torch.autograd.grad(pamr_propagate(mask, affinity, dilations, num_iter), mask, grad)
    batch, channels, height, width = shape
    expected = torch.zeros(shape, dtype=torch.float64)
    for i in range(height):
        for j in range(width):
            unit = torch.zeros(batch, 1, height, width)
            unit[:, :, i, j] = 1
            column = torch.from_numpy(reference.pamr_propagate(exact(unit), exact(affinity), dilations, num_iter))
            expected[:, :, i, j] = (column * grad).sum(dim=(2, 3))
    assert channels == actual.shape[1]
    assert_close(actual, expected.numpy(), dtype=torch.float64, precision=torch.float64)


@pytest.mark.parametrize("shape", [(2, 3, 5, 4), (1, 6, 1, 5), (1, 1, 3, 1)])
def test_gradcheck(shape: tuple[int, ...]) -> None:
    mask = torch.rand(shape, dtype=torch.float64, requires_grad=True)
    affinity = pamr_affinity(torch.rand(shape[0], 3, *shape[2:]), [1, 3])

    def refine(mask: Tensor) -> Tensor:
        return pamr_propagate(mask, affinity, [1, 3], 2)

    assert torch.autograd.gradcheck(refine, mask)
    assert torch.autograd.gradgradcheck(refine, mask)


@given(map_shapes(max_batch=3, max_channels=6), dilation_lists, st.integers(0, 3), backends, dtypes, layouts, seeds)
def test_ragged_channels_equal_one_image_after_the_other(
    shape: tuple[int, ...],
    dilations: list[int],
    num_iter: int,
    backend: BackendName,
    dtype: torch.dtype,
    layout: str,
    seed: int,
) -> None:
    mask = uniform(shape, dtype, layout, seed)
    affinity = some_weights(mask, dilations, "contiguous", seed)
    counts = torch.from_numpy(np.random.default_rng(seed).integers(0, shape[1] + 1, shape[0]))
    actual = pamr_propagate(mask, affinity, dilations, num_iter, backend, counts)
    assert actual.is_contiguous()
    for b, count in enumerate(counts.tolist()):
        assert not actual[b, count:].any()
        if count:
            alone = pamr_propagate(mask[b : b + 1, :count], affinity[b : b + 1], dilations, num_iter, backend)
            assert torch.equal(actual[b, :count], alone[0])


@pytest.mark.parametrize("num_iter", [0, 2])
@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_gradient_of_ragged_channels(backend: BackendName, num_iter: int) -> None:
    mask = torch.rand(3, 4, 5, 6, dtype=torch.float64, requires_grad=True)
    affinity, counts = pamr_affinity(torch.rand(3, 3, 5, 6), [1, 3]), torch.tensor([2, 0, 4])

    def refine(mask: Tensor) -> Tensor:
        return pamr_propagate(mask, affinity, [1, 3], num_iter, backend, counts)

    assert torch.autograd.gradcheck(refine, mask)
    assert torch.autograd.gradgradcheck(refine, mask)
    torch.testing.assert_close(torch.compile(refine, fullgraph=True, backend="aot_eager")(mask), refine(mask))
    batched = torch.stack([mask, 2 * mask]).detach()
    torch.testing.assert_close(torch.vmap(refine)(batched), torch.stack([refine(one) for one in batched]))


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_values_of_absent_channels_do_not_matter(backend: BackendName) -> None:
    mask, affinity = torch.rand(2, 5, 6, 7), pamr_affinity(torch.rand(2, 3, 6, 7), [1, 2])
    counts = torch.tensor([3, 1])
    expected = pamr_propagate(mask, affinity, [1, 2], 2, backend, counts)
    mask[0, 3:] = torch.nan
    mask[1, 1:] = torch.inf
    assert torch.equal(pamr_propagate(mask, affinity, [1, 2], 2, backend, counts), expected)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_counts_of_any_strides(backend: BackendName) -> None:
    mask, affinity = torch.rand(3, 4, 6, 7), pamr_affinity(torch.rand(3, 3, 6, 7), [1, 2])
    for counts in (torch.tensor([3, 0, 1, 0, 4])[::2], torch.tensor(2).expand(3), torch.tensor([1, 4, 2]).flip(0)):
        actual = pamr_propagate(mask, affinity, [1, 2], 2, backend, counts)
        assert torch.equal(actual, pamr_propagate(mask, affinity, [1, 2], 2, backend, counts.clone()))
        assert torch.equal(actual.any(dim=3).any(dim=2).sum(dim=1), counts)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_mapped_counts_beyond_the_channels_read_no_other_memory(backend: BackendName) -> None:
    mask, affinity = torch.rand(2, 1, 3, 6, 7), pamr_affinity(torch.rand(1, 3, 6, 7), [1])
    counts = torch.tensor([[100_000], [-5]])  # under vmap, values are not checked
    actual = torch.func.vmap(lambda m, c: pamr_propagate(m, affinity, [1], 1, backend, c))(mask, counts)
    torch.testing.assert_close(actual[0], pamr_propagate(mask[0], affinity, [1], 1, backend))
    assert not actual[1].any()


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_one_affinity_serves_several_masks_of_an_image(backend: BackendName) -> None:
    mask, affinity = torch.rand(6, 4, 5, 7, requires_grad=True), pamr_affinity(torch.rand(2, 3, 5, 7), [1, 2])
    actual = pamr_propagate(mask, affinity, [1, 2], 3, backend)
    expected = pamr_propagate(mask, affinity.repeat_interleave(3, dim=0), [1, 2], 3, backend)
    torch.testing.assert_close(actual, expected)
    weight = torch.rand_like(expected)
    gradients = [torch.autograd.grad(result, mask, weight)[0] for result in (actual, expected)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize(
    ("counts", "error", "message"),
    [
        ([1, 2], TypeError, r"counts must be a torch.int64 tensor, got list"),
        (torch.tensor([1, 2]).to_sparse(), TypeError, r"counts must be a dense tensor, got layout torch.sparse_coo"),
        (torch.tensor([1.0, 2.0]), TypeError, r"counts must be a torch.int64 tensor, got torch.float32"),
        (
            torch.tensor([1]),
            ValueError,
            r"counts must hold one number per image of mask \[2, 3, 5, 6\].* got shape \[1\]",
        ),
        (torch.tensor([1, 4]), ValueError, r"counts must be in 0 to 3, the channels of mask, got \[1, 4\]"),
        (torch.tensor([-1, 0]), ValueError, r"counts must be in 0 to 3, the channels of mask, got \[-1, 0\]"),
        (torch.tensor([1, 1], device="meta"), ValueError, r"mask and counts must be on one device"),
    ],
)
def test_errors_of_counts(counts: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        pamr_propagate(torch.rand(2, 3, 5, 6), torch.rand(2, 8, 5, 6), [1], 1, counts=counts)
    with pytest.raises(ValueError, match="counts must hold one number per image"):
        pamr_propagate(torch.rand(4, 3, 5, 6), torch.rand(2, 8, 5, 6), [1], 1, counts=torch.ones(4).long())
