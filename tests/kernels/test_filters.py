"""The Gaussian filters: exact sums against loops, and the lattice of the C++ against a lattice of dictionaries."""

import os
import subprocess
import sys
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from torch import Tensor
from torch.library import opcheck

from tests import reference
from tests.forked import run_and_fork
from tests.kernels import toy_backend
from tests.strategies import (
    CPU_BACKENDS,
    assert_close,
    dtypes,
    exact,
    layouts,
    map_shapes,
    needs_compiler,
    seeds,
    uniform,
)
from wsseg_layers.kernels import BackendName, backends, bilateral_filter
from wsseg_layers.kernels.backends.cpp import lattice
from wsseg_layers.kernels.filters import mean_field
from wsseg_layers.kernels.gaussians import Gaussian

few = settings(max_examples=15)
filters = st.tuples(st.booleans(), st.sampled_from([0.7, 2.3, 11.0]), st.sampled_from([0.05, 0.3, 2.0]), st.booleans())
NUMBERS = (2.0, 1.5, 3.0, 0.4, 2.0)  # of mean_field, for images in 0 to 1


def photograph(batch: int, height: int, width: int, channels: int = 3) -> Tensor:
    """Something as smooth as a photograph, in 0 to 1."""
    coarse = torch.rand(batch, channels, 2 + height // 12, 2 + width // 12)
    smooth = F.interpolate(coarse, size=(height, width), mode="bilinear")
    return (smooth + 0.02 * torch.randn(batch, channels, height, width)).clamp(0, 1)


def expected_sums(
    values: Tensor, image: Tensor | None, sigmas: tuple[float, float], normalise: bool, name: str
) -> Tensor:
    weigh = reference.lattice_weights if name == "cpp" else reference.gaussian_weights
    size = (values.shape[2], values.shape[3])
    results = []
    for b in range(len(values)):
        weights = weigh(None if image is None else exact(image[b]), size, *sigmas)
        weights = reference.normalised_weights(weights) if normalise else weights
        results.append(torch.from_numpy(reference.filter_values(exact(values[b]), weights)))
    return torch.stack(results)


@few
@given(map_shapes(max_side=7), filters, st.sampled_from(CPU_BACKENDS), dtypes, layouts, seeds)
def test_equals_the_definition(
    shape: tuple[int, ...],
    chosen: tuple[bool, float, float, bool],
    backend: BackendName,
    dtype: torch.dtype,
    layout: str,
    seed: int,
) -> None:
    with_image, sigma_xy, sigma_rgb, normalise = chosen
    values = uniform(shape, dtype, layout, seed)
    image = uniform((shape[0], 3, *shape[2:]), torch.float32, layout, seed + 1) if with_image else None
    expected = expected_sums(values, image, (sigma_xy, sigma_rgb), normalise, backend)
    actual = bilateral_filter(values, image, sigma_xy, sigma_rgb, normalise, backend)
    assert actual.is_contiguous()
    # The lattice is that of float32 features, whatever the dtype of the values.
    precision = torch.float32 if backend == "cpp" and dtype == torch.float64 else dtype
    scale = max(1.0, float(expected.abs().max()))
    assert_close(actual / scale, expected.numpy() / scale, dtype=dtype, precision=precision)


@needs_compiler
@pytest.mark.parametrize("channels", [1, 2, 4, 5, 8, 9, 16, 17, 24, 25, 32, 33, 70])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_lattice_with_any_number_of_channels(channels: int, dtype: torch.dtype) -> None:
    values, image = torch.rand(1, channels, 6, 7, dtype=dtype), torch.rand(1, 3, 6, 7)
    expected = expected_sums(values, image, (2.9, 0.4), True, "cpp")
    actual = bilateral_filter(values, image, 2.9, 0.4, True, "cpp")
    assert_close(actual, expected.numpy(), dtype=dtype, precision=torch.float32)


@needs_compiler
@pytest.mark.parametrize("with_image", [False, True])
def test_lattice_is_near_the_exact_sum(with_image: bool) -> None:
    values, image = photograph(2, 60, 70, channels=2), photograph(2, 60, 70) if with_image else None
    sums = {name: bilateral_filter(values, image, 8.0, 0.08, True, name) for name in CPU_BACKENDS}
    error = (sums["cpp"] - sums["eager"]).square().mean().sqrt() / sums["eager"].square().mean().sqrt()
    assert error < (0.04 if with_image else 0.02)
    ones = {name: bilateral_filter(torch.ones_like(values), image, 8.0, 0.08, False, name) for name in CPU_BACKENDS}
    ratio = ones["cpp"].mean() / ones["eager"].mean()
    assert (0.7 if with_image else 0.99) < ratio < (1 if with_image else 1.01)


@needs_compiler
@pytest.mark.usefixtures("_threads")
def test_result_is_the_same_for_any_number_of_threads() -> None:
    # Large enough for several bands of pixels and for parallel blurs.
    image, values = photograph(1, 260, 270), photograph(1, 260, 270, channels=5)
    sums, marginals = [], []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        sums.append(bilateral_filter(values, image, 4.0, 0.05, False, "cpp"))
        marginals.append(mean_field(values, image, 2, *NUMBERS, "cpp"))
    for ours in (sums, marginals):
        assert torch.equal(ours[0], ours[1])
        assert torch.equal(ours[0], ours[2])


@needs_compiler
@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize("threads", [1, 2])
def test_images_of_a_batch_are_filtered_alone(threads: int) -> None:
    torch.set_num_threads(threads)
    image, values = photograph(3, 70, 80), photograph(3, 70, 80, channels=4)
    together = bilateral_filter(values, image, 4.0, 0.1, False, "cpp")
    marginals = mean_field(values, image, 2, *NUMBERS, "cpp")
    for b in range(3):
        assert torch.equal(
            bilateral_filter(values[b : b + 1], image[b : b + 1], 4.0, 0.1, False, "cpp")[0], together[b]
        )
        assert torch.equal(mean_field(values[b : b + 1], image[b : b + 1], 2, *NUMBERS, "cpp")[0], marginals[b])


@needs_compiler
def test_bands_of_pixels_share_their_vertices() -> None:
    # Adams, Baek and Davis's lattice has no bands: a large image that repeats a small one's colours far away must give
    # what the small one gives.
    image, values = photograph(1, 20, 160), photograph(1, 20, 160, channels=2)
    far = torch.cat([image, image + 50, image, image + 50, *8 * [image + 90]], dim=3).repeat(1, 1, 2, 1)
    assert far.shape[2] * far.shape[3] > 4 * 2**14 - 2**13
    repeated = values.repeat(1, 1, 2, 12)
    large = bilateral_filter(repeated, far, 4.0, 0.1, False, "cpp")
    middle = (slice(None), slice(None), slice(0, 20), slice(0, 160))
    alone = bilateral_filter(repeated[..., :160], far[..., :160], 4.0, 0.1, False, "cpp")
    torch.testing.assert_close(large[middle][..., :120], alone[middle][..., :120], rtol=1e-4, atol=1e-4)


@needs_compiler
def test_small_batches_need_no_threads_after_a_fork() -> None:
    # A child has none of its parent's OpenMP threads: opening a parallel region would wait for them forever. (So does
    # PyTorch's own logarithm: that is why these are logits.)
    before = """import torch
from wsseg_layers import DenseCRF
from wsseg_layers.kernels import bilateral_filter
torch.set_num_threads(2)
def refine(batch, size):
    image, scores = 255 * torch.rand(batch, 3, size, size), torch.rand(batch, 3, size, size)
    DenseCRF(2, inputs="logits", backend="cpp")(image, scores)
    bilateral_filter(scores, image, 3.0, backend="cpp")
refine(2, 200)
"""
    run_and_fork(before, in_child="refine(4, 8)")


@needs_compiler
def test_one_thread_is_enough_after_a_fork() -> None:
    """What docs/faq.md advises; without it, PyTorch waits in the logarithm of the probabilities."""
    before = """import torch
from wsseg_layers import PAMR, DenseCRF
torch.set_num_threads(2)
def refine(size, channels):
    image, scores = 255 * torch.rand(1, 3, size, size), torch.rand(1, channels, size, size)
    leaf = scores.requires_grad_()
    for layer in (PAMR(2), DenseCRF(2)):
        layer(image, leaf).sum().backward()
refine(100, 3)
"""
    run_and_fork(before, in_child="torch.set_num_threads(1)\nrefine(8, 3)\nrefine(80, 25)")


@needs_compiler
def test_one_filter_for_many_calls() -> None:
    image, values = torch.rand(2, 3, 9, 8), torch.rand(2, 4, 9, 8)
    made = lattice.make_filter(image, values, Gaussian(2.9, 0.4), True)
    for channels in (4, 2, 1):
        expected = bilateral_filter(values[:, :channels], image, 2.9, 0.4, True, "cpp")
        assert torch.equal(made(values[:, :channels]), expected)
    assert isinstance(made, lattice.Lattices)
    assert 6 < made.count_vertices() <= 2 * 6 * 72


@needs_compiler
def test_far_features_have_keys_of_128_bits() -> None:
    # Every pixel is alone in its simplex and its weight of itself is 1.
    image, values = 255 * torch.rand(1, 3, 6, 7), torch.rand(1, 2, 6, 7)
    actual = bilateral_filter(values, image, 0.01, 0.01, True, "cpp")
    torch.testing.assert_close(actual, values, rtol=1e-4, atol=1e-4)


@needs_compiler
def test_features_that_float32_cannot_place_are_refused() -> None:
    image, values = 255 * torch.rand(1, 3, 6, 7), torch.rand(1, 2, 6, 7)
    with pytest.raises(ValueError, match=r"image of shape \[1, 3, 6, 7\] spans too many sigmas.*backend='eager'"):
        bilateral_filter(values, image, 1.0, 1e-5, backend="cpp")
    with pytest.raises(ValueError, match=r"image of size \[6, 7\] spans too many sigmas"):
        bilateral_filter(values, None, 1e-7, backend="cpp")
    assert bilateral_filter(values, image, 1.0, 1e-5, backend="eager").isfinite().all()


@needs_compiler
@pytest.mark.parametrize("threads", [1, 2])
def test_missing_memory_is_an_error(threads: int) -> None:
    code = f"""import resource, torch
from pathlib import Path
from wsseg_layers.kernels import bilateral_filter
from wsseg_layers.kernels.filters import mean_field
torch.set_num_threads({threads})
image, values = torch.rand(1, 3, 200, 200), torch.rand(1, 3, 200, 200)
for compute in (
    lambda colours: bilateral_filter(values, colours, 3.0, 60.0, True, "cpp"),
    lambda colours: mean_field(values, colours, 2, 2.0, 1.5, 3.0, 60.0, 2.0, "cpp"),
):
    expected = compute(255 * image)  # starts the threads, too
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    refusals, more = 0, 2**21
    while True:
        more = more * 5 // 4
        resource.setrlimit(resource.RLIMIT_AS, (used + more, resource.RLIM_INFINITY))
        try:
            actual = compute(255 * image)
            break
        except MemoryError as error:
            refusals += "not enough memory for the lattice of " in str(error)
        except RuntimeError as error:  # the result itself
            assert "memory" in str(error)
        finally:
            resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert refusals > 1
    assert torch.equal(actual, expected)
"""
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}  # what is freed goes back to the system
    root = Path(__file__).resolve().parents[2]
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, cwd=root)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_an_image_that_is_not_finite_makes_its_sums_nan(backend: BackendName, bad: float) -> None:
    image, values = torch.rand(3, 3, 5, 6), torch.rand(3, 2, 5, 6)
    image[1, 2, 4, 3] = bad
    for result in (
        bilateral_filter(values, image, 2.0, 0.4, False, backend),
        bilateral_filter(values, image, 2.0, 0.4, True, backend),
        mean_field(values, image, 2, *NUMBERS, backend),
    ):
        assert result[1].isnan().all()
        assert result[::2].isfinite().all()


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_nan_in_values_stays_in_its_channel(backend: BackendName) -> None:
    image, values = torch.rand(1, 3, 5, 6), torch.rand(1, 2, 5, 6)
    values[0, 1, 2, 3] = torch.nan
    result = bilateral_filter(values, image, 2.0, 0.4, False, backend)
    assert result[0, 1, 2, 3].isnan()
    assert result[0, 0].isfinite().all()
    assert mean_field(values, image, 1, *NUMBERS, backend)[0, :, 2, 3].isnan().all()


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("with_image", [False, True])
@pytest.mark.parametrize("normalise", [False, True])
def test_gradients(backend: BackendName, with_image: bool, normalise: bool) -> None:
    image = torch.rand(2, 3, 4, 3) if with_image else None
    values = torch.rand(2, 2, 4, 3, dtype=torch.float64, requires_grad=True)

    def sums(values: Tensor) -> Tensor:
        return bilateral_filter(values, image, 1.3, 0.3, normalise, backend)

    assert torch.autograd.gradcheck(sums, values)
    assert torch.autograd.gradgradcheck(sums, values)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("shape", [(2, 3, 5, 4), (0, 2, 4, 3), (1, 1, 1, 9), (1, 2, 7, 1)])
