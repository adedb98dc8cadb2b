"""The command that trains and measures the rows of a table, and the parts that all pages of results have."""

import re
import shlex
import statistics
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import tyro
from voc.dataset.layout import TRAINING_SPLITS, read_split
from voc.evaluation.tables import markdown
from voc.files.whole import write_text_whole

from benchmarks.voc_runs import Method, Results, Runs, RunsT, Unfinished, prepare, run_one

TITLES = {"raw": "raw", "pamr": "+ PAMR", "par": "+ PAR", "crf": "+ CRF"}
PROTOCOL_TITLES = {"own": "classes chosen by the network", "given": "image labels given"}


def make_page(
    program: str,
    description: str | None,
    kind: type[RunsT],
    choose_rows: Callable[[RunsT], Mapping[str, Method]],
    write: Callable[[RunsT, Path, str, Results], str],
    argv: Sequence[str] | None,
) -> int:
    """Train and measure what is missing, then write the page. Returns the exit code.

    Args:
        program: the file name of the benchmark.
        description: the text of its help.
        kind: its arguments after VOC_ROOT.
        choose_rows: returns the rows of the table.
        write: returns the text of the page, from the arguments, the root of the data, the command as a block of
            code, and the results.
        argv: the command line, default `sys.argv[1:]`.
    """
    given = list(sys.argv[1:] if argv is None else argv)
    root = Path(given.pop(0)) if given and not given[0].startswith("-") else None
    runs, others = tyro.cli(kind, args=given, description=description, return_unknown_args=True)
    try:
        rows = choose_rows(runs)
        if not runs.seeds:
            raise ValueError("--seeds needs at least one value")
        runs, data, others = prepare(runs, root, others, rows.values())
        results = {
            name: [run_one(runs, data, name, method, seed, others) for seed in runs.seeds]
            for name, method in rows.items()
        }
        named = [re.sub(rf"(^|=){re.escape(str(data))}(?=/|$)", r"\1VOC_ROOT", one) for one in given]
        words = ["python", f"benchmarks/{program}", *([] if runs.smoke else ["VOC_ROOT"]), *named]
        text = write(runs, data, code_block(words), results)
        runs.page.parent.mkdir(parents=True, exist_ok=True)
        write_text_whole(runs.page, text)
    except Unfinished as stop:
        return stop.code
    except (ValueError, OSError) as error:
        print(f"{program}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped; repeat the command to continue", file=sys.stderr)
        return 130
    print(f"\n{text}\n{runs.page}")
    return 0


def code_block(words: Sequence[str]) -> str:
    """Return a command as an indented block of Markdown; a word does not break."""
    lines = [""]
    for word in map(shlex.quote, words):
        if len(lines[-1]) + len(word) > 105:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return textwrap.indent(" \\\n  ".join(lines), "    ")


def places(results: Results) -> str:
    """Return a list of the days, machines and versions of all runs."""
    found = sorted({one.where for measured in results.values() for one in measured})
    return "\n".join(textwrap.fill(f"- {place}", 120, subsequent_indent="  ") for place in found)


def trained_on(data: Path) -> str:
    """Return a sentence about the images of the trainings."""
    return f"Every network is trained on {len(read_split(data, *TRAINING_SPLITS)):,} images."


def about_the_data(runs: Runs) -> str:
    """Return a sentence about what the numbers are not."""
    if runs.smoke:
        return "This is a test run on drawn images: the numbers mean nothing."
    return "The data are a subset of Pascal VOC 2012 at reduced size: this mean is not VOC's."


def numbers(values: Sequence[float]) -> str:
    """Return numbers as they are printed in the page."""
    return ", ".join(f"{value:g}" for value in values)


def spread(values: Sequence[float], digits: int) -> str:
    """Return the mean and the sample standard deviation; one value has none."""
    mean = f"{statistics.fmean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def choice_table(runs: Runs, results: Results) -> str:
    """Return what was chosen for every row: the background, and for PAMR and PAR iterations x the largest dilation."""
    columns = runs.columns
    lines = [["network", "seed", "classes", "lowest probability", "raw", *(TITLES[column] for column in columns)]]
    for row, measured in results.items():
        for seed, run in zip(runs.seeds, measured, strict=True):
            for protocol, (cut, refinements, backgrounds) in run.choices.items():
                lowest = f"{cut.min_probability:g}" if protocol == "own" else ""
                cells = [f"{cut.background:g}"]
                for column in columns:
                    cell = f"{backgrounds[column]:g}"
                    if column != "crf":
                        cell += f"; {refinements[column].num_iter} x {max(refinements[column].dilations)}"
                    cells.append(cell)
                lines.append([row, str(seed), protocol, lowest, *cells])
    return markdown(lines)
