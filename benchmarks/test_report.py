"""The tables: both allocators, ratios to ours, and the fraction of the bound."""

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import processor, report
from benchmarks.measure import Bench, Row
from benchmarks.report import markdown, readme_text, write_report

OURS = Row("PAMR", "1x2x8x8", "ours", (0.002, 0.001, 0.003), 4.0, {}, bound=0.0005, kept=(0.001, 0.002, 0.004))
PEER = Row("PAMR", "1x2x8x8", "published", (0.2, 0.1, 0.3), 40.0, {}, kept=(0.05, 0.04, 0.06))


def table(*rows: Row) -> list[str]:
    """Return the lines of the table of a report."""
    return [line for line in markdown(Bench("full", rows=list(rows)), 1e9).splitlines() if line.startswith("|")]


def test_both_allocators() -> None:
    header, _, ours, peer = table(OURS, PEER)
    assert header == "| size |  | memory kept: ms | ratio | default: ms | ratio | of the bound | peak MiB |"
    assert ours == "| 1x2x8x8 | ours | 2 (1 to 4) | 1 | 2 (1 to 3) | 1 | 25 % | 4 |"
    assert peer == "| 1x2x8x8 | published | 50 (40 to 60) | 25 | 200 (100 to 300) | 100 |  | 40 |"


def test_the_command_has_the_limits_of_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in report.LIMITS:
        monkeypatch.delenv(name, raising=False)
    assert "`pytest benchmarks/ --benchmark`" in markdown(Bench("full", rows=[OURS]), 1e9)
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "avx2")
    assert "`ATEN_CPU_CAPABILITY=avx2 pytest benchmarks/ --benchmark`" in markdown(Bench("full", rows=[OURS]), 1e9)


def test_one_allocator() -> None:
    header, _, ours = table(Row("nGWP", "1x2", "ours", (0.002,), None, {}))
    assert header == "| size |  | ms | ratio | peak MiB |"
    assert ours == "| 1x2 | ours | 2 (2 to 2) | 1 |  |"


def test_readme_leads_with_the_ratio_of_kept_memory() -> None:
    labels = replace(OURS, title="pseudo labels"), replace(PEER, title="pseudo labels")
    first, second, *_ = readme_text([OURS, PEER, *labels]).splitlines()
    assert first == "The published form of PAMR takes 25 (with the default allocator 100) times as long as ours."
    assert second.startswith("The published form of pseudo labels takes 25 ")


def test_readme_compares_training_steps_with_the_faster_published_one() -> None:
    title = "training step, resnet50"
    layouts = [
        replace(PEER, title=title, competitor="published, contiguous", kept=(0.003,), seconds=(0.009,)),
        replace(PEER, title=title, competitor="published, channels-last", kept=(0.0025,), seconds=(0.006,)),
    ]
    text = readme_text([OURS, PEER, replace(OURS, title=title), *layouts])
    ratios = "1.25 (with the default allocator 3)"
    assert f"A training step of the published network takes {ratios} times as long as ours." in text.replace("\n", " ")


def test_a_part_of_the_benchmarks_does_not_replace_the_results(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    monkeypatch.setattr(report, "README", tmp_path / "README.md")
    part = [replace(OURS, title="pseudo labels"), replace(PEER, title="pseudo labels")]
    assert write_report(Bench("full", rows=part)) == tmp_path / "quick"
    assert "| 1x2x8x8 | published | 50 (40 to 60) | 25 |" in (tmp_path / "quick" / "cpu.md").read_text()
    assert not (tmp_path / "README.md").exists()


def test_a_complete_run_replaces_the_results(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    monkeypatch.setattr(report, "README", tmp_path / "README.md")
    (tmp_path / "README.md").write_text(f"before\n{report.README_START}\nold\n{report.README_END}\nafter\n")
    assert write_report(Bench("full", rows=[OURS, PEER], is_complete=True)) == tmp_path
    readme = (tmp_path / "README.md").read_text()
    assert "The published form of PAMR takes 25" in readme
    assert "old" not in readme


def test_clock_and_loads() -> None:
    loads, cycles_per_second = processor.loads_per_cycle(), processor.clock()
    assert (loads is None) == (cycles_per_second is None)
    assert loads is None or loads in range(1, 9)


def test_nothing_is_measured_without_a_compiler_that_works(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "false")
    monkeypatch.setattr(processor.platform, "machine", lambda: "x86_64")
    assert processor.instructions_per_second("nop") is None


def test_load_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processor, "clock", lambda: 2e9)
    monkeypatch.setattr(processor, "loads_per_cycle", lambda: 2)
    monkeypatch.setattr(processor, "register_bytes", lambda: 32)
    monkeypatch.setattr(processor.torch, "get_num_threads", lambda: 2)
    # 3 rows of 2 registers, 8 neighbours, 1 channel and the weights, 10 iterations; 2 loads per cycle, 2 threads
    assert processor.load_bound((1, 1, 3, 9), 8, 10) == pytest.approx(3 * 2 * 8 * 2 * 10 / 2 / 2e9 / 2)
    monkeypatch.setattr(processor, "clock", lambda: None)
    assert processor.load_bound((1, 1, 3, 9), 8, 10) is None