def test_opcheck(backend: BackendName, shape: tuple[int, ...]) -> None:
    values, image = torch.rand(shape, requires_grad=True), torch.rand(shape[0], 3, *shape[2:])
    operators = torch.ops.wsseg_layers
    for one in (None, image):
        opcheck(operators.bilateral_filter.default, (values, one, 2.0, 0.4, True, False, backend))
    opcheck(operators.mean_field.default, (values, image, 2, *NUMBERS, backend))
    opcheck(operators.mean_field_gradient.default, (torch.rand(shape), values.detach(), image, 2, *NUMBERS, backend))


def test_compiles_without_a_graph_break(device: torch.device) -> None:
    def sums(values: Tensor, image: Tensor) -> Tensor:
        return 2 * bilateral_filter(values, image, 2.0, 0.4, True)

    compiled = torch.compile(sums, fullgraph=True, backend="aot_eager")
    for height in (6, 9, 11):
        image = torch.rand(2, 3, height, 7, device=device)
        values = torch.rand(2, 5, height, 7, device=device, requires_grad=True)
        torch.testing.assert_close(compiled(values, image), sums(values, image))
        expected = torch.autograd.grad(sums(values, image).square().sum(), values)
        torch.testing.assert_close(torch.autograd.grad(compiled(values, image).square().sum(), values), expected)


