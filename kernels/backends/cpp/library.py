"""Loads the C++ as a library: the compiled one of the wheel, else one that is compiled on this machine.

The second kind is compiled at the first use, and kept in a cache folder for later processes.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import torch

from .interface import declare

FOLDER = Path(__file__).parent
SOURCES = tuple(FOLDER / name for name in ("affinity.cpp", "propagation.cpp", "labels.cpp", "lattice.cpp"))
HEADERS = (FOLDER / "tables.h",)
OPTIONS = ("-std=c++17", "-O3", "-fno-math-errno", "-fPIC")
# Builds in the order in which they are tried: the name of the file, and its options.
BUILDS = {"kernels.so": ("-shared", "-fopenmp"), "kernels-serial.so": ("-shared",)}
# Options per instruction set, by PyTorch's name for it. Any other name means the baseline, DEFAULT.
INSTRUCTIONS = {
    "DEFAULT": (),
    "AVX2": ("-mavx2", "-mfma", "-mf16c"),
    "AVX512": ("-mavx2", "-mfma", "-mf16c", "-mavx512f"),
}


def load() -> ctypes.CDLL | None:
    """Return the library, or None if there is none; `problem` says why."""
    return _find()[0]


def problem() -> str | None:
    """Return why there is no library, or None if there is one."""
    return _find()[1]


def shipped(instructions: str) -> Path:
    """Return the path of a wheel's compiled library for an instruction set."""
    return FOLDER / f"kernels-{instructions.lower()}.so"


def run(function: str, task: ctypes.Structure) -> None:
    """Call one of `interface.FUNCTIONS` with the memory that it asks for."""
    loaded = load()
    size = getattr(loaded, f"{function}_workspace")(task)
    workspace = torch.empty(size, dtype=torch.uint8, device="cpu")
    getattr(loaded, function)(task, workspace.data_ptr())


@functools.cache
def _find() -> tuple[ctypes.CDLL | None, str | None]:
    """Return the library, or the reason why there is none."""
    if sys.platform != "linux":
        return None, "runs on Linux only"
    instructions = torch.backends.cpu.get_cpu_capability()
    instructions = instructions if instructions in INSTRUCTIONS else "DEFAULT"
    try:
        return _open(shipped(instructions)), None
    except OSError:
        pass  # a source checkout, or the wheel for all other machines
    try:
        compiler = shlex.split(os.environ.get("CXX", "c++"))
        if not compiler or shutil.which(compiler[0]) is None:
            return None, "needs a C++ compiler: c++, or the one that the environment variable CXX names"
        return _load_or_compile([*compiler, *OPTIONS, *INSTRUCTIONS[instructions]]), None
    except (OSError, ValueError) as error:  # ValueError: a quote in CXX that is not closed
        return None, f"cannot be compiled: {error}"


def _open(file: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(file))
    declare(library)
    if file.name.endswith("-serial.so"):
        warnings.warn(
            f"PAMR, PAR and the dense CRF run on one thread: the compiler has no OpenMP; when it has, remove {file}",
            stacklevel=2,
        )
    return library


def _load_or_compile(command: list[str]) -> ctypes.CDLL:
    try:
        return _load_from_cache(command, _cache_folder())
    except (OSError, RuntimeError) as error:  # RuntimeError: the user has no home directory
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            library = _open(_compile(command, Path(folder)))
        warnings.warn(f"every process compiles the C++ again: {error}", stacklevel=2)
        return library


def _load_from_cache(command: list[str], cache: Path) -> ctypes.CDLL:
    """Return the library that an earlier process kept, or compile it and keep it.

    Machines may share a home directory, so the file's name contains a hash of everything that the library depends on.
    """
    _, version, _ = _execute([*command, "--version"])
    sources = [source.read_text(encoding="utf-8") for source in (*SOURCES, *HEADERS)]
    depends_on = [*command, repr(BUILDS), version, platform.machine(), *platform.libc_ver(), *sources]
    key = hashlib.sha256("\n".join(depends_on).encode()).hexdigest()[:16]
    for name in BUILDS:
        kept = cache / f"{key}-{name}"
        if kept.exists():
            _check_owner(f"the file {kept}", kept.stat())
            try:
                return _open(kept)
            except OSError:
                kept.unlink(missing_ok=True)  # not a library; another process may have removed it
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        compiled = _compile(command, Path(folder))
        kept = cache / f"{key}-{compiled.name}"
        # Write it to the disk before it gets the name that is loaded: loading an incomplete library kills the process.
        with compiled.open("rb") as file:
            os.fsync(file.fileno())
        compiled.chmod(0o700)  # with a umask of 002, other users could change it
        try:
            # The first of several processes wins: on a network file system, a file in use must not be replaced.
            kept.hardlink_to(compiled)
        except FileExistsError:
            pass
        except OSError:  # a file system without hard links
            compiled.replace(kept)
    return _open(kept)


def _compile(command: list[str], folder: Path) -> Path:
    """Compile the sources into a folder, without OpenMP if the compiler has none, and return the file."""
    errors = []
    for name, options in BUILDS.items():
        arguments = [*command, *options, *map(str, SOURCES), "-o", str(folder / name)]
        status, _, messages = _execute(arguments)
        if status == 0:
            return folder / name
        errors.append(f"{shlex.join(arguments)}: {messages}")
    raise OSError(errors[0])


def _execute(command: list[str]) -> tuple[int, str, str]:
    """Return the exit status of a command, and what it prints."""
    finished = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", check=False
    )
    return finished.returncode, finished.stdout.strip(), finished.stderr.strip()


def _cache_folder() -> Path:
    """Return the cache folder, made if necessary.

    Raises:
        OSError: other users could have put a library there.
    """
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    folder = (base if base.is_absolute() else Path("~/.cache").expanduser()) / "wsseg_layers"
    if not folder.is_absolute():
        raise OSError(f"the path of the cache folder is not absolute: {folder}")
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = folder.stat()
    _check_owner(f"the cache folder {folder}", status)
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise OSError(f"other users can write to the cache folder {folder}; after a look at it: chmod go-w {folder}")
    return folder


def _check_owner(name: str, status: os.stat_result) -> None:
    if status.st_uid != os.getuid():
        raise OSError(f"{name} belongs to another user")
