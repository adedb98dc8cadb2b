"""Every layer under PyTorch's transforms and settings: forward derivatives, vmap, default dtype and device."""

import copy
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.autograd import forward_ad

from wsseg_layers import (
    GCI,
    PAMR,
    PAR,
    DenseCRF,
    DenseEnergyLoss,
    FocalSizePenalty,
    PseudoLabels,
    StochasticGate,
    nGWPPool,
)
from wsseg_layers.functional import stochastic_gate
from wsseg_layers.kernels import bilateral_filter, pamr_affinity, pamr_propagate

IMAGE, MAPS, FEW = torch.rand(2, 3, 6, 7), torch.rand(2, 5, 6, 7), torch.rand(2, 2, 4, 3)

ENERGY = DenseEnergyLoss(1.0, 0.3, 2.0, 1.0)
BATCH_GCI, INSTANCE_GCI = GCI(5, 3).eval(), GCI(5, 3, norm="instance")

# Layers as functions of their masks or deep features, and values of these.
FUNCTIONS: dict[str, tuple[Callable[[Tensor], Tensor], Tensor]] = {
    "PAMR": (lambda mask: PAMR(2, [1, 2])(IMAGE, mask), MAPS),
    "PAMR, few masks, resized": (lambda mask: PAMR(2, [1, 2])(IMAGE, mask), FEW),
    "PAMR, eq. 8": (lambda mask: PAMR(2, [1, 2], "paper")(IMAGE, mask), MAPS),
    "PAR": (lambda masks: PAR([1, 2], 2, renormalise=True)(IMAGE, masks), MAPS),
    "nGWPPool": (lambda masks: nGWPPool()(MAPS.flip(1), masks), MAPS),
    "FocalSizePenalty": (FocalSizePenalty(), MAPS),
    "StochasticGate": (lambda deep: StochasticGate()(deep, MAPS.flip(1)), MAPS),
    "StochasticGate, evaluation": (lambda deep: StochasticGate().eval()(deep, MAPS.flip(1)), MAPS),
    "GCI, batch": (lambda deep: BATCH_GCI(IMAGE, deep), MAPS),
    "GCI, instance": (lambda deep: INSTANCE_GCI(IMAGE, deep), MAPS),
    "bilateral_filter": (lambda values: bilateral_filter(values, IMAGE, 2.0, 0.3, True), MAPS),
    "DenseEnergyLoss": (lambda masks: ENERGY(IMAGE, masks, MAPS[:, 0].detach(), 255 + 0 * MAPS[:, :1].long()), MAPS),
}
each_function = pytest.mark.parametrize("name", FUNCTIONS)


