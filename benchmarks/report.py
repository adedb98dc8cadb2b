"""Tables and plots of what the benchmarks measured."""

import csv
import platform
from collections.abc import Sequence
from datetime import date
from pathlib import Path

import torch
from matplotlib.figure import Figure

from benchmarks.measure import Bench, Row, copy_bandwidth

RESULTS = Path(__file__).resolve().parent / "results"
AXES = ("side", "classes", "dilations", "iterations")
BASE = {"classes": 21, "dilations": 6, "iterations": 10}


def write_report(bench: Bench) -> Path:
    """Write `<device>.md`, `.csv` and `.png` (quick runs beside them, apart), and return their folder."""
    folder = RESULTS if bench.mode == "full" else RESULTS / "quick"
    folder.mkdir(parents=True, exist_ok=True)
    name = bench.device.type
    bandwidth = copy_bandwidth(bench.device)
    (folder / f"{name}.md").write_text(markdown(bench, bandwidth))
    with (folder / f"{name}.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["title", "size", "competitor", "median_ms", "min_ms", "max_ms", "calls", "memory_mib"])
        for row in bench.rows:
            milliseconds = [f"{1e3 * x:.4f}" for x in (row.median, min(row.seconds), max(row.seconds))]
            memory = "" if row.memory_mib is None else f"{row.memory_mib:.1f}"
            writer.writerow([row.title, row.size, row.competitor, *milliseconds, len(row.seconds), memory])
    plot(bench, bandwidth).savefig(folder / f"{name}.png", dpi=100)
    return folder


def markdown(bench: Bench, bandwidth: float) -> str:
    """Return a table a title: the median time of every competitor, its spread, and how it compares with ours."""
    command = "--benchmark" if bench.mode == "full" else "--benchmark-quick"
    lines = [
        f"# Benchmarks on {device_name(bench.device)}",
        "",
        f"`pytest benchmarks/ {command}`, {date.today()}, PyTorch {torch.__version__}, "
        f"{torch.get_num_threads()} threads; a copy moves {bandwidth / 1e9:.0f} GB/s.",
        "Medians of calls in turn, in one process; in brackets fastest and slowest; ratios are to the first line.",
    ]
    for title in dict.fromkeys(row.title for row in bench.rows):
        lines += ["", f"## {title}", "", "| size | | ms | ratio | peak MiB |", "|:--|:--|--:|--:|--:|"]
        rows = [row for row in bench.rows if row.title == title]
        for size in dict.fromkeys(row.size for row in rows):
            same_size = [row for row in rows if row.size == size]
            lines += [table_line(row, same_size[0]) for row in same_size]
    if bench.notes:
        lines += ["", "## Memory and first use", "", "\n\n".join(bench.notes)]
    return "\n".join(lines) + "\n"


def table_line(row: Row, first: Row) -> str:
    """Return a competitor's line of the table."""
    spread = f"{1e3 * row.median:.4g} ({1e3 * min(row.seconds):.4g} to {1e3 * max(row.seconds):.4g})"
    memory = "" if row.memory_mib is None else f"{row.memory_mib:.0f}"
    return f"| {row.size} | {row.competitor} | {spread} | {row.median / first.median:.3g} | {memory} |"


def plot(bench: Bench, bandwidth: float) -> Figure:
    """Draw PAMR's time over each axis of its size, with what moving the affinity and the masks alone would take."""
    figure = Figure(figsize=(14, 3.6), layout="constrained")
    for axis, axes in zip(AXES, figure.subplots(1, len(AXES)), strict=True):
        rows = [row for row in bench.rows if row.title == f"PAMR over {axis}"]
        for competitor in dict.fromkeys(row.competitor for row in rows):
            own = [row for row in rows if row.competitor == competitor]
            axes.loglog([row.values[axis] for row in own], [1e3 * row.median for row in own], "o-", label=competitor)
        steps = sorted({row.values[axis] for row in rows})
        if steps:
            limits = [1e3 * memory_bytes(row_size(bench, axis, step)) / bandwidth for step in steps]
            axes.loglog(steps, limits, "k--", linewidth=1, label="memory alone")
        axes.set(xlabel=axis, ylabel="ms")
        axes.set_xticks(steps, [f"{step:g}" for step in steps], minor=False)
        axes.set_xticks([], minor=True)
        axes.grid(alpha=0.3, which="both")
        if rows:
            axes.legend(fontsize=8)
    return figure


def row_size(bench: Bench, axis: str, step: float) -> dict[str, float]:
    """Return the size of a point of the plot."""
    return {"side": float(bench.size(smoke=12, quick=64, full=128)), **BASE, axis: step}


def memory_bytes(size: dict[str, float]) -> float:
    """Return the bytes of float32 that must move: the affinity and twice the masks, every iteration."""
    values = 8 * size["dilations"] + 2 * size["classes"]
    return 4 * values * size["side"] ** 2 * size["iterations"]


def device_name(device: torch.device) -> str:
    """Return the GPU's name, or what is known of the CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name()
    return f"{cpu_model()}, {torch.get_num_threads()} threads"


def cpu_model() -> str:
    """Return the processor's name where Linux tells it."""
    path = Path("/proc/cpuinfo")
    lines: Sequence[str] = path.read_text().splitlines() if path.is_file() else ()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
