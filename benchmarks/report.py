"""Tables and plots of what the benchmarks measured."""

import csv
import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import NamedTuple

import torch
from matplotlib.figure import Figure

from benchmarks.measure import KEEP_MEMORY, Bench, Row, copy_bandwidth, propagation_bytes
from benchmarks.processor import clock, cpu_model, loads_per_cycle, register_bytes

RESULTS = Path(__file__).resolve().parent / "results"
README = RESULTS.parents[1] / "README.md"
README_START, README_END = "<!-- speed: benchmarks/report.py writes this part -->", "<!-- end of speed -->"
README_TITLES = ("PAMR", "PAR", "pseudo labels")
COLUMNS = ("median_ms", "min_ms", "max_ms", "calls")
AXES = ("side", "classes", "dilations", "iterations")
# They limit the instructions of PyTorch, of this library and of oneDNN, which has PyTorch's convolutions.
LIMITS = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA")


def write_report(bench: Bench) -> Path:
    """Write `<device>.md`, `.csv` and `.png`, and return their folder: one of its own unless the run is complete."""
    folder = RESULTS if bench.is_complete else RESULTS / "quick"
    folder.mkdir(parents=True, exist_ok=True)
    name = bench.device.type
    bandwidth = copy_bandwidth(bench.device)
    (folder / f"{name}.md").write_text(markdown(bench, bandwidth))
    with (folder / f"{name}.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(
            ["title", "size", "competitor", *COLUMNS, *(f"kept_{name}" for name in COLUMNS), "bound_ms", "memory_mib"]
        )
        for row in bench.rows:
            bound = "" if row.bound is None else f"{1e3 * row.bound:.4f}"
            memory = "" if row.memory_mib is None else str(row.memory_mib)  # the README rounds it
            writer.writerow([*row.key, *summary(row.seconds), *summary(row.kept), bound, memory])
    plot(bench, bandwidth).savefig(folder / f"{name}.png", dpi=100)
    if bench.is_complete and name == "cpu":
        update_readme()
    return folder


def read_csv(file: Path) -> list[Row]:
    """Return the rows that were written, each with three times: the median, the fastest and the slowest."""

    def times(entries: dict[str, str], prefix: str) -> tuple[float, ...]:
        values = [entries.get(f"{prefix}{name}_ms") for name in ("median", "min", "max")]
        return tuple(float(value) / 1e3 for value in values if value)

    rows = []
    with file.open(newline="") as lines:
        for entries in csv.DictReader(lines):
            memory = float(entries["memory_mib"]) if entries["memory_mib"] else None
            title, size, competitor = entries["title"], entries["size"], entries["competitor"]
            rows.append(Row(title, size, competitor, times(entries, ""), memory, {}, kept=times(entries, "kept_")))
    return rows


def update_readme() -> None:
    """Write the table of the README anew, from the results."""
    text = README.read_text()
    before, rest = text.split(README_START)
    after = rest.split(README_END)[1]
    table = readme_text(read_csv(RESULTS / "cpu.csv"))
    README.write_text(f"{before}{README_START}\n\n{table}\n\n{README_END}{after}")


def readme_text(rows: Sequence[Row]) -> str:
    """Return the ratios in one paragraph, and the table: ours, the published and the fastest compiled form."""
    shown = [row for row in rows if row.title in README_TITLES]
    groups = [
        [row for row in shown if (row.title, row.size) == key]
        for key in dict.fromkeys((row.title, row.size) for row in shown)
    ]
    columns = Columns(has_kept=any(row.kept for row in shown), has_bound=False)
    header, line, *_ = columns.header()
    lines = [header.replace("| size |", "| layer, batch x classes x height x width |"), line]
    for group in groups:
        compiled = fastest_compiled(group)
        for row in group:
            if row is compiled or not row.competitor.endswith(", compiled"):
                lines.append(columns.line(replace(row, size=f"{row.title} {row.size}"), group[0]))
    pairs = {
        title: [(row, group[0]) for group in groups for row in group if row.title == title] for title in README_TITLES
    }
    sentences = []
    for title in README_TITLES:
        published = [(row, ours) for row, ours in pairs[title] if row.competitor == "published"]
        if published:
            sentences.append(f"The published form of {title} takes {ratios(published)} times as long as ours.")
    steps = [row for row in rows if row.title.startswith("training step")]
    step_pairs = [(peer, row) for row in steps if row.competitor == "ours" and (peer := fastest_published(row, steps))]
    if step_pairs:
        sentences.append(f"A training step of the published network takes {ratios(step_pairs)} times\nas long as ours.")
    compiled_pairs = [(peer, group[0]) for group in groups if (peer := fastest_compiled(group))]
    if compiled_pairs:
        sentences.append(
            f"The fastest form of PAMR that `torch.compile` makes takes {ratios(compiled_pairs)} times"
            "\nas long as ours."
        )
    if columns.has_kept:
        sentences.append(
            'In the columns "memory kept", the process keeps freed memory for later calls. In the columns "default",'
            "\nthe C library returns it to the system. With 21 classes, the published PAMR and PAR then spend most of"
            "\ntheir time on memory that is returned and requested again."
        )
    else:
        sentences.append(
            "These times are with the default allocator of the C library. In a process that keeps its memory, the"
            "\nratio of the published form can be much smaller."
        )
    return "\n".join([*sentences, "", *lines])


