"""kernels.cpp, compiled by the machine's own compiler when it is first needed, and kept for the next process."""

import ctypes
import functools
import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import warnings
from contextlib import suppress
from pathlib import Path

import torch

SOURCES = tuple(Path(__file__).with_name(name) for name in ("kernels.cpp", "lattice.cpp"))
OPTIONS = ("-std=c++17", "-O3", "-shared", "-fPIC", "-fopenmp")
# What kernels.cpp computes in, and how its functions are called for it.
REALS = {torch.float32: "float", torch.float64: "double"}
# Of processors that PyTorch found to have them, so that a kept library never meets one that has not.
INSTRUCTIONS = {"AVX2": ("-mavx2", "-mfma"), "AVX512": ("-mavx2", "-mfma", "-mavx512f")}


class Map(ctypes.Structure):
    """The sizes of a map, as kernels.cpp stores it."""

    _fields_ = tuple((name, ctypes.c_int64) for name in ("channels", "height", "width", "reach", "pitch"))


class Neighbours(ctypes.Structure):
    """The offsets of a pixel's neighbours."""

    _fields_ = (("count", ctypes.c_int64), *((name, ctypes.POINTER(ctypes.c_int64)) for name in ("dy", "dx")))


class Variant(ctypes.Structure):
    """The numbers of a variant of the affinity."""

    _fields_ = (
        *((name, ctypes.c_double) for name in ("guard", "weight", "samples")),
        *((name, ctypes.c_int64) for name in ("sigma_power", "power")),
        ("position", ctypes.POINTER(ctypes.c_double)),
    )


@functools.cache
def load() -> ctypes.CDLL | None:
    """Return the compiled library, or None where it cannot be had: elsewhere than on Linux, or without a compiler."""
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    if not (sys.platform == "linux" and compiler and shutil.which(compiler[0])):
        return None
    command = [*compiler, *OPTIONS, *INSTRUCTIONS.get(torch.backends.cpu.get_cpu_capability(), ())]
    try:
        library = _load_or_compile(command)
    except (OSError, subprocess.CalledProcessError) as error:
        reason = (getattr(error, "stderr", None) or str(error)).strip()
        warnings.warn(
            f"PAMR and PAR fall back to slower PyTorch on CPUs: {shlex.join(command)}: {reason}", stacklevel=2
        )
        return None
    for real in REALS.values():
        affinity, propagate = getattr(library, f"affinity_{real}"), getattr(library, f"propagate_{real}")
        size, neighbours = ctypes.POINTER(Map), ctypes.POINTER(Neighbours)
        pointer, number = ctypes.c_void_p, ctypes.c_int64
        affinity.argtypes = (pointer, pointer, size, neighbours, ctypes.POINTER(Variant), number)
        propagate.argtypes = (pointer, pointer, pointer, size, neighbours, number, number)
        affinity.restype = propagate.restype = None
    _declare_lattice(library)
    return library


def _declare_lattice(library: ctypes.CDLL) -> None:
    """Declare the functions of lattice.cpp. They return a status: 0 where all went well."""
    pointer, number, real = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double
    library.lattices_new.argtypes = (pointer, pointer, number, number, number, real, real, number, number)
    library.lattices_free.argtypes = (pointer,)
    library.lattices_free.restype = None
    library.lattices_vertices.argtypes = (pointer,)
    library.lattices_vertices.restype = number
    for name in REALS.values():
        getattr(library, f"lattices_filter_{name}").argtypes = (pointer, pointer, pointer, *4 * (number,))
    library.lattices_mean_field.argtypes = (pointer, pointer, number, pointer, pointer, *4 * (number,))


def _load_or_compile(command: list[str]) -> ctypes.CDLL:
    contents = b"".join(source.read_bytes() for source in SOURCES)
    key = hashlib.sha256(" ".join(command).encode() + contents).hexdigest()[:16]
    kept = _cache() / f"kernels-{key}.so"
    with suppress(OSError):
        return ctypes.CDLL(str(kept))
    with tempfile.TemporaryDirectory() as folder:
        compiled = Path(folder, kept.name)
        subprocess.run([*command, *map(str, SOURCES), "-o", str(compiled)], check=True, capture_output=True, text=True)
        library = ctypes.CDLL(str(compiled))
        with suppress(OSError):  # where nothing can be kept, the next process compiles again
            kept.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=kept.parent) as beside:  # from where it appears at once and whole
                shutil.copyfile(compiled, Path(beside, kept.name)).replace(kept)
    return library


def _cache() -> Path:
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()) / "wsseg_layers"
    except RuntimeError:  # a user without a home, as in some containers, keeps nothing: below a file is no folder
        return Path(os.devnull) / "wsseg_layers"