def test_memory_of_exact_sums_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    image, values = torch.rand(1, 3, 6, 7), torch.rand(1, 2, 6, 7)
    at_once = bilateral_filter(values, image, 2.0, 0.4, backend="eager")
    from wsseg_layers.kernels.backends.eager import filters

    monkeypatch.setattr(filters, "BLOCK_BYTES", 42 * 4 * 5)  # 5 rows of weights
    torch.testing.assert_close(bilateral_filter(values, image, 2.0, 0.4, backend="eager"), at_once)


def test_a_backend_without_filters_uses_those_of_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(backends.BACKENDS, "toy", toy_backend)
    image, values = torch.rand(1, 3, 6, 7), torch.rand(1, 2, 6, 7)
    actual = bilateral_filter(values, image, 2.0, 0.4, backend="toy")  # type: ignore[arg-type]
    assert torch.equal(actual, bilateral_filter(values, image, 2.0, 0.4, backend="eager"))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"values": torch.ones(1, 2, 3, 4, dtype=torch.int64)}, TypeError, "values must be a floating-point tensor"),
        ({"values": torch.ones(2, 3, 4)}, ValueError, r"values must have 4 dimensions"),
        ({"values": torch.ones(1, 2, 0, 4)}, ValueError, r"values must have at least one channel and one pixel"),
        ({"image": torch.ones(1, 3, 3, 5)}, ValueError, "image and values must have the same height and width"),
        ({"image": torch.ones(1, 4, 3, 4)}, ValueError, r"image must have 3 channels, got shape \[1, 4, 3, 4\]"),
        ({"image": torch.ones(2, 3, 3, 4)}, ValueError, "image and values must have the same batch size"),
        ({"image": torch.ones(1, 3, 3, 4, dtype=torch.uint8)}, TypeError, "image must be a floating-point tensor"),
        ({"image": torch.ones(1, 3, 3, 4, requires_grad=True)}, ValueError, r"pass image.detach\(\)"),
        ({"image": torch.ones(1, 3, 3, 4, device="meta")}, ValueError, "image and values must be on one device"),
        ({"sigma_xy": 0.0}, ValueError, "sigma_xy must be positive, got 0.0"),
        ({"sigma_rgb": float("nan")}, ValueError, "sigma_rgb must be finite, got nan"),
        ({"sigma_xy": "3"}, TypeError, "sigma_xy must be a number, got str"),
        ({"normalise": 1}, TypeError, "normalise must be True or False, got 1"),
        ({"backend": "numpy"}, ValueError, "backend must be one of"),
    ],
)
def test_wrong_arguments(arguments: dict[str, object], error: type[Exception], message: str) -> None:
    given = {"values": torch.ones(1, 2, 3, 4), "image": torch.ones(1, 3, 3, 4), "sigma_xy": 1.0, "sigma_rgb": 1.0}
    with pytest.raises(error, match=message):
        bilateral_filter(**{**given, **arguments})  # type: ignore[arg-type]


