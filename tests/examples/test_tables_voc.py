"""The tables of the paper from untrained networks: their steps, their cells, and what is not repeated."""

import json
import shutil
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import ablate_voc
import infer_voc
import pytest
import tables_voc
import torch
from voc.arguments import run_settings
from voc.checkpoints import CheckpointError, load_trained, read_checkpoint, save_checkpoint
from voc.dataset.layout import read_split
from voc.dataset.toy import OBJECTS
from voc.evaluation.metrics import mean_iou
from voc.evaluation.tables import load_iou_csv
from voc.model import build_model
from voc.presets import PRESETS


@pytest.fixture(scope="module")
def run(toy_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as train_voc.py writes it, with networks whose new weights are random."""
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(1)
    settings = replace(PRESETS["toy"], data=toy_root, output=folder, channels=8, epochs=1, crop_size=65, batch_size=4)
    settings = replace(settings, workers=0, device="cpu", min_probability=0.3)
    (folder / "settings.json").write_text(json.dumps(settings.to_json()))
    for model in ("cam", "single_stage"):
        one = replace(settings, model=model)
        save_checkpoint(folder / f"{model}.pt", build_model(one, len(OBJECTS)), one, list(OBJECTS), {})
    (folder / "iou.csv").write_text("class,ours\n" + "".join(f"{name},30\n" for name in ("background", *OBJECTS)))
    return folder


Make = Callable[..., int]


@pytest.fixture
def make(run: Path, toy_root: Path, tmp_path: Path) -> Make:
    def call(table: str, *options: str, data: Path = toy_root) -> int:
        arguments = ["--table", table, "--runs", str(run), "--data", str(data), "--output", str(tmp_path)]
        return tables_voc.main([*arguments, "--device", "cpu", *options])

    return call


def cells(folder: Path, table: str) -> list[list[str]]:
    lines = (folder / f"table_{table}/table.md").read_text().splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_table_5(make: Make, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert make("5", "--no-crf") == 0
    header, _, cam, ours = cells(tmp_path, "5")
    assert header == ["Method", "background", *OBJECTS, "mean"]
    assert (cam[0], ours[0]) == ("CAM-GAP", "ours")
    folder = tmp_path / f"table_5/{run.name}_single_stage/val"
    iou = load_iou_csv(folder / "iou_masks/classes.csv")[1]["IoU"]
    assert ours[-1] == f"{mean_iou(iou):.1f}"

    commands: list[list[str]] = []

    def recorded(command: list[str]) -> int:
        commands.append(command)
        return 0

    monkeypatch.setattr(infer_voc, "main", recorded)
    assert make("5", "--no-crf") == 0
    assert commands == []
    assert make("5", "--no-crf", "--scales", "0.5") == 0  # other arguments: other masks
    assert [command[-2:] for command in commands] == [["--scales", "0.5"]] * 2


def test_table_2(make: Make, tmp_path: Path) -> None:
    assert make("2") == 0
    header, _, *rows = cells(tmp_path, "2")
    assert header == ["Method", "IoU (train, %)", "IoU (val, %)"]
    assert [row[0] for row in rows] == ["CAM-GAP", "CAM-GAP + CRF", "ours", "ours + CRF"]
    assert all(0 <= float(cell) <= 100 for row in rows for cell in row[1:])


def test_the_crf_column_of_an_ablation(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "row")
    (tmp_path / "row/cam.pt").unlink()
    settings = replace(run_settings(run), output=tmp_path / "row")
    iou = ablate_voc.crf_iou(settings)
    assert iou.shape == (6,)
    assert len(list((tmp_path / "row/val/crf").iterdir())) == 4


def test_table_2_keeps_the_classes_of_the_labels(make: Make, run: Path, tmp_path: Path) -> None:
    assert make("2", "--no-crf") == 0
    command = json.loads((tmp_path / f"table_2/{run.name}_cam/train/infer_voc.json").read_text())
    assert "--clean" in command
    assert len(list((tmp_path / f"table_2/{run.name}_cam/train/masks").iterdir())) == 12


def test_table_6(make: Make, run: Path, toy_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "root"
    shutil.copytree(toy_root, root)
    names = read_split(root, "val")
    (root / "ImageSets/Segmentation/val.txt").rename(root / "ImageSets/Segmentation/test.txt")
    shutil.rmtree(root / "SegmentationClass")
    assert make("6", "--no-crf", data=root) == 0
    path = tmp_path / f"table_6/{run.name}_single_stage_masks.tar.gz"
    assert f"for the server, 4 masks: {path}" in capsys.readouterr().out
    with tarfile.open(path) as archive:
        assert archive.getnames() == [f"results/VOC2012/Segmentation/comp6_test_cls/{name}.png" for name in names]


def test_table_8(make: Make, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["8", "--no-crf", "--epochs", "1", "--classification-epochs", "0"]
    assert make(*arguments) == 0
    second = tmp_path / f"table_8/{run.name}_single_stage/second_stage_masks"
    settings = json.loads((second / "settings.json").read_text())
    assert settings["supervision"] == "masks"
    assert settings["channels"] == 8
    assert Path(settings["masks"]).is_dir()
    _, _, first, last = cells(tmp_path, "8")
    assert first == ["one stage", "30.0"]
    assert last[0] == "two stages"
    before = (second / "single_stage.pt").stat().st_mtime_ns
    assert make(*arguments) == 0
    assert (second / "single_stage.pt").stat().st_mtime_ns == before
    assert make(*arguments, "--lr", "1") == 2
    assert f"{second} is of another network or other arguments: give another --output" in capsys.readouterr().err


def test_table_8_is_cleaned_with_the_labels_of_the_run(
    make: Make, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[list[str]] = []

    def interrupted(command: list[str]) -> int:
        commands.append(command)
        return 130

    monkeypatch.setattr(infer_voc, "main", interrupted)
    shutil.copytree(run, tmp_path / "run")
    settings = json.loads((run / "settings.json").read_text())
    (tmp_path / "run/settings.json").write_text(json.dumps({**settings, "labels": "some/labels.txt"}))
    assert make("8", "--runs", str(tmp_path / "run")) == 1
    assert commands[0][-2:] == ["--labels", "some/labels.txt"]
    (tmp_path / "run/iou.csv").write_text("class,CAM-GAP\nbackground,30\n")
    assert make("8", "--runs", str(tmp_path / "run")) == 2  # before any mask is made
    assert len(commands) == 1


@pytest.mark.parametrize("content", ["", "class,ours\nbackground\n", "class,ours\nbackground,none\n"])
def test_a_damaged_table_of_a_run(
    content: str, make: Make, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run/iou.csv").write_text(content)
    assert make("8", "--runs", str(tmp_path / "run")) == 2
    assert f"cannot read {tmp_path}/run/iou.csv: " in capsys.readouterr().err


def test_table_9(make: Make, tmp_path: Path) -> None:
    assert make("9", "--no-crf") == 0
    header, _, row = cells(tmp_path, "9")
    assert header == ["Backbone", "CAM-GAP", "ours"]
    assert row[0] == "efficientnet_lite0"


def test_the_best_checkpoint_is_used_if_it_was_asked_for(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    history = [{"held-out loss": loss} for loss in (0.3, 0.1, 0.2)]

    def save(suffix: str, epochs: int) -> None:
        checkpoint = read_checkpoint(run / "single_stage.pt")
        model, classes, settings = load_trained(run / "single_stage.pt")
        progress = {**checkpoint["progress"], "history": history[:epochs]}
        save_checkpoint(folder / f"single_stage{suffix}.pt", model, settings, classes, progress)

    def used() -> list[str]:
        return [Path(*method.load).name for method in tables_voc.trained_methods(folder)]

    save("", 3)
    save("_best", 2)
    assert used() == ["cam.pt", "single_stage.pt"]
    settings = json.loads((run / "settings.json").read_text())
    (folder / "settings.json").write_text(json.dumps({**settings, "checkpoint": "best"}))
    assert used() == ["cam.pt", "single_stage_best.pt"]
    save("_best", 3)  # of a run that went on and was abandoned
    with pytest.raises(CheckpointError, match="no checkpoint of epoch 2, the best one of this run"):
        used()
    save("_002", 2)
    assert used() == ["cam.pt", "single_stage_002.pt"]


def test_an_unfinished_training_has_no_table(
    make: Make, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run/iou.csv").unlink()
    assert make("5", "--runs", str(tmp_path / "run")) == 2
    assert "is not finished: looked for" in capsys.readouterr().err


def test_masks_are_made_again_by_another_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []

    def recorded(command: list[str]) -> int:
        commands.append(command)
        return 0

    monkeypatch.setattr(infer_voc, "main", recorded)
    checkpoint = tmp_path / "network.pt"
    for content, runs in ((b"first", 1), (b"first", 1), (b"second", 2)):
        checkpoint.write_bytes(content)
        assert tables_voc.segment_once(tmp_path, [str(checkpoint), "--split", "val"]) == tmp_path
        assert len(commands) == runs


def test_a_published_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, toy_root: Path) -> None:
    commands: list[list[str]] = []

    def segmented(command: list[str]) -> int:
        commands.append(command)
        folder = Path(command[command.index("--output") + 1]) / "masks"
        shutil.copytree(toy_root / "SegmentationClass", folder)
        return 0

    monkeypatch.setattr(infer_voc, "main", segmented)
    arguments = ["--table", "5", "--released", "enc.pth", "--backbone", "vgg16", "--data", str(toy_root), "--no-crf"]
    assert tables_voc.main([*arguments, "--output", str(tmp_path), "--pad-to", "768"]) == 0
    assert commands[0][:4] == ["--released", "enc.pth", "--backbone", "vgg16"]
    assert commands[0][-2:] == ["--pad-to", "768"]
    assert cells(tmp_path, "5")[2][-1] == "100.0"


def test_a_failed_step_ends_the_table(
    make: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(_: Any) -> int:
        return 130

    monkeypatch.setattr(infer_voc, "main", interrupted)
    assert make("5", "--no-crf") == 1
    assert capsys.readouterr().err == "tables_voc.py: infer_voc.py ended with exit code 130\n"
    assert not list(tmp_path.rglob("infer_voc.json"))


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (
            ["--table", "5", "--runs", "nowhere"],
            2,
            "no run of train_voc.py in nowhere: looked for nowhere/settings.json",
        ),
        (["--table", "5"], 2, "give --runs, or --released with --backbone"),
        (["--table", "5", "--released", "x"], 2, "--released and --backbone belong together"),
        (["--table", "5", "--runs", "a", "b"], 2, "--table 5 is made from one run, got 2"),
        (["--table", "8", "--released", "x", "--backbone", "vgg16"], 2, "give --runs"),
        (["--table", "7", "--runs", "a"], 2, "--table"),
    ],
)
def test_wrong_arguments(
    arguments: list[str], code: int, message: str, toy_root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        found = tables_voc.main([*arguments, "--data", str(toy_root)])
    except SystemExit as stop:
        found = int(stop.code or 0)
    assert found == code
    assert message in " ".join(capsys.readouterr().err.replace("│", " ").split())
