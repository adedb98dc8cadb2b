"""What is known of the processor: its name, its clock, and the least time that its load ports need for PAMR."""

import ctypes
import functools
import math
import os
import platform
import shlex
import statistics
import subprocess
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

REGISTER_BYTES = {"AVX512": 64, "AVX2": 32}  # of the instructions that the C++ is compiled for; otherwise 16

# Each step of the chain waits for the one before: 3 cycles for a multiplication on x86, 1 for an addition on ARM.
CHAINS = {"x86_64": ("imul %0, %0", 3), "aarch64": ("add %0, %0, %0", 1)}
# A load of a whole register; %1 is the address.
LOADS = {
    ("x86_64", 64): "vmovups (%1), %%zmm0",
    ("x86_64", 32): "vmovups (%1), %%ymm0",
    ("x86_64", 16): "movups (%1), %%xmm0",
    ("aarch64", 16): "ldr q0, [%1]",
}
CLOBBERED = {"x86_64": "xmm0", "aarch64": "v0"}
STEPS = 16  # instructions per turn, so that the loop's own instructions do not count


def register_bytes() -> int:
    """Return the bytes that one vector load reads."""
    return REGISTER_BYTES.get(torch.backends.cpu.get_cpu_capability(), 16)


@functools.cache
def clock() -> float | None:
    """Return the cycles per second with all threads busy; None where it cannot be measured.

    Systems report a nominal clock, and a virtual machine may report a wrong one. A chain of dependent instructions
    takes a known number of cycles.
    """
    if platform.machine() not in CHAINS:
        return None
    instruction, cycles = CHAINS[platform.machine()]
    per_second = instructions_per_second(instruction)
    return None if per_second is None else cycles * per_second


@functools.cache
def loads_per_cycle() -> int | None:
    """Return how many vector registers a thread can load per cycle; None where it cannot be measured."""
    load = LOADS.get((platform.machine(), register_bytes()))
    per_second = None if load is None else instructions_per_second(load)
    cycles_per_second = clock()
    if per_second is None or cycles_per_second is None:
        return None
    return max(1, round(per_second / cycles_per_second))


def instructions_per_second(instruction: str) -> float | None:
    """Return how often a thread executes an instruction per second, with all threads busy.

    Return None if no compiler works. The instruction may use %0, an integer register, and %1, the address of 64 bytes
    that begin a cache line.
    """
    body = f'__asm__ volatile("{instruction}" : "+r"(x) : "r"(line) : "{CLOBBERED[platform.machine()]}");' * STEPS
    source = (
        "alignas(64) static char line[64];"
        f'extern "C" long run(long turns) {{ long x = 3; for (long i = 0; i < turns; i++) {{ {body} }} return x; }}'
    )
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder, "run.so")
        flags = ["-O2", "-shared", "-fPIC", "-x", "c++", "-", "-o", str(library)]
        try:
            command = [*shlex.split(os.environ.get("CXX", "c++")), *flags]
            subprocess.run(command, input=source, text=True, check=True, capture_output=True)
            run = ctypes.CDLL(str(library)).run
        except (subprocess.CalledProcessError, OSError):
            return None
    run.argtypes, run.restype = (ctypes.c_long,), ctypes.c_long
    turns = 200_000

    def frequency(_: int) -> float:
        started = time.perf_counter()
        run(turns)
        return turns * STEPS / (time.perf_counter() - started)

    threads = torch.get_num_threads()
    with ThreadPoolExecutor(threads) as pool:  # other processes only make it look slower, so the best round counts
        return max(statistics.fmean(pool.map(frequency, range(threads))) for _ in range(20))


def load_bound(shape: Sequence[int], neighbours: int, num_iter: int) -> float | None:
    """Return the seconds that the load ports need at least to propagate masks [B, C, H, W].

    In each iteration each pixel reads each neighbour of each channel, and each weight once for all channels:
    neighbours x (C + 1) values, one register of neighbouring pixels per load.
    """
    cycles_per_second, per_cycle = clock(), loads_per_cycle()
    if cycles_per_second is None or per_cycle is None:
        return None
    batch, channels, height, width = shape
    registers = batch * height * math.ceil(width * 4 / register_bytes())
    loads = registers * neighbours * (channels + 1) * num_iter
    return loads / per_cycle / cycles_per_second / torch.get_num_threads()


def cpu_model() -> str:
    """Return the processor's name, and its family and model where Linux tells them."""
    path = Path("/proc/cpuinfo")
    lines: Sequence[str] = path.read_text().splitlines() if path.is_file() else ()
    entries = dict(line.split(":", 1) for line in lines if ":" in line)
    known = {name.strip(): value.strip() for name, value in entries.items()}
    if "model name" not in known:
        return platform.processor() or platform.machine()
    return f"{known['model name']} (family {known.get('cpu family', '?')}, model {known.get('model', '?')})"
