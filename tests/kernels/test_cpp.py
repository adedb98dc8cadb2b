"""What only the C++ of the CPU can get wrong: registers wider than the image and threads."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from tests import reference
from tests.strategies import assert_close, exact, layouts, seeds, uniform
from wsseg_layers.kernels import VARIANTS, VariantName, pamr_affinity, pamr_propagate
from wsseg_layers.kernels.backends import cpp
from wsseg_layers.kernels.backends.cpp import library

needs_compiler = pytest.mark.skipif(library.load() is None, reason="no C++ compiler")

CAPABILITIES = ["DEFAULT", "AVX2", "AVX512"]
# A register holds 4 to 16 pixels, a block of the affinity 4 to 32, a group 12 channels.
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
@pytest.mark.parametrize("cached", [True, False])
def test_propagates_in_chunks_of_channels(cached: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    mask, affinity = torch.rand(2, 21, 6, 7), pamr_affinity(torch.rand(2, 3, 6, 7), [1, 2])
    at_once = pamr_propagate(mask, affinity, [1, 2], 3, "cpp")
    padded, chunks = cpp._padded, []

    def recorded(maps: torch.Tensor, *arguments: Any) -> Any:
        chunks.append(len(maps))
        return padded(maps, *arguments)

    monkeypatch.setattr(cpp, "_padded", recorded)
    monkeypatch.setattr(cpp, "CACHED_WEIGHTS_BYTES", 16 * 6 * 7 * 4 - 1 + cached)
    monkeypatch.setattr(cpp, "CHUNK_BYTES" if cached else "CHUNK_BYTES_FROM_MEMORY", 6 * 7 * 4 * 8)  # 8 channels
    assert torch.equal(pamr_propagate(mask, affinity, [1, 2], 3, "cpp"), at_once)
    assert chunks == [7] * 6


@pytest.fixture
def _threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@needs_compiler
@pytest.mark.usefixtures("_threads")
def test_any_number_of_threads_gives_the_same() -> None:
    image, mask, results = torch.rand(1, 3, 45, 37), torch.rand(1, 21, 45, 37), []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        affinity = pamr_affinity(image, [1, 24], backend="cpp")
        results.append((affinity, pamr_propagate(mask, affinity, [1, 24], 5, "cpp")))
    for affinity, refined in results[1:]:
        assert torch.equal(affinity, results[0][0])
        assert torch.equal(refined, results[0][1])


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
def test_reads_and_writes_within_its_memory(tmp_path: Path) -> None:
    sanitizer = subprocess.check_output(["c++", "-print-file-name=libasan.so"], text=True).strip()
    if not Path(sanitizer).is_absolute():
        pytest.skip("the compiler has no address sanitizer")
    code = """import torch
from wsseg_layers.kernels import pamr_affinity, pamr_propagate
from wsseg_layers.kernels.backends.cpp import library
assert library.load()
for shape in [(1, 1, 1, 1), (2, 3, 2, 5), (1, 13, 5, 16), (1, 25, 3, 33)]:
    for dilations in ([1], [24, 2]):
        for dtype, variant in [(torch.float32, "pamr"), (torch.float64, "par")]:
            affinity = pamr_affinity(torch.rand(shape), dilations, variant, "cpp")
            pamr_propagate(torch.rand(shape, dtype=dtype), affinity, dilations, 3, "cpp")
"""
    environment = {
        **os.environ,
        "CXX": "c++ -fsanitize=address",
        "LD_PRELOAD": sanitizer,
        "ASAN_OPTIONS": "detect_leaks=0",
        "XDG_CACHE_HOME": str(tmp_path),
    }
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
