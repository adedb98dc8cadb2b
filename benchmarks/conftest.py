"""Options of the benchmarks. Without any, each file only checks that all competitors compute the same."""

import getpass
import json
import os
import platform
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.measure import KEEP_MEMORY, Bench, Mode
from benchmarks.report import write_report

BENCH = pytest.StashKey[Bench]()
DESELECTED = pytest.StashKey[bool]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("benchmarks")
    group.addoption("--benchmark", action="store_true", help="time everything: 15 minutes on an idle machine")
    group.addoption("--benchmark-quick", action="store_true", help="time small sizes, in about a minute")
    group.addoption("--benchmark-kept", metavar="FILE", help="used by the two above: write times to FILE, no report")


def pytest_configure(config: pytest.Config) -> None:
    full, quick = config.getoption("--benchmark", False), config.getoption("--benchmark-quick", False)
    if (full or quick) and config.getoption("numprocesses", None):
        raise pytest.UsageError("benchmarks run alone, one after the other: leave out -n")
    if capability := os.environ.get("ATEN_CPU_CAPABILITY"):
        # The cache of `torch.compile` does not distinguish instruction sets. With PyTorch 2.13, code that was compiled
        # for another set returned NaN.
        folder = Path(tempfile.gettempdir(), f"torchinductor_{getpass.getuser()}_{capability}")
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder))
    mode: Mode = "full" if full else "quick" if quick else "smoke"
    config.stash[BENCH] = Bench(mode, keeps_memory=bool(config.getoption("--benchmark-kept", None)))


def pytest_deselected(items: list[pytest.Item]) -> None:
    """Remember that tests were left out, as by `-k`, `-m` or `--deselect`."""
    if items:
        items[0].config.stash[DESELECTED] = True


@pytest.fixture
def bench(request: pytest.FixtureRequest) -> Bench:
    """Times competitors side by side, or only compares them, as the options say."""
    bench = request.config.stash[BENCH]
    capture = request.config.pluginmanager.getplugin("capturemanager")

    def say(line: str) -> None:
        with capture.global_and_fixture_disabled():
            print(f"\n{line}", end="", flush=True)

    bench.say = say
    return bench


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Run the same benchmarks in a process that keeps its memory, and add its times to the rows."""
    bench, file = session.config.stash[BENCH], session.config.getoption("--benchmark-kept", None)
    if file:
        Path(file).write_text(json.dumps([(row.key, row.seconds) for row in bench.rows]))
    elif exitstatus == 0 and bench.rows and bench.device.type == "cpu" and platform.libc_ver()[0] == "glibc":
        tests = [item.nodeid for item in session.items if "bench" in getattr(item, "fixturenames", ())]
        option = "--benchmark" if bench.mode == "full" else "--benchmark-quick"
        with tempfile.TemporaryDirectory() as folder:
            result = Path(folder, "rows.json")
            command = [sys.executable, "-m", "pytest", "-q", option, f"--benchmark-kept={result}", *tests]
            child = subprocess.run(command, cwd=session.config.rootpath, env={**os.environ, **KEEP_MEMORY})
            if child.returncode == 0:
                kept = {tuple(key): tuple(seconds) for key, seconds in json.loads(result.read_text())}
                bench.rows = [replace(row, kept=kept.get(row.key, ())) for row in bench.rows]
            else:
                session.exitstatus = child.returncode
    bench.is_complete = bench.mode == "full" and session.exitstatus == 0 and is_whole(session)


def is_whole(session: pytest.Session) -> bool:
    """Return whether all benchmarks were collected."""
    files = {item.path for item in session.items}
    selects = session.config.stash.get(DESELECTED, False) or any("::" in argument for argument in session.config.args)
    return not selects and files >= set(Path(__file__).parent.glob("test_*.py"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    bench = config.stash[BENCH]
    if (bench.rows or bench.notes) and not bench.keeps_memory:
        folder = write_report(bench)
        terminalreporter.write_line(f"benchmark tables and plots: {folder}")
