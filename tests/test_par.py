import copy
import pickle
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import Tensor, nn

from tests import reference
from tests.strategies import assert_close, dtypes, exact, layouts, map_shapes, seeds, uniform
from wsseg_layers import PAMR, PAR
from wsseg_layers.functional import par

DILATIONS = [1, 2, 4, 8, 12, 24]

dilation_lists = st.lists(st.integers(1, 12), min_size=1, max_size=4)


def refined(imgs: Tensor, masks: Tensor, dilations: list[int], num_iter: int) -> Any:
    """The reference's result."""
    affinity = reference.pamr_affinity(exact(imgs), dilations, "par")
    return reference.pamr_propagate(exact(masks), affinity, dilations, num_iter)


def test_smoke(device: torch.device) -> None:
    module = PAR().to(device)
    assert repr(module) == (
        "PAR(dilations=(1, 2, 4, 8, 12, 24), num_iter=10, renormalise=False, resize='mask', backend='auto',"
        " w1=0.3, w2=0.01, guard=1e-08, affinity_dtype=torch.float32)"
    )
    masks = module(torch.rand(1, 3, 8, 9, device=device), torch.rand(1, 2, 8, 9, device=device))
    assert masks.device.type == device.type


@pytest.mark.parametrize("channels", [1, 2, 21, 150])
@pytest.mark.parametrize(("imgs_size", "masks_size"), [((8, 9), (8, 9)), ((9, 8), (3, 2)), ((1, 5), (1, 1))])
def test_cardinality(channels: int, imgs_size: tuple[int, int], masks_size: tuple[int, int]) -> None:
    imgs, masks = torch.rand(2, 3, *imgs_size), torch.rand(2, channels, *masks_size)
    assert PAR(num_iter=1)(imgs, masks).shape == (2, channels, *imgs_size)
    assert PAR(num_iter=1, resize="image")(imgs, masks).shape == masks.shape
    assert PAR().affinity(imgs).shape == (2, 48, *imgs_size)


@given(map_shapes(), st.integers(1, 4), st.integers(0, 3), dilation_lists, dtypes, layouts, layouts, seeds)
def test_reference(
    device: torch.device,
    shape: tuple[int, ...],
    image_channels: int,
    num_iter: int,
    dilations: list[int],
    dtype: torch.dtype,
    imgs_layout: str,
    masks_layout: str,
    seed: int,
) -> None:
    batch, _, height, width = shape
    imgs = uniform((batch, image_channels, height, width), torch.float32, imgs_layout, seed)
    masks = uniform(shape, dtype, masks_layout, seed + 1)
    actual = par(imgs.to(device), masks.to(device), dilations, num_iter)
    precision = torch.float32 if dtype == torch.float64 else dtype  # the affinity is float32 at best
    assert_close(actual, refined(imgs, masks, dilations, num_iter), dtype=dtype, precision=precision)


def test_reference_default_dilations(device: torch.device) -> None:
    imgs, masks = torch.rand(1, 3, 17, 13), torch.rand(1, 21, 17, 13)
    actual = PAR(num_iter=2).to(device)(imgs.to(device), masks.to(device))
    assert_close(actual, refined(imgs, masks, DILATIONS, 2), dtype=torch.float32, precision=torch.float32)


def test_reference_resized_masks(device: torch.device) -> None:
    imgs, masks = torch.rand(2, 3, 12, 10), torch.rand(2, 4, 4, 5)
    actual = par(imgs.to(device), masks.to(device), [1, 2], 2)
    resized = torch.from_numpy(reference.resize(exact(masks), 12, 10))
    assert_close(actual, refined(imgs, resized, [1, 2], 2), dtype=torch.float32, precision=torch.float32)


@given(map_shapes(), dilation_lists, st.integers(0, 12), seeds)
def test_sums_to_a_power_of_one_plus_w2(shape: tuple[int, ...], dilations: list[int], num_iter: int, seed: int) -> None:
    imgs = uniform((shape[0], 3, *shape[2:]), torch.float32, "contiguous", seed)
    ones = torch.ones(shape, dtype=torch.float64)
    grown = PAR(dilations, num_iter)(imgs, ones)
    torch.testing.assert_close(grown, 1.01**num_iter * ones, rtol=1e-5, atol=0)
    kept = PAR(dilations, num_iter, renormalise=True)(imgs, ones)
    torch.testing.assert_close(kept, ones, rtol=1e-5, atol=0)


def test_renormalised_result_is_the_published_one_rescaled() -> None:
    imgs, masks = torch.rand(1, 3, 9, 7), torch.rand(1, 4, 9, 7)
    renormalised = PAR(num_iter=3, renormalise=True)(imgs, masks)
    torch.testing.assert_close(renormalised * 1.01**3, PAR(num_iter=3)(imgs, masks))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_flat_image_leaves_the_position_term(device: torch.device, dtype: torch.dtype) -> None:
    affinity = PAR().affinity(torch.full((1, 3, 9, 7), 0.7, dtype=dtype, device=device))
    expected = 1 / 48 + 0.01 * torch.from_numpy(reference.position_affinity(DILATIONS))
    torch.testing.assert_close(affinity.cpu(), expected.float()[None, :, None, None].expand(1, 48, 9, 7))


def test_affinity_then_propagate_equals_the_call() -> None:
    module = PAR([1, 2, 4], 3, renormalise=True)
    imgs, masks = torch.rand(2, 3, 9, 7), torch.rand(2, 6, 9, 7)
    affinity = module.affinity(imgs)
    chunks = [module.propagate(chunk, affinity) for chunk in masks.split(2, dim=1)]
    torch.testing.assert_close(torch.cat(chunks, dim=1), module(imgs, masks))


