import copy
import pickle
from collections.abc import Sequence
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests import reference
from tests.strategies import assert_close, dtypes, exact, layouts, map_shapes, normal, seeds, uniform
from wsseg_layers import PAMR
from wsseg_layers.functional import pamr
from wsseg_layers.kernels import VariantName

DILATIONS = [1, 2, 4, 8, 12, 24]
OLD_KEYS = ("aff_x.kernel", "aff_m.kernel", "aff_std.kernel")
VARIANTS = ("pamr", "paper", "par")

dilation_lists = st.lists(st.integers(1, 12), min_size=1, max_size=4)


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """The affinity is float32 at best, whatever the masks' dtype."""
    return torch.float32 if dtype == torch.float64 else dtype


def refined(image: Tensor, mask: Tensor, num_iter: int, dilations: list[int], variant: VariantName = "pamr") -> Any:
    """The reference's result."""
    return reference.pamr_propagate(
        exact(mask), reference.pamr_affinity(exact(image), dilations, variant), dilations, num_iter
    )


def test_smoke(device: torch.device) -> None:
    module = PAMR().to(device)
    assert repr(module) == (
        "PAMR(num_iter=10, dilations=(1, 2, 4, 8, 12, 24), variant='pamr', resize='mask', backend='auto',"
        " affinity_dtype=torch.float32)"
    )
    mask = module(torch.rand(1, 3, 8, 9, device=device), torch.rand(1, 2, 8, 9, device=device))
    assert mask.device.type == device.type


@pytest.mark.parametrize(
    ("image_size", "mask_size"),
    [((8, 9), (8, 9)), ((9, 8), (3, 2)), ((8, 9), (16, 9)), ((1, 1), (1, 1)), ((1, 9), (1, 9)), ((9, 1), (2, 2))],
)
@pytest.mark.parametrize("channels", [1, 2, 21, 150])
def test_cardinality(channels: int, image_size: tuple[int, int], mask_size: tuple[int, int]) -> None:
    image, mask = torch.rand(2, 3, *image_size), torch.rand(2, channels, *mask_size)
    assert PAMR(num_iter=1)(image, mask).shape == (2, channels, *image_size)
    assert PAMR(num_iter=1, resize="image")(image, mask).shape == mask.shape
    assert PAMR().affinity(image).shape == (2, 48, *image_size)


@pytest.mark.parametrize("variant", VARIANTS)
@given(map_shapes(), st.integers(1, 4), st.integers(0, 3), dilation_lists, dtypes, layouts, layouts, seeds)
def test_reference(
    device: torch.device,
    variant: VariantName,
    shape: tuple[int, ...],
    image_channels: int,
    num_iter: int,
    dilations: list[int],
    dtype: torch.dtype,
    image_layout: str,
    mask_layout: str,
    seed: int,
) -> None:
    batch, _, height, width = shape
    image = uniform((batch, image_channels, height, width), torch.float32, image_layout, seed)
    mask = uniform(shape, dtype, mask_layout, seed + 1)
    actual = pamr(image.to(device), mask.to(device), num_iter, dilations, variant)
    expected = refined(image, mask, num_iter, dilations, variant)
    assert_close(actual, expected, dtype=dtype, precision=at_least_float32(dtype))


@pytest.mark.parametrize("channels", [1, 2, 21, 150])
def test_reference_default_dilations(device: torch.device, channels: int) -> None:
    # Smaller than the largest dilations, and not square.
    image, mask = torch.rand(1, 3, 17, 13), torch.rand(1, channels, 17, 13)
    actual = PAMR(num_iter=2).to(device)(image.to(device), mask.to(device))
    assert_close(actual, refined(image, mask, 2, DILATIONS), dtype=torch.float32, precision=torch.float32)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_reference_image_dtype(device: torch.device, variant: VariantName, dtype: torch.dtype) -> None:
    image = torch.rand(1, 3, 7, 9).to(dtype)
    actual = PAMR(dilations=[1, 3], variant=variant).affinity(image.to(device))
    expected = reference.pamr_affinity(exact(image), [1, 3], variant)
    assert_close(actual, expected, dtype=torch.float32, precision=torch.float32)


