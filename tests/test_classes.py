"""What PAMR and PAR share: the classes to refine, several masks per image, and the dtype of the stored affinity."""

from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from tests import reference
from tests.strategies import CPU_BACKENDS, assert_close, backends, exact, layouts, map_shapes, seeds, uniform
from wsseg_layers import PAMR, PAR
from wsseg_layers.functional import pamr, par
from wsseg_layers.kernels import BackendName

DILATIONS = [1, 2]
Layer = PAMR | PAR


def layer(name: str, backend: BackendName = "auto", **settings: Any) -> Layer:
    """PAMR or PAR with few neighbours."""
    if name == "PAMR":
        return PAMR(2, DILATIONS, backend=backend, **settings)
    return PAR(DILATIONS, 2, backend=backend, **settings)


def refined(name: str, image: Any, mask: Any) -> Any:
    """The reference's result for masks [B * V, C, h, w] of the size of the image."""
    views = len(mask) // len(image)
    affinity = reference.pamr_affinity(image, DILATIONS, name.lower()).repeat(views, axis=0)
    return reference.pamr_propagate(mask, affinity, DILATIONS, 2)


def some_classes(shape: tuple[int, ...], seed: int) -> Tensor:
    """Bool [B, C] with any number of classes per row."""
    generator = np.random.default_rng(seed)
    return torch.from_numpy(generator.random(shape) < generator.random((shape[0], 1)))


names = st.sampled_from(["PAMR", "PAR"])
each_layer = pytest.mark.parametrize("name", ["PAMR", "PAR"])


@given(
    map_shapes(max_batch=3, max_side=7),
    st.integers(1, 3),
    st.sampled_from([None, (3, 4)]),
    names,
    backends,
    layouts,
    st.sampled_from(["zero", "keep"]),
    seeds,
)
@settings(max_examples=40)
def test_reference(
    shape: tuple[int, ...],
    views: int,
    mask_size: tuple[int, int] | None,
    name: str,
    backend: BackendName,
    layout: str,
    absent: Any,
    seed: int,
) -> None:
    batch, channels, height, width = shape
    image = uniform((batch, 3, height, width), torch.float32, "contiguous", seed)
    mask = uniform((batch * views, channels, *(mask_size or shape[2:])), torch.float32, layout, seed + 1)
    classes = some_classes((batch * views, channels), seed)
    resized = reference.resize(exact(mask), height, width)
    expected = refined(name, exact(image), resized)
    module = layer(name, backend)
    assert_close(module(image, mask), expected, dtype=torch.float32, precision=torch.float32)
    chosen = classes.numpy()[:, :, None, None]
    expected = np.where(chosen, expected, resized if absent == "keep" else 0)
    actual = module(image, mask, classes, absent)
    assert_close(actual, expected, dtype=torch.float32, precision=torch.float32)
    if absent == "zero":
        assert not actual[~classes].any()
    elif mask_size is None:
        assert torch.equal(actual[~classes], mask[~classes])


@each_layer
@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_values_of_other_classes_do_not_matter(name: str, backend: BackendName) -> None:
    image, mask, classes = torch.rand(2, 3, 6, 7), torch.rand(2, 4, 6, 7), some_classes((2, 4), 0)
    expected = layer(name, backend)(image, mask, classes)
    poisoned = mask.masked_fill(~classes[:, :, None, None], torch.nan)
    assert torch.equal(layer(name, backend)(image, poisoned, classes), expected)
    kept = layer(name, backend)(image, poisoned, classes, "keep")
    torch.testing.assert_close(kept, torch.where(classes[:, :, None, None], expected, poisoned), equal_nan=True)


@each_layer
def test_all_and_no_classes(name: str) -> None:
    image, mask = torch.rand(2, 3, 6, 7), torch.rand(2, 4, 3, 4)
    everything = torch.ones(2, 4, dtype=torch.bool)
    assert torch.equal(layer(name)(image, mask, everything), layer(name)(image, mask))
    assert not layer(name)(image, mask, ~everything).any()
    resized = torch.nn.functional.interpolate(mask, size=(6, 7), mode="bilinear", align_corners=True)
    assert torch.equal(layer(name)(image, mask, ~everything, "keep"), resized)
    empty = layer(name)(image[:0], mask[:0], everything[:0])
    assert empty.shape == (0, 4, 6, 7)


@each_layer
@pytest.mark.parametrize("resize", ["image", "mask"])
def test_several_masks_of_an_image_are_separate_calls(name: str, resize: Any) -> None:
    image, mask = torch.rand(2, 3, 6, 7), torch.rand(6, 4, 4, 5)
    classes = some_classes((6, 4), 1)
    module = layer(name, resize=resize)
    for arguments in ((), (classes,), (classes, "keep")):
        together = module(image, mask, *arguments)
        for b in range(2):
            for view in range(3):
                row = slice(3 * b + view, 3 * b + view + 1)
                own = [x[row] if isinstance(x, Tensor) else x for x in arguments]
                torch.testing.assert_close(together[row], module(image[b : b + 1], mask[row], *own))


