"""Wrong calls of everything public: an error that names the argument, or a right result; never anything else."""

import copy
import pickle
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn

from tests.strategies import CPU_BACKENDS
from wsseg_layers import GCI, PAMR, PAR, FocalSizePenalty, StochasticGate, nGWPPool
from wsseg_layers.functional import dense_crf, global_cue_injection, normalise_cam, threshold_pseudo_labels
from wsseg_layers.kernels import pamr_affinity, pamr_propagate

SHAPE = (2, 5, 8, 9)
IMAGE, MAPS, CUES = torch.rand(2, 3, 8, 9), torch.rand(SHAPE), torch.rand(2, 10, 3, 3)
AFFINITY = pamr_affinity(IMAGE, [1, 2])
LABELS = torch.ones(2, 4)

# Every place where a tensor goes in, with the name that an error must give it.
TENSORS: dict[str, Callable[[Any], Tensor]] = {
    "PAMR image": lambda x: PAMR(2, [1, 2])(x, MAPS),
    "PAMR mask": lambda x: PAMR(2, [1, 2])(IMAGE, x),
    "PAMR.affinity image": lambda x: PAMR(2, [1, 2]).affinity(x),
    "PAMR.propagate mask": lambda x: PAMR(2, [1, 2]).propagate(x, AFFINITY),
    "PAMR.propagate affinity": lambda x: PAMR(2, [1, 2]).propagate(MAPS, x),
    "PAR imgs": lambda x: PAR([1, 2], 2)(x, MAPS),
    "PAR masks": lambda x: PAR([1, 2], 2)(IMAGE, x),
    "PAR.affinity imgs": lambda x: PAR([1, 2], 2).affinity(x),
    "PAR.propagate masks": lambda x: PAR([1, 2], 2).propagate(x, AFFINITY),
    "pamr_affinity image": lambda x: pamr_affinity(x, [1, 2]),
    "pamr_propagate mask": lambda x: pamr_propagate(x, AFFINITY, [1, 2], 2),
    "nGWPPool scores": lambda x: nGWPPool()(x, MAPS),
    "nGWPPool masks": lambda x: nGWPPool()(MAPS, x),
    "FocalSizePenalty masks": lambda x: FocalSizePenalty()(x),
    "StochasticGate deep": lambda x: StochasticGate()(x, MAPS),
    "StochasticGate shallow": lambda x: StochasticGate().eval()(MAPS, x),
    "GCI shallow": lambda x: GCI(5)(x, MAPS),
    "GCI deep": lambda x: GCI(5, norm="instance")(MAPS, x),
    "global_cue_injection shallow": lambda x: global_cue_injection(x, CUES),
    "global_cue_injection cues": lambda x: global_cue_injection(MAPS, x),
}
NO_TENSORS: dict[str, Any] = {
    "None": None,
    "list": [1, 2],
    "string": "mask",
    "array": np.ones(SHAPE, np.float32),
    "int64": torch.ones(SHAPE, dtype=torch.int64),
    "uint8": torch.ones(SHAPE, dtype=torch.uint8),
    "bool": torch.ones(SHAPE, dtype=torch.bool),
    "complex": torch.ones(SHAPE, dtype=torch.complex64),
    "float8": torch.ones(SHAPE).to(torch.float8_e4m3fn),
    "sparse": MAPS.to_sparse(),
    "mkldnn": MAPS.to_mkldnn(),
}
# Tensors that no other argument of the call goes with.
WRONG_SHAPES = {
    "rank 3": torch.rand(3, 8, 9),
    "rank 5": torch.rand(1, 2, 5, 8, 9),
    "a number": torch.tensor(1.0),
    "another batch": torch.rand(3, 5, 8, 9),
    "no channel": torch.rand(2, 0, 8, 9),
    "no row": torch.rand(2, 5, 0, 9),
    "another device": torch.rand(SHAPE, device="meta"),
}


@pytest.mark.parametrize("what", NO_TENSORS)
@pytest.mark.parametrize("place", TENSORS)
def test_wrong_kinds_of_tensors(place: str, what: str) -> None:
    argument = place.split()[-1]
    with pytest.raises(TypeError, match=f"^{argument} must (be|have dtype) .*, got .+"):
        TENSORS[place](NO_TENSORS[what])


