"""What only the C++ of the CPU can get wrong: registers wider than the image and threads."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from tests import reference
from tests.forked import run_and_fork
from tests.strategies import assert_close, exact, layouts, needs_compiler, seeds, uniform
from wsseg_layers.kernels import VARIANTS, VariantName, pamr_affinity, pamr_propagate
from wsseg_layers.kernels.backends import cpp
from wsseg_layers.kernels.backends.cpp import interface, library

Propagate = Callable[..., torch.Tensor]


CAPABILITIES = ["DEFAULT", "AVX2", "AVX512"]
# A register holds 2 to 16 pixels, a block of the affinity 8 to 32; at most 12 channels are summed together.
widths = st.sampled_from([1, 2, 3, 4, 5, 8, 9, 15, 16, 17, 31, 32, 33, 40])
channel_counts = st.sampled_from([1, 2, 11, 12, 13, 25])
dilation_lists = st.sampled_from([[1], [2, 5], [3, 3], [30]])


@needs_compiler
@settings(max_examples=20)
@given(widths, dilation_lists, st.sampled_from(list(VARIANTS)), layouts, seeds)
def test_affinity_of_every_width(
    width: int, dilations: list[int], variant: VariantName, layout: str, seed: int
) -> None:
    image = uniform((1, 2, 2, width), torch.float32, layout, seed)
    expected = reference.pamr_affinity(exact(image), dilations, variant)
    actual = pamr_affinity(image, dilations, variant, backend="cpp")
    assert_close(actual, expected, dtype=torch.float32, precision=torch.float32)


@needs_compiler
@settings(max_examples=20)
@given(widths, channel_counts, dilation_lists, st.sampled_from([torch.float32, torch.float64]), layouts, seeds)
def test_propagation_of_every_width(
    width: int, channels: int, dilations: list[int], dtype: torch.dtype, layout: str, seed: int
) -> None:
    mask = uniform((1, channels, 2, width), dtype, layout, seed)
    affinity = uniform((1, 8 * len(dilations), 2, width), torch.float32, layout, seed + 1) / 8 - 0.03
    expected = reference.pamr_propagate(exact(mask), exact(affinity), dilations, 2)
    actual = pamr_propagate(mask, affinity, dilations, 2, backend="cpp")
    assert_close(actual, expected, dtype=dtype, precision=dtype)


@needs_compiler
@settings(max_examples=20)
@given(
    widths, st.integers(1, 4), channel_counts, dilation_lists, st.sampled_from([torch.float32, torch.float64]), seeds
)
def test_transposed_propagation_of_every_width(
    width: int, height: int, channels: int, dilations: list[int], dtype: torch.dtype, seed: int
) -> None:
    # <grad, P mask> = <P^T grad, mask>, channel by channel.
    mask = uniform((1, channels, height, width), torch.float64, "contiguous", seed)
    grad = uniform(mask.shape, dtype, "sliced", seed + 1)
    affinity = uniform((1, 8 * len(dilations), height, width), torch.float32, "contiguous", seed + 2) / 8 - 0.03
    expected = exact(grad) * reference.pamr_propagate(exact(mask), exact(affinity), dilations, 2)
    transposed = cpp.propagate_transposed(grad, affinity, dilations, 2)
    actual = (transposed.double() * mask).sum(dim=(2, 3))
    torch.testing.assert_close(actual, torch.from_numpy(expected.sum(axis=(2, 3))), rtol=1e-5, atol=1e-5)


@needs_compiler
@pytest.mark.parametrize("function", [cpp.propagate, cpp.propagate_transposed])
def test_chunks_of_channels_change_nothing(function: Propagate, monkeypatch: pytest.MonkeyPatch) -> None:
    mask, affinity = torch.rand(2, 21, 6, 17), pamr_affinity(torch.rand(2, 3, 6, 17), [1, 2])
    at_once = function(mask, affinity, [1, 2], 3)
    for channels in (1, 8, 20):
        monkeypatch.setattr(cpp, "CHUNK_BYTES", 6 * 17 * 4 * channels)
        assert torch.equal(function(mask, affinity, [1, 2], 3), at_once)


@needs_compiler
@pytest.mark.parametrize("group", [1, 5, 6, 12])
def test_groups_of_channels_change_nothing(group: int, monkeypatch: pytest.MonkeyPatch) -> None:
    mask, affinity = torch.rand(1, 21, 6, 37), pamr_affinity(torch.rand(1, 3, 6, 37), [1, 2])
    expected = cpp.propagate(mask, affinity, [1, 2], 3)
    monkeypatch.setattr(cpp, "_channels_per_group", lambda: group)
    assert torch.equal(cpp.propagate(mask, affinity, [1, 2], 3), expected)


@needs_compiler
@settings(max_examples=20)
@given(st.lists(st.integers(0, 13), min_size=1, max_size=4), st.sampled_from([3, 40]), st.booleans(), seeds)
def test_counted_channels_are_propagated_as_if_alone(
    counts: list[int], width: int, transposed: bool, seed: int
) -> None:
    function: Propagate = cpp.propagate_transposed if transposed else cpp.propagate
    mask = uniform((len(counts), 13, 5, width), torch.float32, "sliced", seed)
    affinity = uniform((len(counts), 16, 5, width), torch.float32, "contiguous", seed + 1) / 16
    result = function(mask, affinity, [1, 3], 3, torch.tensor(counts))
    for b, count in enumerate(counts):
        assert not result[b, count:].any()
        if count > 0:
            alone = function(mask[b : b + 1, :count], affinity[b : b + 1], [1, 3], 3)
            assert torch.equal(result[b : b + 1, :count], alone)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_reads_every_half_precision_weight(dtype: torch.dtype) -> None:
    weights = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype).reshape(1, 1, 256, 256)
    affinity = torch.cat([weights, torch.zeros(1, 7, 256, 256, dtype=dtype)], dim=1)
    result = cpp.propagate(torch.ones(1, 1, 256, 256), affinity, [1], 1)
    torch.testing.assert_close(result, weights.float(), rtol=0, atol=0, equal_nan=True)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("mask_dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("function", [cpp.propagate, cpp.propagate_transposed])
def test_half_precision_weights_are_converted_when_read(
    function: Propagate, mask_dtype: torch.dtype, dtype: torch.dtype
) -> None:
    mask, affinity = torch.rand(2, 3, 5, 19, dtype=mask_dtype), torch.rand(2, 16, 5, 19).to(dtype)
    expected = function(mask, affinity.to(mask_dtype), [1, 2], 2)
    assert torch.equal(function(mask, affinity, [1, 2], 2), expected)


@needs_compiler
def test_reads_negated_views_and_ignores_the_default_device() -> None:
    negated = torch.complex(torch.rand(1, 3, 5, 6), -torch.rand(1, 3, 5, 6)).conj().imag
    assert negated.is_neg()
    with torch.device("meta"):
        affinity = pamr_affinity(negated, [1], backend="cpp")
        refined = pamr_propagate(negated, affinity, [1], 1, "cpp")
    plain = negated.resolve_neg()
    assert torch.equal(affinity, pamr_affinity(plain, [1], backend="cpp"))
    assert torch.equal(refined, pamr_propagate(plain, affinity, [1], 1, "cpp"))


@needs_compiler
@pytest.mark.parametrize("variant", VARIANTS)
def test_infinity_makes_its_neighbourhood_nan(variant: VariantName) -> None:
    image = torch.rand(1, 3, 9, 9)
    image[0, 1, 4, 4] = torch.inf
    cpp_nan, eager_nan = (pamr_affinity(image, [1, 3], variant, backend).isnan() for backend in ("cpp", "eager"))
    assert torch.equal(cpp_nan, eager_nan)
    assert eager_nan.sum() == 17 * 16


@needs_compiler
def test_the_largest_dilations_are_clamped() -> None:
    image, mask = torch.rand(1, 3, 6, 7), torch.rand(1, 2, 6, 7)
    affinity = pamr_affinity(image, [1, 2**31 - 1], backend="cpp")
    assert torch.equal(affinity, pamr_affinity(image, [1, 7], backend="cpp"))
    for function in (cpp.propagate, cpp.propagate_transposed):
        far, near = (function(mask, affinity, [1, d], 3) for d in (2**31 - 1, 7))
        assert torch.equal(far, near)


@needs_compiler
@pytest.mark.usefixtures("_threads")
# Threads have: images of their own, channels of their own in each image, or rows of the same images.
@pytest.mark.parametrize(
    "shape", [(40, 2, 20, 11), (1, 21, 145, 37), (3, 21, 45, 37), (7, 5, 45, 37), (3, 4, 200, 170)]
)
def test_result_is_the_same_for_any_number_of_threads(shape: tuple[int, ...]) -> None:
    image, mask, results = torch.rand(shape[0], 3, *shape[2:]), torch.rand(shape), []
    counts = torch.randint(shape[1] + 1, shape[:1])
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        affinity = pamr_affinity(image, [1, 24], backend="cpp")
        propagated = [
            function(mask, affinity, [1, 24], 5, given)
            for function in (cpp.propagate, cpp.propagate_transposed)
            for given in (None, counts)
        ]
        results.append([affinity, *propagated])
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))


@needs_compiler
def test_small_maps_need_no_threads() -> None:
    # A forked child has none of its parent's OpenMP threads: opening a parallel region would wait for them forever.
    before = """import os, torch
