from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given
from numpy.typing import NDArray

from tests import reference
from tests.strategies import CPU_BACKENDS, assert_close, backends, dtypes, exact, layouts, map_shapes, seeds, uniform
from wsseg_layers.kernels import VARIANTS, BackendName, VariantName, pamr_affinity
from wsseg_layers.kernels.backends.eager import affinities
from wsseg_layers.kernels.variants import Variant

dilation_lists = st.lists(st.sampled_from([1, 2, 3, 5, 24]), min_size=1, max_size=3)  # some repeat, some pass the image
variants = st.sampled_from(list(VARIANTS))


@given(map_shapes(max_channels=3), dilation_lists, variants, backends, dtypes, layouts, seeds)
def test_equals_the_definition(
    shape: tuple[int, ...],
    dilations: list[int],
    variant: VariantName,
    backend: BackendName,
    dtype: torch.dtype,
    layout: str,
    seed: int,
) -> None:
    image = uniform(shape, dtype, layout, seed)
    expected = reference.pamr_affinity(exact(image), dilations, variant)
    actual = pamr_affinity(image, dilations, variant, backend)
    assert_close(actual, expected, dtype=torch.float32, precision=torch.float32)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda noise: noise * 255, id="0 to 255"),
        pytest.param(lambda noise: (noise - 0.45) / 0.22, id="normalised"),
        pytest.param(lambda noise: 0.5 + 1e-6 * noise, id="nearly flat"),
        pytest.param(lambda noise: 1000 + 0.01 * noise, id="large offset"),
        pytest.param(lambda noise: np.where(noise > 0.97, 1.0, 0.001 * noise), id="outliers"),
        pytest.param(lambda noise: np.where(noise > 0.5, 1.0, 0.0), id="two values"),
    ],
)
@pytest.mark.parametrize("backend", ["auto", "eager"])
def test_is_accurate_for_every_range_of_values(
    backend: BackendName,
    variant: VariantName,
    make: Callable[[NDArray[np.float64]], NDArray[np.float64]],
    device: torch.device,
) -> None:
    image = torch.from_numpy(make(np.random.default_rng(0).random((1, 3, 11, 13)))).float()
    expected = reference.pamr_affinity(exact(image), [1, 2, 4], variant)
    affinity = pamr_affinity(image.to(device), [1, 2, 4], variant, backend)
    assert_close(affinity, expected, dtype=torch.float32, precision=torch.float32)


@pytest.mark.parametrize("variant", [name for name, form in VARIANTS.items() if form.is_steep])
@pytest.mark.parametrize("contrast", [1e-2, 1e-4])
@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_steep_forms_lose_nothing_before_they_are_rounded(
    backend: BackendName, variant: VariantName, contrast: float
) -> None:
    # In float32 throughout, these images' errors are some 1e-6; half of that for "par" in C++, which is in float32.
    tolerance = 1e-6 if (backend, variant) == ("cpp", "par") else 2e-7
    image = torch.from_numpy(contrast * np.random.default_rng(0).random((1, 3, 11, 13))).float()
    expected = torch.from_numpy(reference.pamr_affinity(exact(image), [1, 2, 4], variant))
    actual = pamr_affinity(image, [1, 2, 4], variant, backend).double()
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_an_outlier_among_nearly_equal_neighbours(backend: BackendName) -> None:
    # Without the centre in sigma, the exponents are some 100,000, and only their differences matter.
    image = torch.from_numpy(1e-4 * np.random.default_rng(0).random((1, 2, 11, 13))).float()
    image[..., 5, 6] = 1
    expected = torch.from_numpy(reference.neighbour_affinity(exact(image), [1, 2, 4], 0.1))
    actual = pamr_affinity(image, [1, 2, 4], Variant(with_centre=False), backend).double()
    torch.testing.assert_close(actual, expected, rtol=2e-7, atol=2e-7)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_squares_of_small_multiples_of_sigma_lose_nothing_either(backend: BackendName) -> None:
    image = torch.from_numpy(np.random.default_rng(0).random((1, 3, 11, 13))).float()  # exponents of some thousands
    variant = Variant(weight=0.02, power=2, with_centre=False)
    weights = pamr_affinity(image, [1, 2, 4], variant, backend)
    exact_weights = pamr_affinity(image.double(), [1, 2, 4], variant, backend)
    torch.testing.assert_close(weights, exact_weights, rtol=2e-7, atol=2e-7)