@pytest.mark.parametrize("what", WRONG_SHAPES)
@pytest.mark.parametrize("place", TENSORS)
def test_wrong_shapes(place: str, what: str) -> None:
    argument = place.split()[-1]
    alone = place in ("PAMR.affinity image", "PAR.affinity imgs", "pamr_affinity image", "FocalSizePenalty masks")
    if (alone and what in ("another batch", "another device")) or (place, what) == (
        "FocalSizePenalty masks",
        "no channel",
    ):
        result = TENSORS[place](WRONG_SHAPES[what])
        assert (len(result), result.device) == (len(WRONG_SHAPES[what]), WRONG_SHAPES[what].device)
        return
    with pytest.raises(ValueError, match=r"must .*, got .+") as error:
        TENSORS[place](WRONG_SHAPES[what])
    assert argument.removesuffix("s") in str(error.value)  # PAR.propagate's operator knows one name for both layers


# Every parameter, with what it may be.
PARAMETERS: dict[str, tuple[Callable[[Any], Tensor], Callable[[Any], bool]]] = {
    "num_iter PAMR": (lambda v: PAMR(num_iter=v)(IMAGE, MAPS), lambda v: is_integer(v) and v >= 0),
    "num_iter PAR": (lambda v: PAR(num_iter=v)(IMAGE, MAPS), lambda v: is_integer(v) and v >= 0),
    "num_iter operator": (lambda v: pamr_propagate(MAPS, AFFINITY, [1, 2], v), lambda v: is_integer(v) and v >= 0),
    "dilations PAMR": (lambda v: PAMR(1, dilations=v)(IMAGE, MAPS), lambda v: is_dilations(v)),
    "dilations PAR": (lambda v: PAR(dilations=v, num_iter=1)(IMAGE, MAPS), lambda v: is_dilations(v)),
    "dilations operator": (lambda v: pamr_affinity(IMAGE, v), lambda v: is_dilations(v)),
    "variant PAMR": (lambda v: PAMR(1, variant=v)(IMAGE, MAPS), lambda v: v in ("pamr", "paper", "par")),
    "variant operator": (lambda v: pamr_affinity(IMAGE, [1], v), lambda v: v in ("pamr", "paper", "par")),
    "resize PAMR": (lambda v: PAMR(1, resize=v)(IMAGE, MAPS), lambda v: v in ("mask", "image", "none")),
    "resize PAR": (lambda v: PAR(num_iter=1, resize=v)(IMAGE, MAPS), lambda v: v in ("mask", "image", "none")),
    "backend": (lambda v: PAMR(1, backend=v)(IMAGE, MAPS), lambda v: v in ("auto", *CPU_BACKENDS)),
    "renormalise": (lambda v: PAR(num_iter=1, renormalise=v)(IMAGE, MAPS), lambda v: isinstance(v, bool)),
    "eps nGWPPool": (lambda v: nGWPPool(eps=v)(MAPS, MAPS), lambda v: is_real(v) and v > 1.2e-38),
    "eps GCI": (lambda v: global_cue_injection(MAPS, CUES, eps=v), lambda v: is_real(v) and v >= 0),
    "p": (lambda v: FocalSizePenalty(p=v)(MAPS), lambda v: is_real(v) and v >= 0),
    "lam": (lambda v: FocalSizePenalty(lam=v)(MAPS), lambda v: is_real(v) and v > 1.2e-38),
    "mixing_rate": (lambda v: StochasticGate(mixing_rate=v)(MAPS, MAPS), lambda v: is_real(v) and 0 <= v < 1),
    "mode": (lambda v: StochasticGate(mode=v)(MAPS, MAPS), lambda v: v in ("stochastic", "deterministic")),
    "in_channels": (lambda v: GCI(v, 5)(MAPS, torch.rand(2, v, 8, 9)), lambda v: is_integer(v) and 0 < v < 99),
    "out_channels": (lambda v: GCI(5, 5, v)(MAPS, MAPS), lambda v: v is None or (is_integer(v) and 0 < v < 99)),
    "norm": (lambda v: GCI(5, norm=v)(MAPS, MAPS), lambda v: v in ("batch", "instance")),
    "eps normalise_cam": (lambda v: normalise_cam(MAPS, eps=v), lambda v: is_real(v) and v > 1.2e-38),
    "floor dense_crf": (lambda v: dense_crf(IMAGE, MAPS, 1, floor=v), lambda v: is_real(v) and 1.2e-38 < v < 1),
    "foreground": (lambda v: threshold_pseudo_labels(MAPS, LABELS, v).float(), lambda v: is_real(v) and v >= 0),
    "floor labels": (lambda v: threshold_pseudo_labels(MAPS, LABELS, floor=v).float(), lambda v: is_real(v) and v >= 0),
}  # fmt: skip


def is_integer(value: Any) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool) and bool(value < 2**31)


