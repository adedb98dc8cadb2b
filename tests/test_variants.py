"""The forms of the affinity that other repositories use, through the layers: their numbers, and no sigma at all."""

from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from tests import reference
from tests.strategies import assert_close, backends, exact, map_shapes, seeds, uniform
from wsseg_layers import PAMR, PAR
from wsseg_layers.functional import pamr, par
from wsseg_layers.kernels import VARIANTS, BackendName, Variant, pamr_affinity

dilation_lists = st.lists(st.integers(1, 12), min_size=1, max_size=3)
FLOAT32 = {"dtype": torch.float32, "precision": torch.float32}


@given(
    map_shapes(max_channels=4),
    st.sampled_from([0.3, 0.5, 1.7]),
    st.sampled_from([0.0, 0.01, 0.4]),
    st.sampled_from([1e-8, 1e-5, 0.1]),
    dilation_lists,
    backends,
    seeds,
)
@settings(max_examples=25)
def test_numbers_of_par(
    shape: tuple[int, ...],
    w1: float,
    w2: float,
    guard: float,
    dilations: list[int],
    backend: BackendName,
    seed: int,
) -> None:
    imgs = uniform(shape, torch.float32, "contiguous", seed)
    masks = uniform((shape[0], 2, *shape[2:]), torch.float32, "contiguous", seed + 1)
    module = PAR(dilations, 2, backend=backend, w1=w1, w2=w2, guard=guard)
    affinity = reference.par_affinity(exact(imgs), dilations, w1, w2, guard)
    assert_close(module.affinity(imgs), affinity, **FLOAT32)
    expected = reference.pamr_propagate(exact(masks), affinity, dilations, 2)
    assert_close(module(imgs, masks), expected, **FLOAT32)
    assert torch.equal(module(imgs, masks), par(imgs, masks, dilations, 2, backend=backend, w1=w1, w2=w2, guard=guard))
    in_range = PAR(dilations, 2, renormalise=True, backend=backend, w1=w1, w2=w2, guard=guard)
    assert_close(in_range(imgs, masks), expected / (1 + w2) ** 2, **FLOAT32)


def test_par_without_its_position_term_is_the_softmax_of_colours() -> None:
    imgs = torch.rand(2, 3, 6, 7)
    colour = PAR([1, 3], w2=0).affinity(imgs)
    torch.testing.assert_close(colour.sum(dim=1), torch.ones(2, 6, 7))
    position = PAR([1, 3], w2=0.2).affinity(imgs) - colour
    torch.testing.assert_close(position, position[:1, :, :1, :1].expand_as(position), rtol=1e-4, atol=1e-6)
    assert_close(
        position[0, :, 0, 0], 0.2 * reference.position_affinity([1, 3]), dtype=torch.float32, precision=torch.float32
    )


def test_numbers_of_par_can_be_set_after_construction() -> None:
    imgs, module = torch.rand(1, 3, 6, 7), PAR([1, 2])
    module.w1, module.w2, module.guard = 0.5, 0.0, 1e-5
    assert torch.equal(module.affinity(imgs), PAR([1, 2], w1=0.5, w2=0.0, guard=1e-5).affinity(imgs))
    module.w1 = 0.0
    with pytest.raises(ValueError, match=r"^w1 must be positive, got 0.0"):
        module.affinity(imgs)


@given(map_shapes(max_channels=4), st.sampled_from([0.2, 0.05, 1.0]), dilation_lists, backends, seeds)
@settings(max_examples=25)
def test_weight_of_pamr(
    shape: tuple[int, ...], weight: float, dilations: list[int], backend: BackendName, seed: int
) -> None:
    image = uniform(shape, torch.float32, "contiguous", seed)
    mask = uniform((shape[0], 2, *shape[2:]), torch.float32, "contiguous", seed + 1)
    module = PAMR(2, dilations, Variant(weight=weight), backend=backend)
    affinity = reference.scaled_pamr_affinity(exact(image), dilations, weight)
    assert_close(module.affinity(image), affinity, **FLOAT32)
    expected = reference.pamr_propagate(exact(mask), affinity, dilations, 2)
    assert_close(module(image, mask), expected, **FLOAT32)
    assert torch.equal(module(image, mask), pamr(image, mask, 2, dilations, Variant(weight=weight), backend=backend))


@given(
    map_shapes(max_channels=4),
    st.sampled_from([0.1, 0.5, 3.0]),
    st.sampled_from([1, 2]),
    st.booleans(),
    dilation_lists,
    backends,
    seeds,
)
@settings(max_examples=25)
def test_no_sigma(
    shape: tuple[int, ...],
    scale: float,
    power: int,
    with_centre: bool,
    dilations: list[int],
    backend: BackendName,
    seed: int,
) -> None:
    image = uniform(shape, torch.float32, "contiguous", seed)
    # The constant may be given as the factor or as the guard; sigma plays no part, whatever it is taken over.
    for weight, guard in ((scale, 0.0), (scale / 2, scale / 2)):
        variant = Variant(weight=weight, sigma_power=0, power=power, guard=guard, with_centre=with_centre)
        actual = pamr_affinity(image, dilations, variant, backend)
        assert_close(actual, reference.constant_affinity(exact(image), dilations, scale, power), **FLOAT32)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"w1": 0}, ValueError, "w1 must be positive, got 0"),
        ({"w1": "0.3"}, TypeError, "w1 must be a number, got str"),
        ({"w2": -0.01}, ValueError, "w2 must be at least 0, got -0.01"),
        ({"guard": -1e-8}, ValueError, "guard must be at least 0, got -1e-08"),
        ({"guard": float("nan")}, ValueError, "guard must be finite, got nan"),
    ],
)
def test_exception_numbers_of_par(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        PAR(**arguments)
    with pytest.raises(error, match=message):
        par(torch.rand(1, 3, 4, 4), torch.rand(1, 2, 4, 4), **arguments)


@pytest.mark.parametrize(
    ("variant", "error", "message"),
    [
        (Variant(weight=0), ValueError, r"variant.weight must be positive, got 0"),
        (Variant(sigma_power=3), ValueError, r"variant.sigma_power must be one of 0, 1, 2, got 3"),
        (Variant(power=0), ValueError, r"variant.power must be one of 1, 2, got 0"),
        (Variant(power=2.0), ValueError, r"variant.power must be one of 1, 2, got 2.0"),  # type: ignore[arg-type]
        (Variant(sigma_power=True), ValueError, r"variant.sigma_power must be one of 0, 1, 2, got True"),
        (Variant(guard=-1.0), ValueError, r"variant.guard must be at least 0, got -1.0"),
        (Variant(with_centre=1), TypeError, r"variant.with_centre must be True or False, got 1"),  # type: ignore[arg-type]
        (Variant(position_weight=-1.0), ValueError, r"variant.position_weight must be at least 0, got -1.0"),
    ],
)
def test_exception_variant(
    variant: Variant, error: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(VARIANTS, "mine", variant)
    for given_variant in (variant, "mine"):
        with pytest.raises(error, match=message):
            PAMR(variant=given_variant)  # type: ignore[arg-type]
        with pytest.raises(error, match=message):
            pamr_affinity(torch.rand(1, 3, 4, 4), [1], given_variant)  # type: ignore[arg-type]