@needs_compiler
@pytest.mark.parametrize("capability", ["DEFAULT", "AVX2", "AVX512"])
def test_every_set_of_instructions(capability: str) -> None:
    order = ["DEFAULT", "AVX2", "AVX512"]
    here = torch.backends.cpu.get_cpu_capability()
    if here not in order[order.index(capability) :]:
        pytest.skip(f"the processor has {here}")
    code = f"""import torch
from tests.kernels.test_filters import NUMBERS, expected_sums
from wsseg_layers.kernels import bilateral_filter
from wsseg_layers.kernels.filters import mean_field
found = torch.backends.cpu.get_cpu_capability()
assert found.replace("NO AVX", "DEFAULT") == "{capability}"  # "NO AVX" on x86 with older torch
for channels in (1, 3, 21):
    image, values = torch.rand(1, 3, 5, 7), torch.rand(1, channels, 5, 7)
    expected = expected_sums(values, image, (2.9, 0.4), True, "cpp")
    actual = bilateral_filter(values, image, 2.9, 0.4, True, "cpp")
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5)
    one, other = (mean_field(values.to(dtype), image, 3, *NUMBERS, "cpp") for dtype in (torch.float32, torch.float64))
    torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-5)
"""
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability.lower()}
    root = Path(__file__).resolve().parents[2]
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, cwd=root)


