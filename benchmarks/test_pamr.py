"""PAMR beside the eager formulation: `pytest benchmarks/test_pamr.py --benchmark -s`.

Correctness is the gate, then both are timed in turn in one process. Wall-clock time is what a user waits, and needs an
idle machine; with OMP_NUM_THREADS=1 the processor time is meaningful too, and a busy machine changes it less.
"""

import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks import eager
from wsseg_layers.functional import pamr

DILATIONS = (1, 2, 4, 8, 12, 24)
NUM_ITER = 10


def times(function: Callable[[], Tensor], repeats: int) -> tuple[list[float], list[float]]:
    """Return wall-clock and processor seconds of every call after a first one."""
    function()
    wall, processor = [], []
    for _ in range(repeats):
        wall_start, processor_start = time.perf_counter(), time.process_time()
        function()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        wall.append(time.perf_counter() - wall_start)
        processor.append(time.process_time() - processor_start)
    return wall, processor


@pytest.mark.parametrize("shape", [(1, 21, 321, 321), (16, 21, 81, 81), (1, 2, 321, 321)], ids=str)
def test_time(shape: tuple[int, ...]) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(shape[0], 3, *shape[2:], generator=generator).to(device)
    mask = torch.rand(shape, generator=generator).softmax(dim=1).to(device)
    with torch.no_grad():
        torch.testing.assert_close(
            pamr(image, mask, 1, DILATIONS), eager.pamr(image, mask, DILATIONS, 1), rtol=1e-4, atol=1e-5
        )
        ours = times(lambda: pamr(image, mask, NUM_ITER, DILATIONS), repeats=11)
        peer = times(lambda: eager.pamr(image, mask, DILATIONS, NUM_ITER), repeats=2)
    print(f"\n{shape}, {NUM_ITER} iterations, torch {torch.__version__}, {device}, {torch.get_num_threads()} threads")
    for kind, our, their in zip(("wall clock", "processor"), ours, peer, strict=True):
        median, eager_median = statistics.median(our), statistics.median(their)
        print(
            f"  {kind:10}  ours {median * 1e3:8.1f} ms ({min(our) * 1e3:.1f} to {max(our) * 1e3:.1f})"
            f"  eager {eager_median * 1e3:8.0f} ms  {eager_median / median:6.0f} x"
        )


def peak_memory(statement: str, shape: tuple[int, ...]) -> float:
    """Return by how many MiB `statement` raises a fresh process's peak over its inputs."""
    code = f"""
import sys, torch
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parents[1])!r})
from benchmarks import eager
from wsseg_layers.functional import pamr

def peak_kib():
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])

image, mask = torch.rand({shape[0]}, 3, *{shape[2:]}), torch.rand({shape})
Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far, the parent's included
before = peak_kib()
{statement}
print((peak_kib() - before) / 1024)
"""
    return float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak memory as Linux reports it")
def test_memory() -> None:
    shape = (1, 150, 512, 683)
    ours = peak_memory(f"pamr(image, mask, 1, {DILATIONS})", shape)
    # The eager formulation's stack of 150 channels takes more memory than most machines have: 10 channels, times 15.
    peer = 15 * peak_memory(f"eager.pamr(image, mask, {DILATIONS}, 1)", (1, 10, 512, 683))
    print(f"\n{shape}: ours {ours:.0f} MiB, eager {peer:.0f} MiB (15 x 10 channels): 1/{peer / ours:.0f}")
    assert ours < peer / 20
