"""What the compilers make of the Triton kernels, which needs no GPU: nothing spilled or exchanged, wide loads.

WSSEG_TRITONS names a folder of other Tritons, a folder each, as `pip install --target FOLDER/3.0.0 --no-deps
triton==3.0.0` makes them; the kernels are compiled with all of them. HYPOTHESIS_PROFILE=thorough compiles more cases.
"""

import functools
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is not installed")
from benchmarks import registers  # noqa: E402
from benchmarks.registers import TARGETS  # noqa: E402
from wsseg_layers.kernels import VARIANTS  # noqa: E402
from wsseg_layers.kernels.backends import triton as backend  # noqa: E402
from wsseg_layers.kernels.backends.triton import affinities, propagation  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
THOROUGH = os.environ.get("HYPOTHESIS_PROFILE") == "thorough"
CLASSES = [1, 2, 5, 21, 60, 150]
DTYPES = ["fp32", "fp16", "bf16"] if THOROUGH else ["fp32", "bf16"]
TRANSPOSED_AND_RAGGED = [(False, False), (True, False), (False, True), (True, True)] if THOROUGH else [(False, False)]
FOLDER = os.environ.get("WSSEG_TRITONS", "")
TRITONS = sorted(path.name for path in Path(FOLDER).iterdir() if (path / "triton").is_dir()) if FOLDER else []
needs_cuobjdump = pytest.mark.skipif(not registers.CUOBJDUMP.exists(), reason="this triton comes without cuobjdump")
targets = pytest.mark.parametrize(
    "target",
    [
        pytest.param(
            name,
            marks=pytest.mark.skipif(not registers.can_link(target), reason="this triton has no linker for AMD"),
        )
        for name, target in TARGETS.items()
    ],
)
OLD = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 3)


@pytest.fixture(autouse=True, scope="module")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Write nothing into the home folder, which may be read-only."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


def skip_old() -> None:
    """Skip the rest of a test, which has compiled a kernel."""
    if OLD:
        pytest.skip("it compiles; registers and loads are checked with Triton 3.3 and later")


@functools.cache
def propagation_for(lanes: int, dtype: str, target: str, transposed: bool, ragged: bool) -> Any:
    """Compile once what serves several numbers of classes: a kernel knows its tile and not the number of channels."""
    channels = lanes * 16 // registers.ITEMSIZES[dtype]
    return registers.compile_propagation(channels, dtype, TARGETS[target], transposed=transposed, ragged=ragged)


@needs_cuobjdump
@targets
@pytest.mark.parametrize("variant", list(VARIANTS))
def test_affinity(variant: str, target: str) -> None:
    compiled = registers.compile_affinity(variant, TARGETS[target])
    skip_old()
    assert registers.usage(compiled).spilled == 0
    assert ".f64" not in registers.assembly(compiled)


@needs_cuobjdump
@targets
@pytest.mark.parametrize(("transposed", "ragged"), TRANSPOSED_AND_RAGGED)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("classes", CLASSES)
def test_propagation(classes: int, dtype: str, transposed: bool, ragged: bool, target: str) -> None:
    config = propagation.launch_config(classes, registers.ITEMSIZES[dtype], TARGETS[target].warp_size)
    lanes = config["BLOCK_C"] // config["VECTOR"]
    compiled = propagation_for(lanes, dtype, target, transposed, ragged)
    skip_old()
    # With counts, an address is put away before the loops of the transpose and fetched after them (sm_80, half).
    assert registers.usage(compiled).spilled <= (8 if transposed and ragged else 0)
    assert registers.exchanges_in_loops(compiled) == 0
    # The loop's body holds the 8 neighbours of a dilation, or the 3 of a row. Only their weights are single values.
    assert registers.wide_loads(compiled) >= (3 if transposed else 8)