@pytest.mark.slow
@needs_compiler
def test_is_clean_under_sanitizers(tmp_path: Path) -> None:
    sanitizers = [
        subprocess.check_output(["c++", f"-print-file-name=lib{name}.so"], text=True).strip()
        for name in ("asan", "ubsan")
    ]
    if not all(Path(sanitizer).is_absolute() for sanitizer in sanitizers):
        pytest.skip("the compiler has no sanitizers")
    code = """import torch
from wsseg_layers.kernels import bilateral_filter
from wsseg_layers.kernels.backends.cpp import library
from wsseg_layers.kernels.filters import mean_field
# With optimisation, the compiler takes a minute.
library.OPTIONS = tuple(option for option in library.OPTIONS if option != "-O3")
assert library.load()
torch.set_num_threads(2)
for shape in [(1, 1, 1, 1), (2, 3, 2, 5), (2, 21, 5, 16), (1, 40, 3, 33), (1, 2, 190, 180)]:
    image = 255 * torch.rand(shape[0], 3, *shape[2:])
    for dtype in (torch.float32, torch.float64):
        values = torch.rand(shape, dtype=dtype)
        for one in (None, image, image * torch.nan):
            bilateral_filter(values, one, 3.0, 30.0, True, "cpp")
        mean_field(values, image, 1, 3.0, 3.0, 20.0, 13.0, 10.0, "cpp")
bilateral_filter(torch.rand(1, 1, 6, 7), image[:, :, :6, :7], 0.01, 0.01, True, "cpp")
try:
    bilateral_filter(torch.rand(1, 1, 3, 4), None, 1e-7, backend="cpp")
except ValueError:
    pass
"""
    environment = {
        **os.environ,
        "CXX": "c++ -fsanitize=address,undefined -fno-sanitize-recover=undefined",
        "LD_PRELOAD": " ".join(sanitizers),
        "ASAN_OPTIONS": "detect_leaks=0",
        "XDG_CACHE_HOME": str(tmp_path),
    }
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
