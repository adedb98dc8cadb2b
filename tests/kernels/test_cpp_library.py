"""How the C++ becomes a library: compiled when it is first needed, kept where no other user can write."""

import ctypes
import os
import shutil
import stat
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.strategies import needs_compiler
from wsseg_layers.kernels import available_backends, backends, bilateral_filter, pamr_affinity, pamr_propagate
from wsseg_layers.kernels.backends.cpp import library

AGAIN = r"every process compiles the C\+\+ again: "


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The cache folder of a process that has not compiled yet. It does not exist yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("CXX", str(compiler(tmp_path)))
    monkeypatch.setattr(library, "shipped", lambda instructions: tmp_path / f"no wheel for {instructions}")
    forget()
    yield tmp_path / "cache" / "wsseg_layers"
    forget()


def forget() -> None:
    """Make the process look for the library again."""
    library._find.cache_clear()
    backends._warn_once.cache_clear()


def compile_quietly() -> Path:
    """Compile without a warning, and return the only file of the cache."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert computes(library.load()), library.problem()
    (kept,) = library._cache_folder().iterdir()
    return kept


def computes(loaded: ctypes.CDLL | None) -> bool:
    return hasattr(loaded, "affinity_float") and hasattr(loaded, "propagate_double")


# A compiler that is quick: it does not optimise, and a second command with the same options copies what the first made.
COMPILER = """#!/bin/sh
{before}
for output; do :; done
arguments="$*"
case "$arguments" in *" -o "*) ;; *) exec {compiler} "$@";; esac
made={folder}/$(printf %s "${{arguments%"$output"}}" | cksum | tr " " -)
if [ ! -f "$made" ]; then mkdir -p {folder}; {compiler} "$@" -O0 && mv "$output" "$made" || exit; fi
cp "$made" "$output"
"""


def compiler(folder: Path, before: str = "") -> Path:
    """Write a compiler that runs a line of shell before it compiles."""
    path = folder / "compiler"
    made = folder.parent / "compiled"  # for all tests of this process
    path.write_text(COMPILER.format(before=before, compiler=shutil.which("c++"), folder=made))
    path.chmod(0o755)
    return path


@needs_compiler
def test_compiles_once_and_keeps_the_result(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = compile_quietly()
    assert kept.parent == cache
    assert kept.name.endswith("-kernels.so")
    forget()
    monkeypatch.setattr(library, "_compile", None)  # no second compilation
    assert compile_quietly() == kept


@needs_compiler
@pytest.mark.parametrize("content", [b"not a library", b""])
@pytest.mark.usefixtures("cache")
def test_compiles_again_what_does_not_load(content: bytes) -> None:
    kept = compile_quietly()
    kept.unlink()  # what is loaded is not to be written to
    kept.write_bytes(content)
    code = "from wsseg_layers.kernels.backends.cpp import library; assert library.load(), library.problem()"
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)  # this process has a library of this name
    assert len(kept.read_bytes()) > 1000


@needs_compiler
def test_the_cache_is_private(cache: Path) -> None:
    before = os.umask(0)
    try:
        kept = compile_quietly()
    finally:
        os.umask(before)
    assert [path.stat().st_mode & 0o777 for path in (cache, kept)] == [0o700, 0o700]


@needs_compiler
@pytest.mark.parametrize("mode", [0o777, 0o770, 0o702])
def test_nothing_is_loaded_from_where_others_can_write(cache: Path, mode: int) -> None:
    compile_quietly()
    cache.chmod(mode)
    forget()
    with pytest.warns(UserWarning, match=f"{AGAIN}other users can write to the cache folder {cache}; .*chmod go-w"):
        assert computes(library.load())
    assert loaded_from(library.load()).parent != cache


@needs_compiler
def test_nothing_is_loaded_from_the_folder_of_another_user(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compile_quietly()
    forget()
    owner = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: owner + 1)
    with pytest.warns(UserWarning, match=f"{AGAIN}the cache folder {cache} belongs to another user"):
        assert computes(library.load())
    assert loaded_from(library.load()).parent != cache


@needs_compiler
def test_no_file_of_another_user_is_loaded(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was put there while others could write to the folder."""
    kept = compile_quietly()
    forget()
    check_owner, owner = library._check_owner, os.getuid()

    def of_another_user(name: str, status: os.stat_result) -> None:
        uid = owner + 1 if stat.S_ISREG(status.st_mode) else owner
        check_owner(name, os.stat_result((*status[:4], uid, *status[5:])))

    monkeypatch.setattr(library, "_check_owner", of_another_user)
    with pytest.warns(UserWarning, match=f"{AGAIN}the file {kept} belongs to another user"):
        assert computes(library.load())
    assert loaded_from(library.load()).parent != cache