from wsseg_layers import PAMR, PAR, DenseCRF
from wsseg_layers.kernels.backends.cpp import library
# The logarithm of probabilities, in PyTorch, starts threads for any size.
layers = [PAMR(backend="cpp"), PAR(backend="cpp"), DenseCRF(inputs="logits", backend="cpp")]
torch.set_num_threads(2)
def refine(batch, size, channels=5):
    for layer in layers:
        layer(torch.rand(batch, 3, size, size), torch.rand(batch, channels, size, size))
before = len(os.listdir("/proc/self/task"))
refine(1, 8)
refine(3, 8)
refine(2, 6, 21)
assert len(os.listdir("/proc/self/task")) == before
refine(2, 100)
has_threads = "serial" not in library.load()._name  # compiled with OpenMP
assert (len(os.listdir("/proc/self/task")) > before) == has_threads
"""
    run_and_fork(before, in_child="refine(1, 8)\nrefine(3, 8)\nrefine(2, 6, 21)")


@needs_compiler
def test_the_affinity_is_laid_out_as_it_is_read() -> None:
    for backend in ("cpp", "auto"):
        affinity = pamr_affinity(torch.rand(2, 3, 6, 7), [1, 2], backend=backend)
        assert affinity.transpose(1, 2).is_contiguous()


@needs_compiler
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_set_of_instructions(capability: str) -> None:
    here = torch.backends.cpu.get_cpu_capability()
    if here not in CAPABILITIES[CAPABILITIES.index(capability) :]:
        pytest.skip(f"the processor has {here}")
    code = f"""import torch
