"""A new backend is one folder and one line of the table."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from tests import reference
from tests.kernels import toy_backend
from tests.strategies import assert_close, exact
from wsseg_layers import PAMR, kernels
from wsseg_layers.kernels import backends


@pytest.fixture(autouse=True)
def _one_line_of_the_table() -> Iterator[None]:
    others = dict(backends.BACKENDS)
    backends.BACKENDS.clear()
    backends.BACKENDS.update({"toy": toy_backend, **others})
    toy_backend.calls.clear()
    yield
    backends.BACKENDS.clear()
    backends.BACKENDS.update(others)


def test_is_listed_first_and_chosen() -> None:
    assert kernels.available_backends("cpu")[0] == ("toy", True, None)
    image, mask = torch.rand(1, 3, 6, 7), torch.rand(1, 2, 6, 7)
    actual = PAMR(2, [1, 2])(image, mask)
    assert toy_backend.calls == ["affinity", "propagate"]
    affinity = reference.pamr_affinity(exact(image), [1, 2])
    expected = reference.pamr_propagate(exact(mask), affinity, [1, 2], 2)
    assert_close(actual, expected, dtype=torch.float32, precision=torch.float32)


def test_is_refused_with_its_reason() -> None:
    assert kernels.available_backends("meta")[0] == ("toy", False, "is a toy for CPUs")
    image, mask = torch.rand(1, 3, 6, 7, device="meta"), torch.rand(1, 2, 6, 7, device="meta")
    with pytest.raises(ValueError, match="backend='toy' is not usable on device 'meta': is a toy for CPUs"):
        PAMR(backend="toy")(image, mask)  # type: ignore[arg-type]
    assert PAMR()(image, mask).shape == mask.shape
    assert toy_backend.calls == []


def test_is_compiled_and_differentiated() -> None:
    image, mask = torch.rand(1, 3, 6, 7), torch.rand(1, 2, 6, 7, dtype=torch.float64, requires_grad=True)
    module = PAMR(2, [1, 2], backend="toy")  # type: ignore[arg-type]

    def refine(mask: Tensor) -> Tensor:
        return module(image, mask)

    compiled = torch.compile(refine, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(mask), refine(mask))
    assert torch.autograd.gradcheck(refine, mask)
    assert set(toy_backend.calls) == {"affinity", "propagate"}