def seeded(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return a function that draws the same random numbers at every call."""

    def call(*tensors: Tensor) -> Tensor:
        torch.manual_seed(0)
        return function(*tensors)

    return call


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # which torch.func.jvp uses
@each_function
def test_forward_derivatives_agree_with_backward(name: str) -> None:
    # A registered operator without a forward derivative would give zeros, and say nothing.
    function, x = seeded(FUNCTIONS[name][0]), FUNCTIONS[name][1]
    tangent, leaf = torch.rand_like(x), x.clone().requires_grad_()
    with forward_ad.dual_level():
        result = function(forward_ad.make_dual(x, tangent))
        forward = forward_ad.unpack_dual(result).tangent
    assert forward is not None
    # The derivative of a scalar result that is multiplied by a number may be float64, whatever the layer.
    torch.testing.assert_close(torch.func.jvp(function, (x,), (tangent,)), (function(x), forward), check_dtype=False)
    weight = torch.rand_like(forward)
    (backward,) = torch.autograd.grad(function(leaf), leaf, weight)
    forward_sum, backward_sum = (forward * weight).sum().double(), (backward * tangent).sum().double()
    torch.testing.assert_close(forward_sum, backward_sum, rtol=1e-4, atol=1e-4)


def test_no_forward_derivative_comes_from_the_image() -> None:
    with forward_ad.dual_level():
        image = forward_ad.make_dual(IMAGE, torch.ones_like(IMAGE))
        assert forward_ad.unpack_dual(PAMR(2, [1, 2])(image, MAPS)).tangent is None


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("name", [name for name in FUNCTIONS if name != "StochasticGate"])  # its draw is not a loop's
def test_vmap_is_a_loop(name: str) -> None:
    function, x = FUNCTIONS[name]
    batch = torch.stack([x, x.flip(2)])
    torch.testing.assert_close(torch.vmap(function)(batch), torch.stack([function(x) for x in batch]))


@pytest.mark.parametrize("name", ["PAMR", "PAR", "bilateral_filter"])
def test_function_transforms_of_refinements(name: str) -> None:
    function, x = FUNCTIONS[name][0], FUNCTIONS[name][1].double()

    def cubes(masks: Tensor) -> Tensor:
        return function(masks).pow(3).sum()

    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(cubes(leaf), leaf)
    torch.testing.assert_close(torch.func.grad(cubes)(x), gradient)
    torch.testing.assert_close(torch.func.jvp(cubes, (x,), (x,))[1], (gradient * x).sum())
    batched = torch.stack([x, 2 * x, x.flip(3)])
    torch.testing.assert_close(torch.vmap(function)(batched), torch.stack([function(one) for one in batched]))
    torch.testing.assert_close(torch.vmap(torch.func.grad(cubes))(batched)[0], gradient)


def test_vmap_over_images() -> None:
    images, maps = torch.stack([IMAGE, IMAGE.flip(2)], dim=1), torch.stack([MAPS, 2 * MAPS], dim=3)
    functions: list[Callable[..., Tensor]] = [
        PAMR(2, [1, 2]),
        lambda image, values: bilateral_filter(values, image, 2.0, 0.3, True),
        lambda image, scores: DenseCRF(2)(255 * image, scores),
    ]
    for function in functions:
        actual = torch.vmap(function, in_dims=(1, 3))(images, maps)
        torch.testing.assert_close(actual, torch.stack([function(images[:, i], maps[:, :, :, i]) for i in range(2)]))
        actual = torch.vmap(function, in_dims=(1, None))(images, MAPS)
        torch.testing.assert_close(actual, torch.stack([function(images[:, i], MAPS) for i in range(2)]))


def test_masks_that_share_an_affinity_under_vmap() -> None:
    function, masks = PAMR(2, [1, 2]), torch.rand(3, 4, 5, 6, 7)  # two masks per image
    actual = torch.vmap(function, in_dims=(None, 0))(IMAGE, masks)
    torch.testing.assert_close(actual, torch.stack([function(IMAGE, one) for one in masks]))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap_over_classes() -> None:
    classes = torch.stack([torch.arange(10).view(2, 5) % 3 == 1, torch.arange(10).view(2, 5) > 6])
    affinity = pamr_affinity(IMAGE, [1, 2])
    functions: list[Callable[[Tensor], Tensor]] = [
        lambda one: PAMR(2, [1, 2])(IMAGE, MAPS, one),
        lambda one: PAR([1, 2], 2, backend="eager")(IMAGE, MAPS, one, "keep"),
        lambda one: DenseCRF(2)(255 * IMAGE, MAPS, one),
        lambda one: PseudoLabels(PAR([1, 2], 2), (0.4, 0.2))(IMAGE, MAPS, one),
        lambda one: pamr_propagate(MAPS, affinity, [1, 2], 2, counts=one.sum(dim=1)),
    ]
    for function in functions:
        torch.testing.assert_close(torch.vmap(function)(classes), torch.stack([function(one) for one in classes]))


def test_transforms_of_the_dense_crf() -> None:
    def cubes(scores: Tensor) -> Tensor:
        return DenseCRF(2)(255 * IMAGE, scores).pow(3).sum()

    x = (0.1 + MAPS).double()
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(cubes(leaf), leaf)
    torch.testing.assert_close(torch.func.grad(cubes)(x), gradient)
    torch.testing.assert_close(torch.vmap(torch.func.grad(cubes))(torch.stack([x, x.flip(2)]))[0], gradient)
    # Its forward and its second derivatives are not there. They are refused, not dropped.
    refused = r"differentiable once, in reverse mode, and a (forward derivative|second gradient) was asked for"
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match=refused):
        cubes(forward_ad.make_dual(x, x))
    for derivative in (torch.func.hessian(cubes), torch.func.grad(lambda x: torch.func.grad(cubes)(x).sum())):
        with pytest.raises(NotImplementedError, match=refused):
            derivative(x)


@pytest.mark.parametrize("name", ["PAMR", "PAR"])
def test_second_derivatives_of_refinements(name: str) -> None:
    x = MAPS[:1, :1, :2, :3].double()
    image = IMAGE[:1, :, :2, :3]
    refine = {"PAMR": PAMR(2, [1, 2]), "PAR": PAR([1, 2], 2)}[name]

    def cubes(masks: Tensor) -> Tensor:
        return refine(image, masks).pow(3).sum()

    rows = [refine(image, unit.view_as(x)).flatten() for unit in torch.eye(x.numel(), dtype=x.dtype)]
    matrix = torch.stack(rows, dim=1)  # [HW, HW]: the refinement is linear
    expected = matrix.T @ torch.diag(6 * refine(image, x).flatten()) @ matrix
    torch.testing.assert_close(torch.func.hessian(cubes)(x).view_as(expected), expected)

    direction = torch.rand_like(x)
    leaf = x.clone().requires_grad_()
    with forward_ad.dual_level():  # forward over reverse
        (gradient,) = torch.autograd.grad(cubes(forward_ad.make_dual(leaf, direction)), leaf, create_graph=True)
        tangent = forward_ad.unpack_dual(gradient).tangent
    torch.testing.assert_close(tangent.flatten(), expected @ direction.flatten())


@each_function
def test_default_dtype_and_device_do_not_matter(name: str) -> None:
    function, x = seeded(FUNCTIONS[name][0]), FUNCTIONS[name][1]
    expected = function(x)
    for dtype in (torch.float64, torch.bfloat16):
        torch.set_default_dtype(dtype)
        try:
            result = function(x)
        finally:
            torch.set_default_dtype(torch.float32)
        assert result.dtype == torch.float32
        assert torch.equal(result, expected)
    with torch.device("meta"):
        result = function(x)
    assert torch.equal(result, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [name for name in FUNCTIONS if "GCI" not in name])
def test_meta_tensors_give_shape_and_dtype(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    function, x = FUNCTIONS[name]
    expected = function(x.to(dtype))
    for other in ("IMAGE", "MAPS"):
        monkeypatch.setitem(globals(), other, globals()[other].to("meta"))
    result = function(x.to("meta", dtype))
    assert result.device.type == "meta"
    assert (result.shape, result.dtype) == (expected.shape, expected.dtype)


@each_function
def test_fake_tensors_give_shape_and_dtype(name: str) -> None:
    function, x = FUNCTIONS[name]
    expected = function(x)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        result = function(mode.from_tensor(x))
    assert isinstance(result, FakeTensor)
    assert (result.shape, result.dtype) == (expected.shape, expected.dtype)


def test_fake_tensors_with_classes() -> None:
    layer, labels = PAMR(2, [1, 2]), PseudoLabels(PAR([1, 2], 2))
    with FakeTensorMode():
        image, masks = torch.rand(2, 3, 6, 7), torch.rand(2, 5, 6, 7, requires_grad=True)
        present = torch.ones(2, 5, dtype=torch.bool)
        refined = layer(image, masks, classes=present)
        (gradient,) = torch.autograd.grad(refined.sum(), masks)
        target = labels(image, masks.detach(), present)
    assert (refined.shape, gradient.shape) == (masks.shape, masks.shape)
    assert (target.shape, target.dtype) == (torch.Size([2, 6, 7]), torch.int64)


@pytest.mark.parametrize(
    ("module", "attribute", "value", "message"),
    [
        (PAMR(), "num_iter", -1, "num_iter must be at least 0, got -1"),
        (PAMR(), "dilations", [0], r"dilations\[0\] must be at least 1, got 0"),
        (PAMR(), "variant", "eq8", "variant must be one of .*, got 'eq8'"),
        (PAMR(), "backend", "cuda", "backend must be one of .*, got 'cuda'"),
        (PAR(), "resize", "both", "resize must be one of .*, got 'both'"),
        (PAR(), "renormalise", "no", "renormalise must be True or False, got 'no'"),
        (nGWPPool(), "eps", 0, "eps must be positive, got 0"),
        (StochasticGate(), "mixing_rate", 1, r"mixing_rate must be in \[0, 1\), got 1"),
        (StochasticGate(), "mode", "random", "mode must be one of .*, got 'random'"),
    ],
)
def test_attributes_are_checked_when_they_are_used(module: nn.Module, attribute: str, value: Any, message: str) -> None:
    module = copy.deepcopy(module)
    setattr(module, attribute, value)
    with pytest.raises((TypeError, ValueError), match=message):
        module(MAPS, MAPS)


def test_attributes_are_checked_when_only_an_affinity_is_computed() -> None:
    module = PAMR()
    module.variant = "eq8"  # type: ignore[assignment]
    with pytest.raises(ValueError, match="variant must be one of 'pamr', 'paper', 'par', got 'eq8'"):
        module.affinity(IMAGE)


def test_training_is_a_flag() -> None:
    with pytest.raises(TypeError, match="training must be True or False, got 'eval'"):
        stochastic_gate(MAPS, MAPS, training="eval")  # type: ignore[arg-type]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("number", [np.float16(0.5), np.float32(0.5), np.float64(0.5), Fraction(1, 2)])
def test_numbers_of_other_kinds(number: Any) -> None:
    leaf = MAPS.clone().requires_grad_()
    assert torch.equal(nGWPPool(number)(leaf, MAPS), nGWPPool(0.5)(leaf, MAPS))
    assert torch.equal(FocalSizePenalty(number, number)(leaf), FocalSizePenalty(0.5, 0.5)(leaf))
    for training in (True, False):
        ours, theirs = StochasticGate(number).train(training), StochasticGate(0.5).train(training)
        assert torch.equal(*(seeded(gate)(leaf, MAPS) for gate in (ours, theirs)))


def test_integers_of_numpy() -> None:
    affinity = pamr_affinity(IMAGE, [np.int8(1), np.int64(2)])
    expected = PAMR(2, [1, 2])(IMAGE, MAPS)
    assert torch.equal(pamr_propagate(MAPS, affinity, [np.uint8(1), np.int16(2)], np.int32(2)), expected)


def test_gate_of_rate_zero_has_the_common_dtype() -> None:
    for training in (True, False):
        gate = StochasticGate(0.0).train(training)
        assert gate(MAPS.half(), MAPS).dtype == torch.float32
        assert torch.equal(gate(MAPS.half(), MAPS), MAPS.half().float())


@each_function
def test_results_and_gradients_repeat_bit_by_bit(name: str) -> None:
    function, x = seeded(FUNCTIONS[name][0]), FUNCTIONS[name][1]
    weight = torch.rand_like(function(x))

    def run() -> tuple[Tensor, Tensor]:
        leaf = x.clone().requires_grad_()
        result = function(leaf)
        return result, torch.autograd.grad(result, leaf, weight)[0]

    for first, second in zip(run(), run(), strict=True):
        assert torch.equal(first, second)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_exception_layout() -> None:
    wrong = [
        (MAPS.to_sparse(), r"layout torch\.sparse_coo"),
        (torch.nested.nested_tensor(list(MAPS)), "a nested tensor"),
        (torch.nested.nested_tensor(list(MAPS), layout=torch.jagged), "a nested tensor"),
    ]
    for maps, what in wrong:
        with pytest.raises(TypeError, match=rf"^mask must be a dense tensor, got {what}$"):
            PAMR()(IMAGE, maps)
        with pytest.raises(TypeError, match=rf"^scores must be a dense tensor, got {what}$"):
            nGWPPool()(maps, MAPS)