def test_gradcheck(device: torch.device) -> None:
    imgs = torch.rand(2, 3, 4, 5, device=device)
    masks = torch.rand(2, 2, 3, 4, dtype=torch.float64, device=device, requires_grad=True)
    assert torch.autograd.gradcheck(lambda m: par(imgs, m, [1, 3], 2), masks)


@pytest.mark.parametrize("renormalise", [False, True])
def test_dynamo(device: torch.device, renormalise: bool) -> None:
    module = PAR([1, 2], 2, renormalise)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    imgs, masks = torch.rand(2, 3, 9, 7, device=device), torch.rand(2, 4, 4, 5, device=device)
    torch.testing.assert_close(compiled(imgs, masks), module(imgs, masks))


def test_module_equals_functional() -> None:
    imgs, masks = torch.rand(2, 3, 9, 7), torch.rand(2, 4, 5, 6)
    assert torch.equal(PAR()(imgs, masks), par(imgs, masks))
    module = PAR([1, 2], 3, True, "image", "eager")
    assert torch.equal(module(imgs, masks), par(imgs, masks, [1, 2], 3, True, "image", "eager"))


def test_keywords_of_the_published_module() -> None:
    module = PAR(num_iter=2, dilations=[1, 2])
    imgs, masks = torch.rand(2, 3, 9, 7), torch.rand(2, 4, 9, 7)
    assert torch.equal(module(imgs=imgs, masks=masks), PAR([1, 2], 2)(imgs, masks))


def test_old_key_loads_without_a_warning() -> None:
    model = nn.ModuleDict({"par": PAR(), "pamr": PAMR()})
    old = {"par.kernel": torch.zeros(8, 1, 3, 3)}
    model.load_state_dict(old, strict=True)
    PAR().load_state_dict({"kernel": torch.zeros(8, 1, 3, 3)}, strict=True)
    with pytest.raises(RuntimeError, match=r"Unexpected key\(s\) in state_dict: .*par\.bias"):
        model.load_state_dict({**old, "par.bias": torch.zeros(1)}, strict=True)
    with pytest.raises(RuntimeError, match=r"Unexpected key\(s\) in state_dict: .*pamr\.kernel"):
        model.load_state_dict({"pamr.kernel": torch.zeros(1)}, strict=True)


def test_module_has_no_state_and_survives_copies() -> None:
    module = PAR([1, 2], 3, renormalise=True)
    assert module.state_dict() == {}
    imgs, masks = torch.rand(2, 3, 9, 7), torch.rand(2, 4, 5, 6)
    expected = module(imgs, masks)
    for copied in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), module.half(), module.to("meta")):
        assert torch.equal(copied(imgs, masks), expected)


def test_exception() -> None:
    imgs, masks = torch.rand(2, 3, 8, 9), torch.rand(2, 4, 8, 9)
    with pytest.raises(ValueError, match=r"imgs must have 4 dimensions .* got shape \[3, 8, 9\]"):
        par(imgs[0], masks)
    with pytest.raises(TypeError, match=r"masks must be a floating-point tensor, got torch\.int64"):
        par(imgs, masks.long())
    with pytest.raises(ValueError, match="masks must have the same batch size as imgs, or a multiple of it"):
        par(imgs, masks[:1])
    with pytest.raises(ValueError, match="imgs and masks must be on one device, got imgs on cpu, masks on meta"):
        par(imgs, masks.to("meta"))
    with pytest.raises(ValueError, match=r"masks must have the height and width of imgs \[2, 3, 8, 9\] when resize"):
        par(imgs, masks[:, :, :4], resize="none")


def test_every_method_passes_the_backend_on() -> None:
    module, imgs, masks = PAR([1, 2], backend="triton"), torch.rand(1, 3, 5, 6), torch.rand(1, 2, 5, 6)
    affinity = PAR([1, 2]).affinity(imgs)
    for call in (lambda: module(imgs, masks), lambda: module.affinity(imgs), lambda: module.propagate(masks, affinity)):
        with pytest.raises(ValueError, match="backend='triton' is not usable"):
            call()


def test_exception_affinity_and_propagate() -> None:
    module, imgs, masks = PAR(dilations=[1, 2]), torch.rand(2, 3, 8, 9), torch.rand(2, 4, 8, 9)
    with pytest.raises(TypeError, match=r"imgs must be a floating-point tensor, got torch\.uint8"):
        module.affinity((255 * imgs).byte())
    with pytest.raises(ValueError, match=r"masks must have 4 dimensions .* got shape \[4, 8, 9\]"):
        module.propagate(masks[0], module.affinity(imgs))
    with pytest.raises(ValueError, match="affinity must have 8 channels for each of 2 dilations"):
        module.propagate(masks, module.affinity(imgs)[:, :8])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"num_iter": -1}, ValueError, "num_iter must be at least 0, got -1"),
        ({"dilations": []}, ValueError, "dilations must hold at least one dilation"),
        ({"dilations": [-2]}, ValueError, r"dilations\[0\] must be at least 1, got -2"),
        ({"resize": "both"}, ValueError, "resize must be one of 'mask', 'image', 'none', got 'both'"),
        ({"backend": "cuda"}, ValueError, "backend must be one of 'auto', 'triton', 'cpp', 'eager', got 'cuda'"),
    ],
)
def test_exception_parameters(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        PAR(**arguments)
    with pytest.raises(error, match=message):
        par(torch.rand(1, 3, 4, 4), torch.rand(1, 2, 4, 4), **arguments)