@pytest.mark.parametrize(("image_size", "mask_size"), [((12, 10), (4, 5)), ((5, 9), (1, 1)), ((6, 7), (11, 14))])
def test_reference_resized_mask(device: torch.device, image_size: tuple[int, int], mask_size: tuple[int, int]) -> None:
    image, mask = torch.rand(2, 3, *image_size), torch.rand(2, 4, *mask_size)
    actual = pamr(image.to(device), mask.to(device), 2, [1, 2])
    resized = torch.from_numpy(reference.resize(exact(mask), *image_size))
    assert_close(actual, refined(image, resized, 2, [1, 2]), dtype=torch.float32, precision=torch.float32)


def test_reference_resized_image(device: torch.device) -> None:
    image, mask = torch.rand(2, 3, 13, 11), torch.rand(2, 4, 7, 5)
    actual = pamr(image.to(device), mask.to(device), 2, [1, 2], resize="image")
    resized = torch.from_numpy(reference.resize(exact(image), 7, 5))
    # Rounding of the resized image is magnified by 1 / sigma.
    expected = torch.from_numpy(refined(resized, mask, 2, [1, 2]))
    torch.testing.assert_close(actual.cpu().double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast(device: torch.device, dtype: torch.dtype) -> None:
    module = PAMR(num_iter=3)
    image, mask = torch.rand(1, 3, 17, 13, device=device), torch.rand(1, 4, 9, 7, device=device)
    with torch.autocast(device.type, torch.bfloat16):
        assert torch.equal(module.affinity(image), PAMR().affinity(image))
        assert module.affinity(image.to(dtype)).dtype == torch.float32
        assert module(image, mask.to(dtype)).dtype == dtype
        in_float32 = module(image, mask)
    torch.testing.assert_close(in_float32, module(image, mask))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_flat_image_gives_equal_weights(device: torch.device, dtype: torch.dtype) -> None:
    # 1e-8 underflows in float16: in that precision a flat image would give 0 / 0.
    image = torch.full((1, 3, 9, 7), 0.7, dtype=dtype, device=device)
    for variant in ("pamr", "paper"):
        weights = PAMR(variant=variant).affinity(image)
        torch.testing.assert_close(weights, torch.full_like(weights, 1 / 48))


@given(map_shapes(), dilation_lists, st.integers(1, 200), st.integers(-50, 50), seeds)
def test_invariant_to_affine_changes_of_the_image(
    shape: tuple[int, ...], dilations: list[int], scale: int, offset: int, seed: int
) -> None:
    # Whole numbers, so that scale and offset lose nothing that an affinity could see.
    image = torch.randint(0, 256, (shape[0], 3, *shape[2:]), generator=torch.Generator().manual_seed(seed)).float()
    module = PAMR(dilations=dilations)
    torch.testing.assert_close(module.affinity(scale * image + offset), module.affinity(image), rtol=1e-3, atol=1e-5)


@given(map_shapes(), st.integers(0, 4), dilation_lists, seeds)
def test_keeps_range_constants_and_sums(shape: tuple[int, ...], num_iter: int, dilations: list[int], seed: int) -> None:
    image = uniform((shape[0], 3, *shape[2:]), torch.float32, "contiguous", seed)
    mask = normal(shape, torch.float32, "contiguous", seed + 1).softmax(dim=1)
    module = PAMR(num_iter, dilations)
    result = module(image, mask)
    assert (result <= mask.amax((2, 3), keepdim=True) + 1e-5).all()
    assert (result >= mask.amin((2, 3), keepdim=True) - 1e-5).all()
    torch.testing.assert_close(module(image, torch.full(shape, 0.3)), torch.full(shape, 0.3))
    torch.testing.assert_close(result.sum(dim=1), torch.ones(shape[0], *shape[2:]))
    torch.testing.assert_close(module.affinity(image).sum(dim=1), torch.ones(shape[0], *shape[2:]))


@given(map_shapes(), dilation_lists, seeds)
def test_linear_in_the_mask(shape: tuple[int, ...], dilations: list[int], seed: int) -> None:
    image = uniform((shape[0], 3, *shape[2:]), torch.float32, "contiguous", seed)
    one, other = (normal(shape, torch.float64, "contiguous", seed + k) for k in (1, 2))
    module = PAMR(3, dilations)
    torch.testing.assert_close(module(image, 2 * one - other), 2 * module(image, one) - module(image, other))


@given(map_shapes(), dilation_lists, st.sampled_from(["horizontal", "vertical", "transpose"]), seeds)
def test_equivariant_to_flips_and_transposition(
    shape: tuple[int, ...], dilations: list[int], change: str, seed: int
) -> None:
    image = uniform((shape[0], 3, *shape[2:]), torch.float32, "contiguous", seed)
    mask = uniform(shape, torch.float32, "contiguous", seed + 1)
    module = PAMR(2, dilations)

    def changed(x: Tensor) -> Tensor:
        return x.transpose(2, 3) if change == "transpose" else x.flip(3 if change == "horizontal" else 2)

    # The sums run in another order: rounding, magnified where sigma is small, is all that may differ.
    torch.testing.assert_close(
        module(changed(image), changed(mask)), changed(module(image, mask)), rtol=1e-4, atol=1e-4
    )


def test_images_and_channels_are_refined_alone(device: torch.device) -> None:
    image, mask = torch.rand(3, 3, 9, 7, device=device), torch.rand(3, 5, 9, 7, device=device)
    module = PAMR(2, [1, 2])
    together = module(image, mask)
    torch.testing.assert_close(module(image[1:2], mask[1:2, 3:4]), together[1:2, 3:4])


def test_no_iteration_returns_the_mask() -> None:
    image, mask = torch.rand(1, 3, 5, 6), torch.rand(1, 2, 5, 6)
    assert torch.equal(PAMR(num_iter=0)(image, mask), mask)


def test_empty_batch() -> None:
    assert PAMR(2)(torch.rand(0, 3, 8, 9), torch.rand(0, 2, 4, 5)).shape == (0, 2, 8, 9)


def test_inputs_are_left_alone(device: torch.device) -> None:
    image, mask = torch.rand(1, 3, 8, 9, device=device), torch.rand(1, 2, 8, 9, device=device)
    image_before, mask_before = image.clone(), mask.clone()
    PAMR(3)(image, mask)
    assert torch.equal(image, image_before)
    assert torch.equal(mask, mask_before)


def test_nan_in_the_mask_spreads_to_its_neighbours_only() -> None:
    image, mask = torch.rand(1, 3, 9, 9), torch.rand(1, 2, 9, 9)
    mask[0, 1, 4, 4] = torch.nan
    nan = PAMR(1, [1])(image, mask).isnan()
    expected = torch.zeros(1, 2, 9, 9, dtype=torch.bool)
    expected[0, 1, 3:6, 3:6] = True
    expected[0, 1, 4, 4] = False  # a pixel is no neighbour of its own
    assert torch.equal(nan, expected)


def test_nan_in_the_image_spreads_to_its_neighbours_only() -> None:
    image, mask = torch.rand(1, 3, 9, 9), torch.rand(1, 2, 9, 9)
    image[0, 1, 4, 4] = torch.nan
    nan = PAMR(1, [1])(image, mask).isnan()
    expected = torch.zeros(1, 2, 9, 9, dtype=torch.bool)
    expected[0, :, 3:6, 3:6] = True
    assert torch.equal(nan, expected)


def test_affinity_then_propagate_equals_the_call(device: torch.device) -> None:
    module = PAMR(3, [1, 2, 4], variant="paper")
    image, mask = torch.rand(2, 3, 9, 7, device=device), torch.rand(2, 6, 9, 7, device=device)
    affinity = module.affinity(image)
    chunks = [module.propagate(chunk, affinity) for chunk in mask.split(2, dim=1)]
    torch.testing.assert_close(torch.cat(chunks, dim=1), module(image, mask))


def test_gradcheck(device: torch.device) -> None:
    image = torch.rand(2, 3, 4, 5, device=device)
    mask = torch.rand(2, 2, 3, 4, dtype=torch.float64, device=device, requires_grad=True)
    assert torch.autograd.gradcheck(lambda m: pamr(image, m, 2, [1, 3]), mask)


def test_no_gradient_reaches_the_image() -> None:
    image = torch.rand(1, 3, 5, 6, requires_grad=True)
    mask = torch.rand(1, 2, 5, 6, requires_grad=True)
    PAMR(2)(image, mask).sum().backward()
    assert mask.grad is not None
    assert image.grad is None
    assert not PAMR(2)(image, mask.detach()).requires_grad


def test_activation_checkpointing() -> None:
    image = torch.rand(1, 3, 5, 6)
    gradients = []
    for checkpointed in (True, False):
        mask = torch.arange(60.0).view(1, 2, 5, 6).requires_grad_()
        module = PAMR(2, [1, 2])
        result = checkpoint(module, image, mask, use_reentrant=False) if checkpointed else module(image, mask)
        result.square().sum().backward()
        assert mask.grad is not None
        gradients.append(mask.grad)
    assert torch.equal(*gradients)


@pytest.mark.parametrize("mask_size", [(9, 7), (4, 5)])
def test_dynamo(device: torch.device, mask_size: tuple[int, int]) -> None:
    module = PAMR(2, [1, 2])
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    image, mask = torch.rand(2, 3, 9, 7, device=device), torch.rand(2, 4, *mask_size, device=device)
    torch.testing.assert_close(compiled(image, mask), module(image, mask))


def test_module_equals_functional() -> None:
    image, mask = torch.rand(2, 3, 9, 7), torch.rand(2, 4, 5, 6)
    assert torch.equal(PAMR()(image, mask), pamr(image, mask))
    module = PAMR(3, [1, 2], "paper", "image", "eager")
    assert torch.equal(module(image, mask), pamr(image, mask, 3, [1, 2], "paper", "image", "eager"))


@pytest.mark.parametrize("dilations", [[1, 2], (1, 2), range(1, 3), [np.int64(1), np.int64(2)]])
def test_dilations_are_any_sequence(dilations: Sequence[int]) -> None:
    assert PAMR(dilations=dilations).dilations == (1, 2)


@pytest.mark.parametrize("prefix", ["", "refine.", "model.head.refine."])
def test_old_keys_load_without_a_warning(prefix: str) -> None:
    module: nn.Module = PAMR()
    for name in reversed(prefix.split(".")[:-1]):
        parent = nn.Module()
        parent.add_module(name, module)
        module = parent
    old = {f"{prefix}{key}": torch.zeros(8, 1, 3, 3) for key in OLD_KEYS}
    given_keys = set(old)
    result = module.load_state_dict(old, strict=True)
    assert not result.missing_keys
    assert not result.unexpected_keys
    assert set(old) == given_keys  # the caller's dict is left alone
    with pytest.raises(RuntimeError, match=r"Unexpected key\(s\) in state_dict: .*aff_y\.kernel"):
        module.load_state_dict({**old, f"{prefix}aff_y.kernel": torch.zeros(1)}, strict=True)


def test_old_keys_elsewhere_are_unexpected() -> None:
    model = nn.ModuleDict({"refine": PAMR(), "head": nn.Identity()})
    with pytest.raises(RuntimeError, match=r"head\.aff_x\.kernel"):
        model.load_state_dict({"head.aff_x.kernel": torch.zeros(8, 1, 3, 3)})


def test_module_has_no_state_and_survives_copies() -> None:
    module = PAMR(3, [1, 2], "paper", "image")
    assert module.state_dict() == {}
    image, mask = torch.rand(2, 3, 9, 7), torch.rand(2, 4, 5, 6)
    expected = module(image, mask)
    for copied in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), module.half(), module.to("meta")):
        assert torch.equal(copied(image, mask), expected)