def fastest_compiled(competitors: Sequence[Row]) -> Row | None:
    """Return the fastest compiled row of a size."""
    return fastest([row for row in competitors if row.competitor.endswith(", compiled")])


def fastest_published(ours: Row, rows: Sequence[Row]) -> Row | None:
    """Return the fastest published row of the title and size of ours."""
    same_size = [row for row in rows if (row.title, row.size) == (ours.title, ours.size)]
    return fastest([row for row in same_size if row.competitor.startswith("published")])


def fastest(rows: Sequence[Row]) -> Row | None:
    """Return the fastest row, by the times with memory kept where there are any."""
    return min(rows, key=lambda row: row.kept_median or row.median, default=None)


def ratios(pairs: Sequence[tuple[Row, Row]]) -> str:
    """Return the range of the ratios of pairs (peer, ours), those with memory kept first."""
    kept = [peer.kept_median / ours.kept_median for peer, ours in pairs if peer.kept_median and ours.kept_median]
    default = [peer.median / ours.median for peer, ours in pairs]
    texts = [span(values) for values in (kept, default) if values]
    return f"{texts[0]} (with the default allocator {texts[1]})" if kept else texts[0]


def span(values: Sequence[float]) -> str:
    """Return the lowest and the highest value, or the only one."""
    return f"{min(values):.3g}" + (f" to {max(values):.3g}" if len(values) > 1 else "")


def summary(seconds: Sequence[float]) -> list[str]:
    """Return the entries of the columns `COLUMNS`, empty if nothing was measured."""
    if not seconds:
        return [""] * len(COLUMNS)
    milliseconds = (statistics.median(seconds), min(seconds), max(seconds))
    return [*(f"{1e3 * x:.4f}" for x in milliseconds), str(len(seconds))]


def markdown(bench: Bench, bandwidth: float) -> str:
    """Return the tables: the median time of each competitor, its spread, and its ratio to ours."""
    limits = [f"{name}={os.environ[name]} " for name in LIMITS if name in os.environ]
    command = f"{''.join(limits)}pytest benchmarks/ {'--benchmark' if bench.mode == 'full' else '--benchmark-quick'}"
    has_kept = any(row.kept for row in bench.rows)
    lines = [
        f"# Benchmarks on {device_name(bench.device)}",
        "",
        f"`{command}`, {date.today()}; a copy moves {bandwidth / 1e9:.0f} GB/s.",
        f"{versions(bench.device)}.",
        "",
        "Medians of calls in turn, in one process; in brackets the fastest and the slowest.",
        "Ratios are to the first line of the same size.",
    ]
    if has_kept:
        lines += [
            "",
            '"Memory kept": the process keeps the memory that is freed, by these variables of the C library:',
            f"{', '.join(f'`{name}`' for name in KEEP_MEMORY)}.",
            '"Default": the C library returns large blocks to the system, which fills each new block with zeros.',
            "Formulations with large intermediate tensors spend much of their time there.",
        ]
    if any(row.bound for row in bench.rows):
        lines += ["", bound_text(bench.device)]
    for title in dict.fromkeys(row.title for row in bench.rows):
        rows = [row for row in bench.rows if row.title == title]
        columns = Columns(has_kept, any(row.bound for row in rows))
        lines += ["", f"## {title}", "", *columns.header()]
        for size in dict.fromkeys(row.size for row in rows):
            same_size = [row for row in rows if row.size == size]
            lines += [columns.line(row, same_size[0]) for row in same_size]
    if bench.notes:
        lines += ["", "## Memory and first use", "", "\n\n".join(bench.notes)]
    return "\n".join(lines) + "\n"


