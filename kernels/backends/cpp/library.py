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

SOURCE = Path(__file__).with_name("kernels.cpp")
OPTIONS = ("-std=c++17", "-O3", "-fno-math-errno", "-shared", "-fPIC", "-fopenmp")
# Of processors that PyTorch found to have them, so that a kept library never meets one that has not.
INSTRUCTIONS = {"AVX2": ("-mavx2", "-mfma", "-mf16c"), "AVX512": ("-mavx2", "-mfma", "-mf16c", "-mavx512f")}


class Neighbours(ctypes.Structure):
    """Where the neighbours of a pixel are."""

    _fields_ = (
        ("count", ctypes.c_int64),
        ("reach", ctypes.c_int64),
        ("dy", ctypes.POINTER(ctypes.c_int64)),
        ("dx", ctypes.POINTER(ctypes.c_int64)),
        ("by_dx", ctypes.POINTER(ctypes.c_int64)),
    )


class Variant(ctypes.Structure):
    """The numbers of a variant of the affinity."""

    _fields_ = (
        ("guard", ctypes.c_double),
        ("weight", ctypes.c_double),
        ("samples", ctypes.c_double),
        ("sigma_power", ctypes.c_int64),
        ("power", ctypes.c_int64),
        ("position", ctypes.POINTER(ctypes.c_double)),
    )


class Affinity(ctypes.Structure):
    """The arguments of `affinity_*`."""

    _fields_ = (
        ("image", ctypes.c_void_p),
        ("strides", ctypes.c_int64 * 4),
        ("batch", ctypes.c_int64),
        ("channels", ctypes.c_int64),
        ("height", ctypes.c_int64),
        ("width", ctypes.c_int64),
        ("out", ctypes.c_void_p),
        ("neighbours", Neighbours),
        ("variant", Variant),
        ("threads", ctypes.c_int64),
    )


class Propagation(ctypes.Structure):
    """The arguments of `propagate_*`."""

    _fields_ = (
        ("masks", ctypes.c_void_p),
        ("strides", ctypes.c_int64 * 4),
        ("batch", ctypes.c_int64),
        ("channels", ctypes.c_int64),
        ("height", ctypes.c_int64),
        ("width", ctypes.c_int64),
        ("out", ctypes.c_void_p),
        ("counts", ctypes.c_void_p),
        ("weights", ctypes.c_void_p),
        ("weights_type", ctypes.c_int64),
        ("neighbours", Neighbours),
        ("iterations", ctypes.c_int64),
        ("transposed", ctypes.c_int64),
        ("threads", ctypes.c_int64),
        ("group", ctypes.c_int64),
        ("chunk_bytes", ctypes.c_int64),
    )


# The functions and their arguments. `{name}_workspace` counts the bytes of memory that a caller passes beside them.
FUNCTIONS = {
    "affinity_float": Affinity,
    "affinity_double": Affinity,
    "propagate_float": Propagation,
    "propagate_double": Propagation,
}


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
    for name, struct in FUNCTIONS.items():
        function, workspace = getattr(library, name), getattr(library, f"{name}_workspace")
        function.argtypes, function.restype = (ctypes.POINTER(struct), ctypes.c_void_p), None
        workspace.argtypes, workspace.restype = (ctypes.POINTER(struct),), ctypes.c_int64
    return library


@functools.cache
def mismatch(library: ctypes.CDLL) -> str | None:
    """Return how the library's structs differ from those above, or None: a library from elsewhere may be another."""
    structs = (Affinity, Propagation)
    expected = [ctypes.sizeof(struct) for struct in structs]
    actual = list((ctypes.c_int64 * len(structs)).in_dll(library, "struct_sizes"))
    if actual != expected:
        return f"the compiled library is of another version: its structs have {actual} bytes, expected {expected}"
    return None


def _load_or_compile(command: list[str]) -> ctypes.CDLL:
    key = hashlib.sha256(" ".join(command).encode() + SOURCE.read_bytes()).hexdigest()[:16]
    kept = _cache() / f"kernels-{key}.so"
    with suppress(OSError):
        return ctypes.CDLL(str(kept))
    with tempfile.TemporaryDirectory() as folder:
        compiled = Path(folder, kept.name)
        subprocess.run([*command, str(SOURCE), "-o", str(compiled)], check=True, capture_output=True, text=True)
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