def test_exception() -> None:
    image, mask = torch.rand(2, 3, 8, 9), torch.rand(2, 4, 8, 9)
    with pytest.raises(ValueError, match=r"image must have 4 dimensions .* got shape \[3, 8, 9\]"):
        pamr(image[0], mask)
    with pytest.raises(ValueError, match=r"mask must have 4 dimensions .* got shape \[4, 8, 9\]"):
        pamr(image, mask[0])
    with pytest.raises(TypeError, match=r"mask must be a floating-point tensor, got torch\.int64"):
        pamr(image, mask.long())
    with pytest.raises(TypeError, match=r"image must be a floating-point tensor, got torch\.uint8"):
        pamr((255 * image).byte(), mask)
    with pytest.raises(
        ValueError, match=r"mask must have the same batch size as image, or a multiple .*mask \[1, .*image \[2, "
    ):
        pamr(image, mask[:1])
    with pytest.raises(ValueError, match="image and mask must be on one device, got image on cpu, mask on meta"):
        pamr(image, mask.to("meta"))
    with pytest.raises(
        ValueError, match=r"mask must have at least one channel and one pixel, got shape \[2, 4, 0, 9\]"
    ):
        pamr(image, mask[:, :, :0])
    with pytest.raises(ValueError, match=r"mask must have the height and width of image \[2, 3, 8, 9\] when resize"):
        pamr(image, mask[:, :, :4], resize="none")


