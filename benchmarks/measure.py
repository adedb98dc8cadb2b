"""Timing: first the results are compared, then all competitors are called in turn, in one process."""

import ctypes
import functools
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from benchmarks.processor import load_bound

Mode = Literal["smoke", "quick", "full"]
Function = Callable[[], Any]
SECONDS = {"smoke": 0.0, "quick": 0.3, "full": 1.0}  # for each competitor, its first call aside
FEWEST_CALLS = {"smoke": 0, "quick": 1, "full": 5}
MOST_CALLS = 50
MOST_SECONDS = 20.0  # a competitor is not called again after this time, even below FEWEST_CALLS

# The C library gives large blocks back to the system when they are freed, and each new block is filled with zeros page
# by page when it is first touched. With these variables a process keeps what it has.
KEEP_MEMORY = {
    "MALLOC_MMAP_THRESHOLD_": str(2**32),
    "MALLOC_TRIM_THRESHOLD_": str(2**34),
    "MALLOC_TOP_PAD_": str(2**28),
}


@dataclass(frozen=True)
class Row:
    """One competitor at one size.

    Attributes:
        title: title of the table.
        size: name of the size.
        competitor: name of the competitor.
        seconds: time of each call, with the allocator as it is by default.
        memory_mib: memory that a call needs.
        values: the numbers that the size consists of, for the plots.
        bound: seconds that the hardware needs at least.
        kept: time of each call in a process that keeps its memory.
    """

    title: str
    size: str
    competitor: str
    seconds: tuple[float, ...]
    memory_mib: float | None
    values: Mapping[str, float]
    bound: float | None = None
    kept: tuple[float, ...] = ()

    @property
    def median(self) -> float:
        """Return the median time with the default allocator."""
        return statistics.median(self.seconds)

    @property
    def kept_median(self) -> float | None:
        """Return the median time with memory kept, where it was measured."""
        return statistics.median(self.kept) if self.kept else None

    @property
    def key(self) -> tuple[str, str, str]:
        """Return what identifies the row."""
        return self.title, self.size, self.competitor