def is_real(value: Any) -> bool:
    numbers = isinstance(value, (int, float, np.integer, np.floating, Fraction)) and not isinstance(value, bool)
    return numbers and bool(abs(value) < 3.4e38)


def is_dilations(value: Any) -> bool:
    return isinstance(value, (list, tuple, range)) and len(value) > 0 and all(is_integer(d) and d > 0 for d in value)


numbers = st.one_of(
    st.integers(-3, 6),
    st.floats(),
    st.floats(0, 1),
    st.booleans(),
    st.sampled_from([10**30, 2**31, -(2**63), np.int64(2), np.float32(0.5), np.bool_(True), Fraction(1, 3), 1 + 2j]),
)
things = st.one_of(
    st.none(),
    st.text(max_size=8),
    st.binary(max_size=3),
    st.sampled_from(["pamr", "paper", "par", "mask", "image", "none", "auto", "eager", "triton", "batch"]),
    numbers,
    st.lists(numbers, max_size=3),
    st.tuples(st.integers(1, 9), st.integers(0, 2**31)),
    st.sampled_from([{1, 2}, {"a": 1}, range(1, 3), torch.Size([1, 2]), np.array([1, 2]), object()]),
    st.sampled_from([torch.tensor(2), torch.tensor([1, 2]), torch.tensor(0.3), [torch.tensor(2)], [[1]]]),
)


@pytest.mark.parametrize("parameter", PARAMETERS)
@settings(max_examples=60)
@given(value=things)
def test_parameters(parameter: str, value: Any) -> None:
    call, is_right = PARAMETERS[parameter]
    name = parameter.split()[0]
    try:
        is_good = bool(is_right(value))
    except (TypeError, ValueError, RuntimeError):  # not even comparable with what it should be
        is_good = False
    if is_good:
        result = call(value)
        assert result.dtype == torch.float32
        assert result.isfinite().all()
    else:
        with pytest.raises((TypeError, ValueError), match=rf"^{name}(\[\d+\])? (must|= )|^{name}='triton' needs"):
            call(value)


LAYERS: dict[str, tuple[nn.Module, tuple[Tensor, ...]]] = {
    "PAMR": (PAMR(2, [1, 2]), (IMAGE, MAPS)),
    "PAR": (PAR([1, 2], 2), (IMAGE, MAPS)),
    "nGWPPool": (nGWPPool(), (torch.rand(SHAPE), MAPS)),
    "FocalSizePenalty": (FocalSizePenalty(), (MAPS,)),
    "StochasticGate": (StochasticGate().eval(), (torch.rand(SHAPE), MAPS)),
    "GCI, batch": (GCI(5).eval(), (torch.rand(SHAPE), MAPS)),
    "GCI, instance": (GCI(5, norm="instance").eval(), (torch.rand(SHAPE), MAPS)),
}
each_layer = pytest.mark.parametrize("layer", LAYERS)


@each_layer
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtype_of_the_result(layer: str, dtype: torch.dtype) -> None:
    module, inputs = LAYERS[layer]
    result = copy.deepcopy(module).to(dtype)(*(x.to(dtype) for x in inputs))
    assert result.dtype == dtype
    torch.testing.assert_close(result.float(), module(*inputs), rtol=5e-2, atol=5e-2)


@pytest.mark.parametrize("norm", ["batch", "instance"])
def test_features_of_another_dtype_than_the_weights(norm: Any) -> None:
    module = GCI(5, norm=norm)
    with pytest.raises(TypeError, match=r"^deep must have the dtype of the module's weights, torch.float32, got .*64"):
        module(MAPS, MAPS.double())
    with torch.autocast("cpu", torch.bfloat16):
        assert module(MAPS.bfloat16(), MAPS).dtype == torch.bfloat16


@each_layer
def test_copies(layer: str) -> None:
    module, inputs = LAYERS[layer]
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(twin(*inputs), module(*inputs))


@each_layer
def test_views_and_modes(layer: str) -> None:
    module, inputs = LAYERS[layer]
    expected = module(*inputs)
    stretched = [x[:1, :, :1].expand(x.shape) for x in inputs]  # strides of zero
    torch.testing.assert_close(module(*stretched), module(*(x.contiguous() for x in stretched)))
    torch.testing.assert_close(module(*(x.to(memory_format=torch.channels_last) for x in inputs)), expected)
    torch.testing.assert_close(module(*(nn.Parameter(x) for x in inputs)), expected)
    with torch.inference_mode():
        torch.testing.assert_close(module(*(x.clone() for x in inputs)), expected)
