"""Timing: correctness first, then all competitors in turn, in one process, until time is up."""

import ctypes
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

Mode = Literal["smoke", "quick", "full"]
Function = Callable[[], Any]
SECONDS = {"smoke": 0.0, "quick": 0.4, "full": 3.0}  # for each competitor, its first call aside
FEWEST_CALLS = {"smoke": 0, "quick": 1, "full": 3}
MOST_CALLS = 50


@dataclass(frozen=True)
class Row:
    """One competitor at one size: seconds of every call, and the memory that a call needs."""

    title: str
    size: str
    competitor: str
    seconds: tuple[float, ...]
    memory_mib: float | None
    values: Mapping[str, float]  # what the size is made of, for the plots

    @property
    def median(self) -> float:
        """Return the median time."""
        return statistics.median(self.seconds)


@dataclass
class Bench:
    """Compares competitors; what it measured is in `rows`, and in `notes` what fits no row."""

    mode: Mode
    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    say: Callable[[str], object] = print

    @property
    def device(self) -> torch.device:
        """Return the device that is measured."""
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def size(self, *, smoke: Any, quick: Any, full: Any) -> Any:
        """Return the size for the mode."""
        return {"smoke": smoke, "quick": quick, "full": full}[self.mode]

    def compiled(self, competitors: Mapping[str, Callable[..., Any]]) -> dict[str, Callable[..., Any]]:
        """Return competitors compiled by `torch.compile`, where that can be done and is timed: in the full run."""
        if self.mode != "full" or (self.device.type == "cpu" and compiler() is None):
            return {}
        torch._dynamo.reset()
        return {name: torch.compile(function, dynamic=False) for name, function in competitors.items()}

    def compare(
        self,
        title: str,
        size: str,
        competitors: Mapping[str, Function],
        tolerance: float | None = 1e-4,
        **values: float,
    ) -> None:
        """Check that all give what the first one does, then time them in turn. A tolerance of None checks nothing."""
        results = {name: function() for name, function in competitors.items()}
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
                calls, enough = len(seconds[name]), sum(seconds[name]) > SECONDS[self.mode]
                if (enough and calls >= FEWEST_CALLS[self.mode]) or calls >= MOST_CALLS:
                    del waiting[name]
        for name in competitors:
            row = Row(title, size, name, tuple(seconds[name]), memory[name], values)
            self.rows.append(row)
            self.say(f"{title:24} {size:22} {name:28} {row.median * 1e3:10.3f} ms")

    def note(self, text: str) -> None:
        """Note and say what was measured; a smoke run's figures mean nothing."""
        if self.mode != "smoke":
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
        if self.device.type != "cuda":
            return resident_memory(function)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20


def resident_memory(function: Function) -> float | None:
    """Return by how many MiB a call raises the process's peak memory; None where the system does not tell."""
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


def copy_bandwidth(device: torch.device) -> float:
    """Return the bytes a second that a copy of 256 MiB reads and writes: what memory gives at best."""
    source = torch.ones(64 * 2**20, device=device)
    target = torch.empty_like(source)
    bench = Bench("quick")
    best = min(bench.time(lambda: target.copy_(source)) for _ in range(8))
    return 2 * source.numel() * source.element_size() / best
