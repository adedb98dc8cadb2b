"""Options of the benchmarks: without any, every file is a quick test that all competitors compute the same."""

import pytest

from benchmarks.measure import Bench, Mode
from benchmarks.report import write_report

BENCH = pytest.StashKey[Bench]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("benchmarks")
    group.addoption("--benchmark", action="store_true", help="time everything: some ten minutes, on an idle machine")
    group.addoption("--benchmark-quick", action="store_true", help="time small sizes, in less than a minute")


def pytest_configure(config: pytest.Config) -> None:
    full, quick = config.getoption("--benchmark", False), config.getoption("--benchmark-quick", False)
    mode: Mode = "full" if full else "quick" if quick else "smoke"
    config.stash[BENCH] = Bench(mode)


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


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    bench = config.stash[BENCH]
    if bench.rows or bench.notes:
        folder = write_report(bench)
        terminalreporter.write_line(f"benchmark tables and plots: {folder}")