@pytest.mark.parametrize(("variant", "contrast"), [("pamr", 1), ("paper", 0.03), ("par", 1)])
@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_small_weights_are_as_small_as_they_should_be(
    backend: BackendName, variant: VariantName, contrast: float
) -> None:
    image = torch.from_numpy(contrast * np.random.default_rng(0).random((1, 1, 11, 13)) ** 20).float()
    expected = torch.from_numpy(reference.pamr_affinity(exact(image), [1, 2, 4, 7, 9], variant))
    actual = pamr_affinity(image, [1, 2, 4, 7, 9], variant, backend).double()
    assert expected.min() < (1e-2 / 48 / 48 if variant == "par" else 1e-20)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-37)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_a_single_different_pixel_gets_almost_no_weight(backend: BackendName, variant: VariantName) -> None:
    image, dilations = torch.zeros(1, 1, 11, 13), list(range(1, 25))  # exponents down to -147 and far below
    image[..., 5, 6] = 1
    expected = torch.from_numpy(reference.pamr_affinity(exact(image), dilations, variant))
    actual = pamr_affinity(image, dilations, variant, backend).double()
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-37)


@pytest.mark.parametrize("power", [1, 2])  # float32, float64
@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_neighbours_that_equal_each_other_but_not_the_pixel(
    backend: BackendName, power: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Their variance is 0, and what rounding leaves of it may be negative.
    monkeypatch.setitem(VARIANTS, "mine", Variant(1.0, power=power, with_centre=False))
    image = torch.zeros(1, 1, 11, 1111)
    image[..., 5, 5::11] = torch.linspace(0, 1, 101)
    affinity = pamr_affinity(image, [1, 3, 5], "mine", backend)  # type: ignore[arg-type]
    torch.testing.assert_close(affinity[..., 5, 5::11], torch.full((1, 24, 101), 1 / 24))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_image_of_two_nearly_equal_values(backend: BackendName, variant: VariantName) -> None:
    image = 1e-4 * (torch.rand(1, 1, 30, 40) > 0.5).float()  # where eq. 8 has exponents of -10,000
    expected = reference.pamr_affinity(exact(image), [1], variant)
    actual = pamr_affinity(image, [1], variant, backend)
    assert_close(actual, expected, dtype=torch.float32, precision=torch.float32)


@pytest.mark.parametrize("variant", ["pamr", "paper"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_is_uniform_where_the_image_is_flat(backend: BackendName, variant: VariantName, dtype: torch.dtype) -> None:
    affinity = pamr_affinity(torch.full((2, 3, 5, 6), 123.4, dtype=dtype), [1, 2], variant, backend)
    torch.testing.assert_close(affinity, torch.full((2, 16, 5, 6), 1 / 16), rtol=0, atol=1e-7)


@given(map_shapes(), dilation_lists, variants, backends, seeds)
def test_sums_to_one(
    shape: tuple[int, ...], dilations: list[int], variant: VariantName, backend: BackendName, seed: int
) -> None:
    total = pamr_affinity(uniform(shape, torch.float32, "contiguous", seed), dilations, variant, backend).sum(dim=1)
    torch.testing.assert_close(total, torch.full_like(total, 1.01 if variant == "par" else 1))


@given(map_shapes(), dilation_lists, st.sampled_from(["pamr", "par"]), backends, seeds)
def test_invariant_to_scale_and_shift_of_the_image(
    shape: tuple[int, ...], dilations: list[int], variant: VariantName, backend: BackendName, seed: int
) -> None:
    image = uniform(shape, torch.float64, "contiguous", seed).mul(256).floor()  # exact after scaling and shifting
    gain = 2.0 ** torch.arange(shape[1])[:, None, None]
    moved, still = (pamr_affinity(x, dilations, variant, backend) for x in (image * gain - 64, image))
    torch.testing.assert_close(moved, still, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_nan_spreads_to_its_neighbourhood_only(backend: BackendName, variant: VariantName) -> None:
    image = torch.rand(2, 3, 9, 9)
    image[0, 1, 4, 4] = torch.nan
    reached = torch.zeros(2, 9, 9, dtype=torch.bool)
    for i in range(9):
        for j in range(9):
            around = [(i, j), *reference.neighbours(i, j, 9, 9, [1, 3])]
            reached[0, i, j] = (4, 4) in around
    nan = pamr_affinity(image, [1, 3], variant, backend).isnan()
    assert torch.equal(nan.all(dim=1), reached)
    assert torch.equal(nan.any(dim=1), reached)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("pixels", [3, 14, 28])
def test_softmax_in_blocks_of_rows(variant: VariantName, pixels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    image = torch.rand(2, 3, 6, 7)
    at_once = pamr_affinity(image, [1, 2], variant, "eager")
    monkeypatch.setattr(affinities, "SOFTMAX_PIXELS", pixels)
    torch.testing.assert_close(pamr_affinity(image, [1, 2], variant, "eager"), at_once)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_images_of_a_batch_do_not_mix(backend: BackendName) -> None:
    image = torch.rand(3, 3, 8, 7)
    one_by_one = torch.cat([pamr_affinity(single, [1, 2], backend=backend) for single in image.split(1)])
    torch.testing.assert_close(pamr_affinity(image, [1, 2], backend=backend), one_by_one)


def test_a_device_without_float64_computes_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    zeros = torch.zeros

    def no_float64(*size: Any, dtype: torch.dtype | None = None, **options: Any) -> torch.Tensor:
        if dtype == torch.float64:
            raise TypeError("this device has no float64")
        return zeros(*size, dtype=dtype, **options)

    image = torch.rand(1, 3, 9, 8)
    expected = pamr_affinity(image, [1, 2], "par", "eager")
    affinities._has_float64.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(torch, "zeros", no_float64)
        assert affinities.affinity_dtype(VARIANTS["par"], image.device) == torch.float32
    torch.testing.assert_close(pamr_affinity(image, [1, 2], "par", "eager"), expected, rtol=1e-3, atol=1e-5)
    affinities._has_float64.cache_clear()
    assert affinities.affinity_dtype(VARIANTS["par"], image.device) == torch.float64


# +inf, -inf, NaN, and NaNs with other bits in the mantissa.
@pytest.mark.parametrize("bits", [0x7F800000, -0x800000, 0x7FC00000, 0x7FC00001, 0x7FC001FF, -1])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_values_that_are_not_finite_make_the_neighbourhood_nan(
    backend: BackendName, variant: VariantName, bits: int
) -> None:
    image = torch.rand(1, 3, 9, 9)
    image.view(torch.int32)[0, 1, 4, 4] = bits
    affinity = pamr_affinity(image, [1, 3], variant, backend)
    reached = affinity.isnan().any(dim=1)
    assert torch.equal(affinity.isnan().all(dim=1), reached)
    assert reached.sum() == 17  # the pixel and its 16 neighbours


def test_is_a_constant_for_autograd() -> None:
    assert not pamr_affinity(torch.rand(1, 3, 4, 4, requires_grad=True), [1]).requires_grad


def test_stays_in_float32_under_autocast(device: torch.device) -> None:
    image = torch.rand(1, 3, 6, 6, device=device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        affinity = pamr_affinity(image, [1, 2])
    assert affinity.dtype == torch.float32
    assert torch.equal(affinity, pamr_affinity(image, [1, 2]))


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_takes_an_empty_batch(backend: BackendName) -> None:
    assert pamr_affinity(torch.rand(0, 3, 4, 5), [1, 2], backend=backend).shape == (0, 16, 4, 5)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_a_new_form_is_an_entry_of_the_table(backend: BackendName, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(VARIANTS, "mine", Variant(2.0, 2, 2, guard=1.0, with_centre=False, position_weight=0.5))
    image = uniform((2, 2, 6, 7), torch.float64, "contiguous", seed=0)
    expected = reference.squared_affinity(exact(image), [1, 3], guard=1.0, weight=2.0, position_weight=0.5)
    actual = pamr_affinity(image, [1, 3], "mine", backend)  # type: ignore[arg-type]
    assert_close(actual, expected, dtype=torch.float32, precision=torch.float32)
