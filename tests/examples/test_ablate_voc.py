"""The ablation tables: their commands, and what is trained when."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import ablate_voc
import pytest
import torch
from voc.arguments import parse_arguments
from voc.evaluation.tables import save_iou_csv
from voc.settings import Settings


@pytest.mark.parametrize(("table", "rows"), [("1a", 10), ("1b", 6), ("1c", 6), ("7", 3), ("photographs", 17)])
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

    def train(command: list[str]) -> int:
        settings = parse_arguments(command[2:])
        trained.append(settings.output.name)
        settings.output.mkdir(parents=True, exist_ok=True)
        (settings.output / "settings.json").write_text(json.dumps(settings.to_json()))
        if len(trained) == 2:  # the second row is interrupted once, after its settings are written
            return 130
        iou = torch.tensor([50.0, 10.0, 10.0 * settings.pamr_iterations])
        save_iou_csv(settings.output / "iou.csv", ["background", "cat", "dog"], {"ours": iou})
        return 0

    monkeypatch.setattr(ablate_voc, "run_command", train)
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
    capsys.readouterr()
    for wrong, message in (
        (["--epochs", "99"], "5_iterations has --epochs 6, not 99: give another --output"),
        (["--table-classes", "cta"], "--table-classes: unknown class 'cta'"),
    ):
        assert ablate_voc.main([*arguments, *wrong]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("ablate_voc.py: error: ")
        assert message in line
    (tmp_path / "table_7/10_iterations/settings.json").write_text("{")
    assert ablate_voc.main(arguments) == 2
    assert "ablate_voc.py: error: cannot read settings" in capsys.readouterr().err
    assert len(trained) == 4


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no process groups")
def test_ctrl_c_waits_until_the_training_has_saved_its_state(tmp_path: Path) -> None:
    training = """import signal, sys, time
from pathlib import Path
signal.signal(signal.SIGINT, lambda *_: (time.sleep(1), Path(sys.argv[1]).touch(), sys.exit(130)))
Path(sys.argv[1] + ".ready").touch()
signal.pause()"""
    saved, ready = tmp_path / "saved", tmp_path / "saved.ready"
    command = [sys.executable, "-c", training, str(saved)]
    # Ctrl-C acts as usual, also if pytest runs in the background and ignores it.
    code = f"""import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.path.insert(0, {str(Path(ablate_voc.__file__).parent)!r})
import ablate_voc
sys.exit(ablate_voc.run_command({command!r}))"""
    with subprocess.Popen([sys.executable, "-c", code], start_new_session=True) as process:
        while not ready.exists() and process.poll() is None:
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGINT)
    assert process.returncode == 130
    assert saved.exists()


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


def test_rows_of_another_network_end_before_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/settings.json").write_text("{}")
    table = ["--table", "7", "--output", str(tmp_path)]
    assert ablate_voc.main([*table, "--resume", str(tmp_path / "run")]) == 2
    assert capsys.readouterr().err.startswith("ablate_voc.py: error: --resume is not for this command")
    assert ablate_voc.main([*table, "--model", "cam"]) == 2
    assert capsys.readouterr().err.startswith("ablate_voc.py: error: --model cam: ")
