"""The ablation on VOC animals: its rows, its table, and a small run of all of it."""

import shlex
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from ablate_voc import INGREDIENTS
from voc.arguments import parse_arguments, run_settings

from benchmarks import voc_ablation
from benchmarks.voc_ablation import Ablation
from benchmarks.voc_protocol import Choice, Cut
from benchmarks.voc_runs import Measured


def measured(own: Sequence[float], given: Sequence[float]) -> Measured:
    """Return results whose classes have these IoU."""
    choice = Choice(Cut(2.0, 0.3), {}, {})
    iou = {
        "own": {"raw": torch.tensor(own, dtype=torch.float64)},
        "given": {"raw": torch.tensor(given, dtype=torch.float64)},
    }
    return Measured({"own": choice, "given": choice}, iou, 1800.0, 900.0, "a machine")  # type: ignore[arg-type]


def test_every_row_differs_from_the_preset_in_what_is_trained() -> None:
    settings = {
        name: parse_arguments(["--preset", "photographs", *method.arguments])
        for name, method in voc_ablation.chosen_rows(Ablation()).items()
    }
    assert list(settings) == list(INGREDIENTS)
    assert len(set(map(repr, settings.values()))) == len(INGREDIENTS)
    assert not any(one.baseline for one in settings.values())


def test_the_table_has_the_difference_from_the_preset() -> None:
    results = {
        "the preset": [measured([60, 62, 0], [70, 71, 0]), measured([64, 66, 0], [70, 71, 0])],
        "no PAMR": [measured([50, 54, 0], [70.5, 71.5, 0]), measured([54, 60, 0], [70.5, 71.5, 0])],
    }
    assert voc_ablation.PRESET == "the preset"
    table = voc_ablation.ablation_table(Ablation(), [0, 1], results)
    assert table.splitlines() == [
        "| configuration | classes chosen by the network, raw | image labels given, raw |",
        "|:--|--:|--:|",
        "| the preset | 63.0 ± 2.8 | 70.5 ± 0.0 |",
        "| no PAMR | 54.5 ± 3.5 (-8.5) | 71.0 ± 0.0 (+0.5) |",
    ]
    assert voc_ablation.missing_rows(results).count(";") == len(INGREDIENTS) - len(results) - 1
    assert voc_ablation.missing_rows({name: [] for name in INGREDIENTS}) == ""


def test_the_whole_ablation(tmp_path: Path) -> None:
    arguments = shlex.split(
        "--smoke --seeds 3 --device cpu --workers 0 --epochs 1 --classification-epochs 0 --scales 1 --refine none"
    )
    arguments += ["--rows", "no PAMR", "--output", str(tmp_path)]
    assert voc_ablation.main(arguments) == 0
    text = (tmp_path / "voc_ablation.md").read_text()
    command = text.split("\n\n")[1].replace("\\\n", " ")
    assert shlex.split(command) == ["python", "benchmarks/voc_ablation.py", *arguments]
    for expected in (
        "# VOC animals: ingredients, seed 3",
        "2 validation images.",
        "8 images of the split `train`",
        "| no PAMR | `--pamr-iterations 0` |",
        "Not in the table: backbone trained in classification; ",
    ):
        assert expected in text
    assert max(len(line) for line in text.splitlines() if str(tmp_path) not in line) <= 120
    iterations = [run_settings(tmp_path / folder).pamr_iterations for folder in ("the_preset_3", "no_pamr_3")]
    assert iterations == [10, 0]


def test_an_unknown_row_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert voc_ablation.main(["--smoke", "--output", str(tmp_path), "--rows", "no PAMR", "no gate"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("voc_ablation.py: error: --rows has no row 'no gate'; there are 'the preset', ")
    assert len(error.splitlines()) == 1
