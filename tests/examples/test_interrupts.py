"""Ctrl-C ends every command in one line."""

from types import ModuleType
from typing import Any

import ablate_voc
import evaluate_voc
import infer_voc
import prepare_sbd
import pytest
import tables_voc


@pytest.mark.parametrize(
    ("script", "step", "arguments"),
    [
        (ablate_voc, "fill_table", ["--table", "7"]),
        (evaluate_voc, "read_classes", ["masks", "data"]),
        (infer_voc, "load_trained", ["network.pt", "photos"]),
        (prepare_sbd, "find_sets", ["voc", "sbd", "--output", "out"]),
        (tables_voc, "table_5", ["--table", "5", "--runs", "run", "--data", "data"]),
    ],
)
def test_ctrl_c(
    script: ModuleType,
    step: str,
    arguments: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(script, step, interrupted)
    assert script.main(arguments) == 130
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "stopped" in line