@dataclass
class Bench:
    """Compares competitors.

    Attributes:
        mode: "smoke" (compare the results only), "quick" or "full".
        keeps_memory: whether this process was started with `KEEP_MEMORY`.
        rows: what was measured.
        notes: results that are not rows of a table.
        is_complete: whether a full run has ended, with all benchmarks and without an error.
        say: called with each line that is shown at once.
    """

    mode: Mode
    keeps_memory: bool = False
    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    is_complete: bool = False
    say: Callable[[str], object] = print

    @property
    def device(self) -> torch.device:
        """Return the device that is measured."""
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def size(self, *, smoke: Any, quick: Any, full: Any) -> Any:
        """Return the size for the mode."""
        return {"smoke": smoke, "quick": quick, "full": full}[self.mode]

    @property
    def compiles(self) -> bool:
        """Whether competitors are compiled: in the full run, where there is a compiler."""
        return self.mode == "full" and (self.device.type != "cpu" or compiler() is not None)

    def compiled(self, competitors: Mapping[str, Callable[..., Any]]) -> dict[str, Callable[..., Any]]:
        """Return competitors compiled by `torch.compile`, or none if nothing is compiled."""
        if not self.compiles:
            return {}
        torch._dynamo.reset()
        return {name: torch.compile(function, dynamic=False) for name, function in competitors.items()}

    def compare(
        self,
        title: str,
        size: str,
        competitors: Mapping[str, Function],
        tolerance: float | None = 1e-4,
        bound: float | None = None,
        unchecked: Collection[str] = (),
        values: Mapping[str, float] | None = None,
    ) -> None:
        """Check that all return what the first one returns, then time them in turn.

        Args:
            title: title of the table.
            size: name of the size.
            competitors: functions without arguments, the first one ours.
            tolerance: relative and absolute tolerance of the results; None checks nothing.
            bound: seconds that the hardware needs at least, for the competitors whose names start with "ours".
            unchecked: names of competitors that compute something else.
            values: the numbers that the size consists of, for the plots.
        """
        results = {name: function() for name, function in competitors.items()}
        for name in unchecked:
            del results[name]
        first, *others = results.values()
        for other in others if tolerance is not None else ():
            torch.testing.assert_close(other, first, rtol=tolerance, atol=tolerance)
        del results, first, others
        if self.mode == "smoke":
            return
        seconds: dict[str, list[float]] = {name: [] for name in competitors}
        memory: dict[str, float | None] = {}
        waiting = dict(competitors)
        while waiting:
            for name, function in list(waiting.items()):
                timed = partial(self.append_time, seconds[name], function)
                if name in memory:
                    timed()
                else:  # memory is that of the first timed call: there are formulations that take 10 s
                    memory[name] = self.memory(timed)
                calls, spent = len(seconds[name]), sum(seconds[name])
                enough = spent > SECONDS[self.mode] and calls >= FEWEST_CALLS[self.mode]
                if enough or calls >= MOST_CALLS or spent > MOST_SECONDS:
                    del waiting[name]
        for name in competitors:
            own_bound = bound if name.startswith("ours") else None
            row = Row(title, size, name, tuple(seconds[name]), memory[name], values or {}, own_bound)
            self.rows.append(row)
            kept = " with memory kept" if self.keeps_memory else ""
            self.say(f"{title:30} {size:16} {name:28} {row.median * 1e3:10.3f} ms{kept}")

    def bound(self, shape: Sequence[int], neighbours: int, num_iter: int) -> float | None:
        """Return the seconds that a propagation of masks [B, C, H, W] needs at least on the device."""
        if self.mode == "smoke":
            return None
        if self.device.type == "cuda":
            return propagation_bytes(shape, neighbours, num_iter) / copy_bandwidth(self.device)
        return load_bound(shape, neighbours, num_iter)

    def note(self, text: str) -> None:
        """Note and say what was measured. Numbers of a smoke run mean nothing, and one process notes enough."""
        if self.mode != "smoke" and not self.keeps_memory:
            self.notes.append(text)
            self.say(text)

    def append_time(self, seconds: list[float], function: Function) -> None:
        """Time one call and append its seconds."""
        seconds.append(self.time(function))

    def time(self, function: Function) -> float:
        """Return the seconds that one call takes."""
        if self.device.type == "cuda":
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            function()
            end.record()
            torch.cuda.synchronize()
            return start.elapsed_time(end) / 1e3
        started = time.perf_counter()
        function()
        return time.perf_counter() - started

    def memory(self, function: Function) -> float | None:
        """Return by how many MiB a call raises the peak memory of the GPU or, on Linux, of the process."""
        if self.keeps_memory:
            function()
            return None
        if self.device.type != "cuda":
            return resident_memory(function)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20


def resident_memory(function: Function) -> float | None:
    """Return by how many MiB a call raises the peak memory of the process; None where the system does not tell."""
    status, clear = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    try:
        ctypes.CDLL(None).malloc_trim(0)  # what earlier calls have freed and the C library keeps
        clear.write_text("5")  # forget the peak so far
    except (AttributeError, OSError, TypeError):  # another C library, another system
        return None

    def kib(entry: str) -> int:
        return int(status.read_text().split(entry + ":")[1].split()[0])

    before = kib("VmRSS")
    function()
    return (kib("VmHWM") - before) / 1024


def compiler() -> str | None:
    """Return a C++ compiler that `torch.compile` can use on this CPU, if there is one."""
    return shutil.which("cl" if sys.platform == "win32" else "g++") or shutil.which("clang++")


def forward_backward(function: Callable[..., Tensor], *inputs: Tensor) -> Function:
    """Return a function that runs another, and the backward pass of its sum of squares, and returns the gradients."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]

    def run() -> tuple[Tensor, ...]:
        return torch.autograd.grad(function(*leaves).square().sum(), leaves)

    return run


def propagation_bytes(shape: Sequence[int], neighbours: int, num_iter: int) -> float:
    """Return the bytes of float32 that must move: the weights and twice the masks [B, C, H, W], per iteration."""
    batch, channels, height, width = shape
    return 4.0 * batch * (neighbours + 2 * channels) * height * width * num_iter


@functools.cache
def copy_bandwidth(device: torch.device) -> float:
    """Return the bytes per second that a copy of 256 MiB reads and writes: the most that memory gives."""
    source = torch.ones(64 * 2**20, device=device)
    target = torch.empty_like(source)
    bench = Bench("quick")
    best = min(bench.time(lambda: target.copy_(source)) for _ in range(8))
    return 2 * source.numel() * source.element_size() / best