from wsseg_layers.kernels import pamr_affinity, pamr_propagate
found = torch.backends.cpu.get_cpu_capability()
assert found.replace("NO AVX", "DEFAULT") == "{capability}"  # "NO AVX" on x86 with older torch
for height, width, dtype in [(3, 1, torch.float32), (2, 37, torch.float32), (4, 19, torch.float64)]:
    image, mask = torch.rand(1, 3, height, width), torch.rand(1, 26, height, width, dtype=dtype)
    for variant in ("pamr", "par"):
        affinity = [pamr_affinity(image, [1, 24], variant, backend) for backend in ("cpp", "eager")]
        torch.testing.assert_close(*affinity, rtol=1e-5, atol=1e-5)
        refined = [pamr_propagate(mask, affinity[0], [1, 24], 4, backend) for backend in ("cpp", "eager")]
        torch.testing.assert_close(*refined, rtol=1e-5, atol=1e-5)
"""
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability.lower()}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)


@needs_compiler
def test_a_library_of_another_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = library.load()
    assert loaded is not None
    monkeypatch.setattr(interface, "Propagation", interface.Affinity)
    with pytest.raises(OSError, match=r"another version: its structs have \[[\d, ]+\] bytes"):
        interface.declare(loaded)


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize(
    ("sanitizer", "flags"),
    [("libasan.so", "-fsanitize=address"), ("libubsan.so", "-fsanitize=undefined -fno-sanitize-recover")],
)
def test_sanitizers_find_nothing(sanitizer: str, flags: str, tmp_path: Path) -> None:
    found = subprocess.check_output(["c++", f"-print-file-name={sanitizer}"], text=True).strip()
    if not Path(found).is_absolute():
        pytest.skip(f"the compiler has no {sanitizer}")
    code = """import itertools, random, torch
from wsseg_layers.kernels import VARIANTS, pamr_affinity
from wsseg_layers.kernels.backends import cpp
assert cpp.unavailable(torch.device("cpu")) is None
random.seed(0)
shapes = [(1, 1, 1, 1), (2, 3, 2, 5), (1, 13, 5, 16), (1, 25, 3, 33), (3, 5, 40, 50), (90, 4, 30, 3)]
for shape, dilations in itertools.product(shapes, ([1], [24, 2], [2**31 - 1, 3])):
    batch, channels, height, width = shape
    image = torch.rand(batch, random.choice([1, 3]), height, width)
    affinity = pamr_affinity(image, dilations, random.choice(list(VARIANTS)), "cpp")
    for dtype in (torch.float32, torch.float64):
        affinity = affinity.to(random.choice([torch.float16, torch.bfloat16, torch.float32, dtype]))
        counts = random.choice([None, torch.randint(channels + 1, (batch,))])
        for function in (cpp.propagate, cpp.propagate_transposed):
            function(torch.rand(shape, dtype=dtype), affinity, dilations, 3, counts)
    for size in ((1, 1), (7, 3), (height, width), (2 * height, 3 * width)):
        maps = torch.rand(batch, 1 + channels, 2, height, width)
        cpp.resize(maps, size)
        numbers, counts = torch.arange(channels).expand(batch, -1) + 1, torch.randint(channels + 1, (batch,))
        for scores in (1, 2):
            cpp.choose_labels(maps, numbers, counts, scores, size, 255)
# A row of all neighbours has fewer weights than a register has lanes.
cpp.propagate(torch.rand(1, 2, 4, 1), pamr_affinity(torch.rand(1, 3, 4, 1), [1], "pamr", "cpp"), [1], 1)
"""
    environment = {
        **os.environ,
        "CXX": f"c++ {flags}",
        "LD_PRELOAD": found,
        "ASAN_OPTIONS": "detect_leaks=0",
        "XDG_CACHE_HOME": str(tmp_path),
    }
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
