"""The ablation tables: their commands, and what is trained when."""

import shlex
import subprocess
from pathlib import Path

import ablate_voc
import pytest
import torch
from voc.arguments import parse_arguments
from voc.evaluation.tables import save_iou_csv
from voc.settings import Settings


@pytest.mark.parametrize(("table", "rows"), [("1a", 10), ("1b", 6), ("1c", 6), ("7", 3), ("photographs", 16)])
def test_every_row_is_a_command_that_train_voc_takes(
    table: str, rows: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--table", table, "--output", str(tmp_path), "--epochs", "7", "--dry-run"]
    assert ablate_voc.main(arguments) == 0
    commands = [shlex.split(line) for line in capsys.readouterr().out.splitlines()]
    settings = [parse_arguments(command[2:]) for command in commands]
    assert len(set(settings)) == len({one.output for one in settings}) == rows
    assert all(one.epochs == 7 and not one.baseline for one in settings)
    assert not list(tmp_path.iterdir())


def test_the_rows_of_the_gate() -> None:
    rows = {name: parse_arguments(arguments) for name, arguments in ablate_voc.TABLES["1c"].items()}
    found = {name: (row.mixing_rate, row.gci, row.gate) for name, row in rows.items()}
    assert found == {
        "psi = 0.5": (0.5, True, "stochastic"),
        "psi = 0.5, no GCI": (0.5, False, "stochastic"),
        "psi = 0.3": (0.3, True, "stochastic"),
        "psi = 0.3, no GCI": (0.3, False, "stochastic"),
        "no gate": (0.0, True, "stochastic"),
        "deterministic gate": (0.5, True, "deterministic"),
    }


def test_a_table_is_filled_row_by_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trained: list[str] = []

    def train(command: list[str], check: bool) -> subprocess.CompletedProcess[str]:
        assert not check
        settings = parse_arguments(command[2:])
        trained.append(settings.output.name)
        if len(trained) == 2:  # the second row is interrupted once, after its settings are written
            settings.output.mkdir(parents=True)
            (settings.output / "settings.json").write_text("{}")
            return subprocess.CompletedProcess(command, 130)
        settings.output.mkdir(parents=True, exist_ok=True)
        iou = torch.tensor([50.0, 10.0, 10.0 * settings.pamr_iterations])
        save_iou_csv(settings.output / "iou.csv", ["background", "cat", "dog"], {"ours": iou})
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", train)
    arguments = ["--table", "7", "--output", str(tmp_path)]
    assert ablate_voc.main(arguments) == 130
    assert "10 iterations ended with exit code 130" in capsys.readouterr().err
    assert ablate_voc.main(arguments) == 0
    assert trained == ["5_iterations", "10_iterations", "10_iterations", "15_iterations"]
    table = (tmp_path / "table_7/table.md").read_text()
    assert table in capsys.readouterr().out
    assert table.splitlines()[2:] == ["| 5 iterations | 36.7 |", "| 10 iterations | 53.3 |", "| 15 iterations | 70.0 |"]
    assert ablate_voc.main([*arguments, "--table-classes", "background", "dog"]) == 0
    assert "| 5 iterations | 50.0 |" in (tmp_path / "table_7/table.md").read_text()
    assert len(trained) == 4


def test_a_column_with_the_crf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("5_iterations", "10_iterations", "15_iterations"):
        (tmp_path / f"table_7/{name}").mkdir(parents=True)
        save_iou_csv(tmp_path / f"table_7/{name}/iou.csv", ["background", "cat"], {"ours": torch.tensor([40.0, 20.0])})
    rows = []

    def crf_iou(settings: Settings) -> torch.Tensor:
        rows.append(settings.pamr_iterations)
        return torch.tensor([50.0, 4.0 * settings.pamr_iterations])

    monkeypatch.setattr(ablate_voc, "crf_iou", crf_iou)
    assert ablate_voc.main(["--table", "7", "--output", str(tmp_path), "--crf"]) == 0
    assert rows == [5, 10, 15]
    assert (tmp_path / "table_7/table.md").read_text().splitlines() == [
        "| configuration | mean IoU, % | mean IoU (+ CRF), % |",
        "|:--|--:|--:|",
        "| 5 iterations | 30.0 | 35.0 |",
        "| 10 iterations | 30.0 | 45.0 |",
        "| 15 iterations | 30.0 | 55.0 |",
    ]


def test_a_wrong_argument_ends_before_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        ablate_voc.main(["--table", "7", "--output", str(tmp_path), "--epochs", "none"])
    assert stop.value.code == 2
    assert "--epochs" in capsys.readouterr().err
