"""Resizing and the labels of the highest maps, in C++."""

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from torch import Tensor

from tests.strategies import seeds
from wsseg_layers.kernels.backends import cpp, find_label_backend

pytestmark = pytest.mark.skipif(cpp.unavailable(torch.device("cpu")) is not None, reason="no C++ compiler")

sides = st.integers(1, 40)
sizes = st.tuples(sides, sides)


def interpolate(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize maps [B, C, G, h, w] in float64."""
    flat = maps.double().flatten(1, 2)
    return F.interpolate(flat, size, mode="bilinear", align_corners=False).unflatten(1, maps.shape[1:3])


@given(st.integers(0, 2), st.integers(1, 3), sizes, sizes, st.booleans(), seeds)
def test_resizes_as_pytorch_does(
    batch: int, channels: int, given_size: tuple[int, int], size: tuple[int, int], transposed: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    maps = torch.rand(batch, channels, 1, *given_size, generator=generator)
    if transposed:  # columns are not contiguous
        maps = maps.mT.contiguous().mT
    resized = cpp.resize(maps, size)
    torch.testing.assert_close(resized, interpolate(maps, size).float())


def test_keeps_what_is_not_finite_where_the_size_stays() -> None:
    maps = torch.tensor([[[[torch.inf, 0.0, torch.nan, -torch.inf]]]])
    torch.testing.assert_close(cpp.resize(maps, (1, 4)), maps, rtol=0, atol=0, equal_nan=True)


@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 2), st.integers(1, 2), sizes, sizes, seeds)
def test_labels_are_those_of_the_highest_maps(
    batch: int,
    classes: int,
    views: int,
    scores: int,
    given_size: tuple[int, int],
    size: tuple[int, int],
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    maps = torch.rand(batch, 1 + classes, views * scores, *given_size, generator=generator)
    counts = torch.randint(classes + 1, (batch,), generator=generator)
    numbers = torch.randint(1, 300, (batch, classes), generator=generator)
    labels = cpp.choose_labels(maps, numbers, counts, scores, size, -1)
    assert labels.shape == (batch, views, *size)
    resized = interpolate(maps, size)
    for b, count in enumerate(counts.tolist()):
        best = resized[b, : 1 + count].topk(min(2, 1 + count), dim=0)
        clear = (best.values[0] - best.values[-1] > 1e-5) | (count == 0)  # [V * S, H, W], no tie
        number = F.pad(numbers[b], (1, 0))[best.indices[0]].unflatten(0, (views, scores))
        high, low = number[:, 0], number[:, -1]
        expected = torch.where((high == 0) & (low != 0), -1, high)
        decided = clear.unflatten(0, (views, scores)).all(dim=1)
        assert torch.equal(labels[b][decided], expected[decided])


def test_the_first_of_equal_channels_wins_and_nan_is_never_exceeded() -> None:
    rows = [[1.0, 1.0, 0.0, torch.nan], [1.0, 2.0, torch.nan, 3.0], [1.0, 2.0, 9.0, 4.0]]
    maps = torch.tensor(rows).view(1, 3, 1, 1, 4)
    labels = cpp.choose_labels(maps, torch.tensor([[5, 7]]), torch.tensor([2]), 1, (1, 4), 255)
    assert labels.tolist() == [[[[0, 5, 0, 0]]]]


@pytest.mark.usefixtures("_threads")
def test_threads_change_nothing() -> None:
    maps = torch.rand(2, 4, 2, 100, 90)
    numbers, counts = torch.tensor([[1, 2, 3]] * 2), torch.tensor([3, 1])
    results = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        results.append((cpp.resize(maps, (301, 222)), cpp.choose_labels(maps, numbers, counts, 2, (301, 222), 255)))
    assert all(torch.equal(one, three) for one, three in zip(*results, strict=True))


def test_backends_without_these_functions() -> None:
    assert find_label_backend("eager", torch.device("cpu")) is None
    assert find_label_backend("auto", torch.device("cpu")) is cpp