def test_every_method_passes_the_backend_on() -> None:
    module, image, mask = PAMR(dilations=[1, 2], backend="triton"), torch.rand(1, 3, 5, 6), torch.rand(1, 2, 5, 6)
    affinity = PAMR(dilations=[1, 2]).affinity(image)
    for call in (lambda: module(image, mask), lambda: module.affinity(image), lambda: module.propagate(mask, affinity)):
        with pytest.raises(ValueError, match="backend='triton' is not usable"):
            call()


def test_exception_affinity_and_propagate() -> None:
    module, image, mask = PAMR(dilations=[1, 2]), torch.rand(2, 3, 8, 9), torch.rand(2, 4, 8, 9)
    affinity = module.affinity(image)
    with pytest.raises(TypeError, match=r"image must be a floating-point tensor, got torch\.uint8"):
        module.affinity((255 * image).byte())
    with pytest.raises(ValueError, match="mask and affinity must have the same height and width"):
        module.propagate(mask[:, :, :4], affinity)
    with pytest.raises(ValueError, match="mask must have the same batch size as affinity, or a multiple of it"):
        module.propagate(mask[:1], affinity)
    with pytest.raises(ValueError, match="affinity must have 8 channels for each of 2 dilations"):
        module.propagate(mask, affinity[:, :8])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"num_iter": -1}, ValueError, "num_iter must be at least 0, got -1"),
        ({"num_iter": 2.5}, TypeError, "num_iter must be an integer, got 2.5"),
        ({"num_iter": True}, TypeError, "num_iter must be an integer, got True"),
        ({"dilations": []}, ValueError, "dilations must hold at least one dilation"),
        ({"dilations": [1, 0]}, ValueError, r"dilations\[1\] must be at least 1, got 0"),
        ({"dilations": [1.5]}, TypeError, r"dilations\[0\] must be an integer, got 1.5"),
        ({"dilations": 3}, TypeError, "dilations must be a sequence of integers, got 3"),
        ({"dilations": "12"}, TypeError, "dilations must be a sequence of integers, got '12'"),
        ({"variant": "eq8"}, ValueError, "variant must be one of 'pamr', 'paper', 'par', got 'eq8'"),
        ({"resize": None}, ValueError, "resize must be one of 'mask', 'image', 'none', got None"),
        ({"backend": "cuda"}, ValueError, "backend must be one of 'auto', 'triton', 'cpp', 'eager', got 'cuda'"),
    ],
)
def test_exception_parameters(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        PAMR(**arguments)
    with pytest.raises(error, match=message):
        pamr(torch.rand(1, 3, 4, 4), torch.rand(1, 2, 4, 4), **arguments)