@needs_compiler
def test_a_relative_cache_is_ignored(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    assert compile_quietly().parent == tmp_path / "home/.cache/wsseg_layers"
    assert not (tmp_path / "relative").exists()
    assert not cache.exists()


@needs_compiler
@pytest.mark.usefixtures("cache")
def test_relative_home_disables_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "relative")
    monkeypatch.chdir(tmp_path)
    with pytest.warns(UserWarning, match=f"{AGAIN}the path of the cache folder is not absolute"):
        assert computes(library.load())
    assert not (tmp_path / "relative").exists()


@needs_compiler
def test_compiles_without_a_writable_cache(cache: Path) -> None:
    cache.parent.write_text("a file where the folder should be")
    with pytest.warns(UserWarning, match=AGAIN):
        assert computes(library.load())


@needs_compiler
@pytest.mark.usefixtures("cache")
def test_compiles_without_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home(path: Path) -> Path:
        raise RuntimeError(f"Could not determine home directory of {path}.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "expanduser", no_home)
    with pytest.warns(UserWarning, match=f"{AGAIN}Could not determine home directory"):
        assert computes(library.load())


@needs_compiler
@pytest.mark.usefixtures("cache")
def test_loads_nothing_from_the_folder_of_temporary_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be mounted without the permission to execute."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "missing"))
    compile_quietly()


@needs_compiler
def test_full_cache_compiles_in_a_temporary_folder(cache: Path, tmp_path: Path) -> None:
    compiler(tmp_path, f'case "$*" in *{cache}*) echo "No space left on device" >&2; exit 1; esac')
    with pytest.warns(UserWarning, match=f"(?s){AGAIN}.*No space left on device"):
        assert computes(library.load())
    assert not list(cache.iterdir())


@needs_compiler
def test_keeps_nothing_that_is_not_on_the_disk(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a network's file system, a full disk is noticed when a file is flushed. A part of a library must not stay."""

    def full(descriptor: int) -> None:
        raise OSError(f"No space left on device: file {descriptor}")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.warns(UserWarning, match=f"{AGAIN}No space left on device"):
        assert computes(library.load())
    assert not list(cache.iterdir())


@needs_compiler
@pytest.mark.parametrize("other", ["machine", "libc_ver", "compiler"])
def test_machines_that_share_a_home_have_a_library_each(
    other: str, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = tmp_path / "version"
    version.write_text("1.0")
    compiler(tmp_path, f'case "$*" in *--version) cat {version}; exit; esac')
    compile_quietly()
    forget()
    if other == "machine":
        monkeypatch.setattr("platform.machine", lambda: "another")
    elif other == "libc_ver":
        monkeypatch.setattr("platform.libc_ver", lambda: ("glibc", "2.17"))
    else:
        version.write_text("2.0")
    assert computes(library.load())
    assert len(list(cache.iterdir())) == 2


@needs_compiler
def test_the_first_of_several_processes_is_kept(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that another machine has loaded must not be replaced on a network's file system."""
    compile_really = library._compile
    first: list[int] = []

    def compile_slowly(command: list[str], folder: Path) -> Path:
        compiled = compile_really(command, folder)
        monkeypatch.setattr(library, "_compile", compile_really)
        library._load_from_cache(command, cache)  # another process is faster
        first.extend(file.stat().st_ino for file in cache.iterdir() if file.is_file())
        return compiled

    monkeypatch.setattr(library, "_compile", compile_slowly)
    assert compile_quietly().stat().st_ino == first[0]


@needs_compiler
@pytest.mark.usefixtures("cache")
def test_keeps_without_hard_links(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(path: Path, target: Path) -> None:
        raise PermissionError(f"{path} {target}")

    monkeypatch.setattr(Path, "hardlink_to", no_links)
    compile_quietly()


@needs_compiler
@pytest.mark.usefixtures("cache")
def test_compiles_for_one_thread_without_openmp(tmp_path: Path) -> None:
    compiler(tmp_path, 'case "$*" in *-fopenmp*) echo "cannot find -lomp" >&2; exit 1; esac')
    for _ in range(2):  # compiled, then kept
        with pytest.warns(
            UserWarning, match="the dense CRF run on one thread: .* has no OpenMP; when it has, remove .*-serial.so"
        ):
            assert computes(library.load())
        forget()
    expected = pamr_affinity(torch.ones(1, 3, 5, 6), [1, 2], backend="eager")
    with pytest.warns(UserWarning, match="on one thread"):
        affinity = pamr_affinity(torch.ones(1, 3, 5, 6), [1, 2], backend="cpp")
    torch.testing.assert_close(affinity, expected)


@pytest.mark.slow
@pytest.mark.usefixtures("cache")
def test_clang(monkeypatch: pytest.MonkeyPatch) -> None:
    """Debian's clang comes without OpenMP."""
    if shutil.which("clang++") is None:
        pytest.skip("clang++ is not installed")
    monkeypatch.setenv("CXX", "clang++")
    image, mask = torch.rand(1, 3, 9, 40), torch.rand(1, 13, 9, 40)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "PAMR, PAR and the dense CRF run on one thread")
        affinity = pamr_affinity(image, [1, 5], backend="cpp")
    torch.testing.assert_close(affinity, pamr_affinity(image, [1, 5], backend="eager"))
    expected = pamr_propagate(mask, affinity, [1, 5], 3, "eager")
    torch.testing.assert_close(pamr_propagate(mask, affinity, [1, 5], 3, "cpp"), expected)
    # Every pixel has a simplex of its own, so that the sum is the pixel itself.
    filtered = bilateral_filter(mask, 255 * image, 0.01, 0.01, True, "cpp")
    torch.testing.assert_close(filtered, mask, rtol=1e-4, atol=1e-4)


@needs_compiler
@pytest.mark.usefixtures("cache")
def test_a_compiler_that_fails_is_reported_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "c++ -no-such-option")
    with pytest.warns(
        UserWarning, match="run in plain PyTorch on device type 'cpu'.*cannot be compiled.*no-such-option"
    ):
        affinity = pamr_affinity(torch.rand(1, 3, 5, 6), [1, 2])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert pamr_propagate(torch.rand(1, 7, 5, 6), affinity, [1, 2], 2).shape == (1, 7, 5, 6)
    with pytest.raises(ValueError, match=r"backend='cpp' is not usable .* cannot be compiled: c\+\+ -no-such-option"):
        pamr_affinity(torch.rand(1, 3, 5, 6), [1, 2], backend="cpp")


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize(
    ("platform", "compiler", "reason"),
    [
        ("linux", "no-such-compiler", "needs a C++ compiler: c++, or the one that the environment variable CXX names"),
        ("linux", "", "needs a C++ compiler: c++, or the one that the environment variable CXX names"),
        ("linux", "c++ '", "cannot be compiled: No closing quotation"),
        ("darwin", "c++", "runs on Linux only"),
    ],
)
def test_reason_for_no_library(platform: str, compiler: str, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setenv("CXX", compiler)
    assert library.load() is None
    assert library.problem() == reason
    assert ("cpp", False, reason) in available_backends("cpu")


def loaded_from(loaded: ctypes.CDLL | None) -> Path:
    assert loaded is not None
    return Path(loaded._name)