@needs_cuobjdump
@targets
@pytest.mark.parametrize(
    ("classes", "dtype", "transposed"), [(21, "fp32", True), (2, "bf16", True), (21, "fp32", False)]
)
def test_transposed_and_ragged(classes: int, dtype: str, transposed: bool, target: str) -> None:
    test_propagation(classes, dtype, transposed, True, target)


@needs_cuobjdump
@targets
@pytest.mark.parametrize("channels", [3, 21])
def test_gaussian_sum(channels: int, target: str) -> None:
    compiled = registers.compile_gaussian_sum(channels, TARGETS[target])
    skip_old()
    assert registers.usage(compiled).spilled == 0


@needs_cuobjdump
def test_exchanges_are_found_where_there_are_some() -> None:
    # The affinity reduces over neighbours of several threads, channel by channel.
    for target in filter(registers.can_link, TARGETS.values()):
        assert registers.exchanges_in_loops(registers.compile_affinity("pamr", target)) > 0


class CompilingDriver:
    """A driver for launches that bind their arguments and compile, but do not run: no GPU is needed."""

    DEVICE = 99  # no device of this machine, whose kernels stay as they are

    def get_current_target(self) -> Any:
        return TARGETS["sm_80"]

    def get_current_device(self) -> int:
        return self.DEVICE

    def get_current_stream(self, device: int) -> int:  # noqa: ARG002
        return 0


@pytest.fixture
def compiles_only(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Any], int]]:
    """Make all launches compile only, and return a function that counts how often a kernel was compiled."""
    kernels = (affinities.affinity_kernel, propagation.propagate_kernel, propagation.transposed_kernel)
    if not all(hasattr(kernel, "device_caches") for kernel in kernels):
        pytest.skip("the interpreter compiles nothing, and other versions of Triton keep other caches")
    run = type(kernels[0]).run
    monkeypatch.setattr(type(kernels[0]), "run", lambda *args, **kwargs: run(*args, **{**kwargs, "warmup": True}))
    monkeypatch.setattr(propagation, "warp_size", lambda _: 32)
    active = triton.runtime.driver.active if torch.cuda.is_available() else None
    triton.runtime.driver.set_active(CompilingDriver())
    yield lambda kernel: len(kernel.device_caches[CompilingDriver.DEVICE][0])
    triton.runtime.driver.set_active(active)
    for kernel in kernels:
        kernel.device_caches.pop(CompilingDriver.DEVICE, None)


def test_one_compilation_for_all_sizes(compiles_only: Callable[[Any], int]) -> None:
    # Of 1 and of multiples of 16 Triton makes constants by default.
    for shape in ((2, 21, 9, 7), (1, 21, 1, 1), (1, 22, 16, 32), (3, 60, 30, 2)):
        mask, image = torch.rand(shape), torch.rand(shape[0], 3, *shape[2:])
        for dilations in ([1, 2], [3, 24]):
            affinity = backend.empty_affinity(image, 8 * len(dilations))
            backend.affinity(image, dilations, VARIANTS["par"], affinity)
            backend.propagate(mask, affinity, dilations, 1)
            backend.propagate_transposed(mask, affinity, dilations, 1)
    affinity = backend.empty_affinity(image, 24)
    backend.propagate(mask, affinity, [1, 2, 1000], 1)
    for kernel in (affinities.affinity_kernel, propagation.propagate_kernel, propagation.transposed_kernel):
        assert compiles_only(kernel) == 1
    backend.propagate(mask, affinity, [1, 2, 4], 1, torch.tensor([1, 2, 3]))
    assert compiles_only(propagation.propagate_kernel) == 2


@pytest.mark.skipif(not FOLDER, reason="WSSEG_TRITONS names no folder of other Tritons")
@pytest.mark.parametrize("version", TRITONS)
def test_compiles_with_other_tritons(version: str, tmp_path: Path) -> None:
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(Path(FOLDER, version)), str(ROOT)]),
        "TRITON_CACHE_DIR": str(tmp_path),
    }
    command = [sys.executable, "-m", "benchmarks.registers", "--print"]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert f"Triton {version}" in result.stdout