class Columns(NamedTuple):
    """The columns of a table: with or without the times with memory kept, and the fraction of the bound."""

    has_kept: bool
    has_bound: bool

    def header(self) -> list[str]:
        """Return the first two lines of the table."""
        names = ["size", ""]
        names += ["memory kept: ms", "ratio", "default: ms", "ratio"] if self.has_kept else ["ms", "ratio"]
        names += ["of the bound"] if self.has_bound else []
        names += ["peak MiB"]
        return [table_line(names), table_line([":--", ":--", *["--:"] * (len(names) - 2)]).replace(" ", "")]

    def line(self, row: Row, first: Row) -> str:
        """Return the line of a competitor; `first` is ours at the same size."""
        cells = [row.size, row.competitor]
        if self.has_kept:
            kept, first_kept = row.kept_median, first.kept_median
            cells += [spread(row.kept), "" if kept is None or first_kept is None else f"{kept / first_kept:.3g}"]
        cells += [spread(row.seconds), f"{row.median / first.median:.3g}"]
        if self.has_bound:
            fastest = min(row.median, row.kept_median or row.median)
            cells += ["" if row.bound is None else f"{100 * row.bound / fastest:.0f} %"]
        cells += ["" if row.memory_mib is None else f"{row.memory_mib:.0f}"]
        return table_line(cells)


def table_line(cells: Sequence[str]) -> str:
    """Return a line of a table."""
    return "| " + " | ".join(cells) + " |"


def spread(seconds: Sequence[float]) -> str:
    """Return the median, fastest and slowest time in milliseconds."""
    if not seconds:
        return ""
    milliseconds = [f"{1e3 * x:.4g}" for x in (statistics.median(seconds), min(seconds), max(seconds))]
    return "{} ({} to {})".format(*milliseconds)


def versions(device: torch.device) -> str:
    """Return the versions and the number of threads that the times depend on."""
    parts = [f"PyTorch {torch.__version__}", f"Python {platform.python_version()}", " ".join(platform.libc_ver())]
    if device.type == "cpu":
        parts += [torch.backends.cpu.get_cpu_capability(), f"{torch.get_num_threads()} threads"]
        parts += [f"{hertz / 1e9:.2f} GHz measured"] if (hertz := clock()) else []
    return ", ".join(part for part in parts if part)


def bound_text(device: torch.device) -> str:
    """Return what the bound is."""
    if device.type == "cuda":
        return (
            '"Of the bound": the time that moving the weights and twice the masks in float32 takes at the speed of a\n'
            "copy, as a fraction of the measured time."
        )
    return (
        '"Of the bound": the time that the load ports need for the propagation, as a fraction of the measured time.\n'
        "In each iteration each pixel reads 48 x (classes + 1) values.\n"
        f"A load of {register_bytes()} bytes reads them for {register_bytes() // 4} pixels;"
        f" each thread can make {loads_per_cycle()} per cycle, as measured."
    )


def plot(bench: Bench, bandwidth: float) -> Figure:
    """Draw the time of PAMR over each axis of its size, and the time that moving affinity and masks takes alone."""
    figure = Figure(figsize=(14, 3.6), layout="constrained")
    for axis, axes in zip(AXES, figure.subplots(1, len(AXES)), strict=True):
        rows = [row for row in bench.rows if row.title == f"PAMR over {axis}"]
        for competitor in dict.fromkeys(row.competitor for row in rows):
            own = [row for row in rows if row.competitor == competitor]
            times = [1e3 * (row.kept_median or row.median) for row in own]
            axes.loglog([row.values[axis] for row in own], times, "o-", label=competitor)
        values = {row.values[axis]: row.values for row in rows}  # by the value of the axis
        steps = sorted(values)
        if steps:
            limits = [1e3 * least_bytes(values[step]) / bandwidth for step in steps]
            axes.loglog(steps, limits, "k--", linewidth=1, label="memory alone")
        axes.set(xlabel=axis, ylabel="ms")
        axes.set_xticks(steps, [f"{step:g}" for step in steps], minor=False)
        axes.set_xticks([], minor=True)
        axes.grid(alpha=0.3, which="both")
        if rows:
            axes.legend(fontsize=8)
    return figure


def least_bytes(values: Mapping[str, float]) -> float:
    """Return the bytes that must move at a point of the plot."""
    side, classes, dilations, iterations = (int(values[axis]) for axis in AXES)
    return propagation_bytes((1, classes, side, side), 8 * dilations, iterations)


def device_name(device: torch.device) -> str:
    """Return the name of the GPU, or of the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name()
    return cpu_model()