@each_layer
@pytest.mark.parametrize("absent", ["zero", "keep"])
def test_gradcheck(name: str, absent: Any) -> None:
    image, classes = torch.rand(2, 3, 4, 5), torch.tensor([[1, 0, 1], [0, 0, 0], [1, 1, 1], [0, 1, 0]]).bool()
    mask = torch.rand(4, 3, 3, 4, dtype=torch.float64, requires_grad=True)
    module = layer(name)
    assert torch.autograd.gradcheck(lambda x: module(image, x, classes, absent), mask)
    assert torch.autograd.gradcheck(lambda x: module(image, x), mask)


@each_layer
@pytest.mark.parametrize("absent", ["zero", "keep"])
def test_dynamo(name: str, absent: Any) -> None:
    torch._dynamo.reset()
    image, mask, classes = torch.rand(2, 3, 6, 7), torch.rand(4, 3, 4, 5), some_classes((4, 3), 2)
    module = layer(name, affinity_dtype=torch.float16)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(image, mask, classes, absent), module(image, mask, classes, absent))
    torch.testing.assert_close(compiled(image, mask), module(image, mask))


@each_layer
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float16, 2**-11), (torch.bfloat16, 2**-8), (torch.float32, 0.0), (torch.float64, 0.0)],
)
def test_affinity_dtype(name: str, dtype: torch.dtype, tolerance: float) -> None:
    image, mask = torch.rand(2, 3, 9, 8), torch.rand(2, 3, 9, 8)
    exactly, stored = layer(name), layer(name, affinity_dtype=dtype)
    assert stored.affinity(image).dtype == dtype
    torch.testing.assert_close(stored.affinity(image).float(), exactly.affinity(image), rtol=tolerance, atol=6e-8)
    result = stored(image, mask)
    assert result.dtype == torch.float32
    # Each of the two iterations multiplies positive values by weights with this relative error.
    torch.testing.assert_close(result, exactly(image, mask), rtol=2 * tolerance + 1e-5, atol=1e-5)
    assert torch.equal(stored.propagate(mask, stored.affinity(image)), result)


def test_functions_pass_everything_on() -> None:
    image, mask, classes = torch.rand(2, 3, 6, 7), torch.rand(4, 3, 4, 5), some_classes((4, 3), 3)
    half = torch.float16
    by_module = PAMR(2, DILATIONS, affinity_dtype=half)(image, mask, classes, "keep")
    assert torch.equal(pamr(image, mask, 2, DILATIONS, affinity_dtype=half, classes=classes, absent="keep"), by_module)
    by_module = PAR(DILATIONS, 2, affinity_dtype=half)(image, mask, classes, "keep")
    assert torch.equal(par(image, mask, DILATIONS, 2, affinity_dtype=half, classes=classes, absent="keep"), by_module)


@each_layer
@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_propagate_takes_counts(name: str, backend: BackendName) -> None:
    image, mask, module = torch.rand(2, 3, 6, 7), torch.rand(2, 4, 6, 7), layer(name, backend)
    affinity = module.affinity(image)
    refined_masks = module.propagate(mask, affinity, torch.tensor([3, 0]))
    assert torch.equal(refined_masks[:1, :3], module.propagate(mask[:1, :3], affinity[:1]))
    assert not refined_masks[0, 3:].any()
    assert not refined_masks[1].any()


IMAGE, MASK = torch.rand(2, 3, 6, 7), torch.rand(2, 4, 6, 7)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m: m(IMAGE, MASK, [[True]]), TypeError, "classes must be a torch.bool tensor, got list"),
        (
            lambda m: m(IMAGE, MASK, torch.ones(2, 4)),
            TypeError,
            "classes must be a torch.bool tensor, got torch.float32",
        ),
        (
            lambda m: m(IMAGE, MASK, torch.ones(2, 3).bool()),
            ValueError,
            r"classes must be \[B, C\] for masks? \[2, 4, 6, 7\], got shape \[2, 3\]",
        ),
        (
            lambda m: m(IMAGE, MASK, torch.ones(2, 4, device="meta").bool()),
            ValueError,
            "masks? and classes must be on one device, got masks? on cpu, classes on meta",
        ),
        (
            lambda m: m(IMAGE, MASK, torch.ones(2, 4).bool(), "nan"),
            ValueError,
            "absent must be one of 'zero', 'keep', got 'nan'",
        ),
        (
            lambda m: m(IMAGE, MASK[:1]),
            ValueError,
            r"masks? must have the same batch size as .*, or a multiple of it, got masks? \[1, 4, 6, 7\]",
        ),
        (lambda m: m(IMAGE, torch.rand(3, 4, 6, 7)), ValueError, "or a multiple of it"),
    ],
)
@each_layer
def test_exception(name: str, call: Callable[[Layer], Tensor], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(layer(name))


@each_layer
@pytest.mark.parametrize("dtype", [torch.int8, torch.complex64, "float16", None])
def test_exception_affinity_dtype(name: str, dtype: Any) -> None:
    with pytest.raises(ValueError, match=r"affinity_dtype must be one of torch.float16, .* got "):
        layer(name, affinity_dtype=dtype)
