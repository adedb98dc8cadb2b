"""The whole job in small, and what its command line does when something is not there."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from train_voc import main, parse_arguments
from voc.backbones import build_backbone
from voc.checkpoints import load_model, save_checkpoint
from voc.data import read_image
from voc.inference import multi_scale_masks
from voc.metrics import load_iou_csv
from voc.model import SingleStageNet
from voc.settings import PAPER, PRESETS
from voc.visualise import overlay

QUICK = [
    "--preset", "toy", "--epochs", "2", "--classification-epochs", "1", "--crop-size", "65", "--channels", "8",
    "--batch-size", "4", "--workers", "0", "--device", "cpu",
]  # fmt: skip


def test_the_whole_job(toy_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "run"
    assert main([*QUICK, "--data", str(toy_root), "--output", str(output)]) == 0
    printed = capsys.readouterr().out
    assert "12 training images, 4 test images, 5 classes" in printed
    table = (output / "iou.md").read_text()
    assert table.strip() in printed
    classes, columns = load_iou_csv(output / "iou.csv")
    assert classes == ("background", "tiger", "flag", "ladybird", "shell", "leaf")
    assert [name.split(" (")[0] for name in columns] == ["CAM-GAP", "ours"]
    for name in ("curves.png", "overlays.png"):
        assert read_image(output / name).std() > 0.01
    assert json.loads((output / "settings.json").read_text())["crop_size"] == 65

    model, names = load_model(output / "last.pt")
    assert names == classes[1:]
    masks, _ = multi_scale_masks(model, torch.rand(3, 40, 50))
    assert masks.shape == (6, 40, 50)


def test_a_seed_gives_the_same_table(toy_root: Path, tmp_path: Path) -> None:
    for name in ("first", "second"):
        main([*QUICK, "--data", str(toy_root), "--output", str(tmp_path / name), "--no-baseline"])
    assert (tmp_path / "first/iou.csv").read_text() == (tmp_path / "second/iou.csv").read_text()
    first, second = (
        torch.load(tmp_path / name / "last.pt", weights_only=True)["model"] for name in ("first", "second")
    )
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "/no/such/folder"], "data folder not found: /no/such/folder"),
        (["--data", "{root}", "--labels", "/no/such/file"], "labels file not found: /no/such/file"),
        (["--data", "{root}", "--table-classes", "unicorn"], "--table-classes: unknown class 'unicorn'"),
        (["--data", "{root}", "--device", "abacus"], "--device: cannot use 'abacus'"),
    ],
)
def test_what_is_wrong_is_one_line_and_exit_code_2(
    arguments: list[str], message: str, toy_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [argument.format(root=toy_root) for argument in arguments]
    assert main([*arguments, "--output", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("train_voc.py: error: ")
    assert message in error
    assert "\n" not in error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--epochs", "many"], "--epochs"),
        (["--no-such-argument"], "--no-such-argument"),
        (["--preset", "huge"], "huge"),
        (["--epochs", "0"], "--epochs must be at least 1, got 0"),
        (["--scales", "1", "0"], "--scales must be at least 0.1, got 0.0"),
        (["--mixing-rate", "1"], "--mixing-rate must be in [0, 1), got 1.0"),
    ],
)
def test_wrong_arguments_exit_with_code_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_presets() -> None:
    assert parse_arguments([]) == PRESETS["toy"]
    assert parse_arguments(["--data", "x"]).crop_size == PRESETS["photographs"].crop_size
    assert parse_arguments(["--preset", "paper", "--data=x", "--epochs", "3"]).crop_size == 321
    paper = PRESETS["paper"]
    assert (paper.epochs, paper.classification_epochs, paper.lr, paper.weight_decay) == (20, 5, 1e-3, 5e-4)


def test_help_describes_every_argument(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    for field in PAPER.to_json():
        assert f"--{field.replace('_', '-')}" in shown


def test_a_failed_write_leaves_the_older_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = SingleStageNet(build_backbone("efficientnet_lite0", pretrained=False), 2, channels=8)
    path = tmp_path / "last.pt"
    save_checkpoint(path, model, PRESETS["toy"], ["a", "b"], epoch=1)
    before = path.read_bytes()

    def disk_full(*_: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", disk_full)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(path, model, PRESETS["toy"], ["a", "b"], epoch=2)
    assert path.read_bytes() == before


def test_overlay_leaves_the_background_as_it_is() -> None:
    image = torch.rand(3, 2, 2)
    painted = overlay(image, torch.tensor([[0, 1], [0, 255]]))
    pixels = image.permute(1, 2, 0).double().numpy()
    np.testing.assert_allclose(painted[:, 0], pixels[:, 0])
    assert np.abs(painted[:, 1] - pixels[:, 1]).max() > 0.1
