"""The command line of train_voc.py: its presets, and one line for every wrong argument."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from train_voc import main, parse_arguments, settings_per_network
from voc.presets import PAPER, PRESETS
from voc.settings import Settings


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "/no/such/folder"], "data folder not found: /no/such/folder"),
        (["--data", "{root}", "--labels", "/no/such/file"], "labels file not found: /no/such/file"),
        (["--data", "{root}", "--table-classes", "unicorn"], "--table-classes: unknown class 'unicorn'"),
        (["--data", "{root}", "--device", "abacus"], "--device: cannot use 'abacus'"),
        (["--data", "{root}", "--device", "meta"], "--device: cannot use 'meta': its tensors have no values"),
        (["--data", "{root}", "--backbone", "vgg16"], "--backbone vgg16 needs --weights FILE"),
        (["--data", "{root}", "--weights", "/no/such/file"], "weights not found: /no/such/file"),
        (["--data", "{root}", "--accumulate", "3"], "--batch-size must be divisible by processes x --accumulate"),
        (["--data", "{root}", "--precision", "fp16", "--device", "cpu"], "--precision fp16 needs a CUDA device"),
        (["--resume", "/no/such/run"], "--resume: no run to resume: looked for /no/such/run"),
    ],
)
def test_errors_are_one_line_with_exit_code_2(
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
        (["--ema-decay", "1"], "--ema-decay must be in [0, 1), got 1.0"),
        (["--lr-decay", "-1"], "--lr-decay must be at least 0, got -1.0"),
        (["--penalty-lambda", "0"], "--penalty-lambda must be greater than 0, got 0.0"),
        (["--penalty-lambda", "inf"], "--penalty-lambda must be finite, got inf"),
        (["--scales"], "--scales needs at least one value"),
        (["--scales", "inf"], "--scales must be finite, got inf"),
        (["--pamr-dilations"], "--pamr-dilations needs at least one value"),
        (["--seed", "-1"], "--seed must be at least 0, got -1"),
        (["--seed", "4294967296"], "--seed must be at most 4294967295, got 4294967296"),
        (["--min-probability", "2"], "--min-probability must be at most 1, got 2.0"),
        (["--supervision", "masks", "--model", "cam"], "--supervision masks is for --model single_stage"),
        (["--masks", "."], "--masks is for --supervision masks, which is not given"),
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
    assert [one.lr for one in settings_per_network(PRESETS["toy"])] == [PRESETS["toy"].baseline_lr, PRESETS["toy"].lr]
    assert [one.lr for one in settings_per_network(PRESETS["photographs"])] == 2 * [PRESETS["photographs"].lr]
    assert parse_arguments(["--data", "x"]).crop_size == PRESETS["photographs"].crop_size
    assert parse_arguments(["--data", "x", "--preset", "auto"]) == parse_arguments(["--data", "x"])
    assert parse_arguments(["--preset", "paper", "--data=x", "--epochs", "3"]).crop_size == 321
    paper = PRESETS["paper"]
    assert parse_arguments([]).loss == parse_arguments(["--data", "x"]).loss == "paper"
    assert (paper.epochs, paper.classification_epochs, paper.lr, paper.weight_decay) == (20, 5, 1e-3, 5e-4)


def test_a_backbone_without_features_of_stride_8_takes_the_toy_preset_too() -> None:
    assert parse_arguments(["--backbone", "efficientnet_lite1"]).skip_stride8
    settings = parse_arguments(["--backbone", "resnet50"])
    assert (settings.backbone, settings.skip_stride8) == ("resnet50", False)


def test_help_describes_every_argument(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    for field in PAPER.to_json():
        assert f"--{field.replace('_', '-')}" in shown


def test_settings_survive_json() -> None:
    settings = replace(PAPER, data=Path("a"), table_classes=("background", "cat"), resume=None)
    assert Settings.from_json(json.loads(json.dumps(settings.to_json()))) == settings


@pytest.mark.parametrize(
    ("backbone", "epochs", "lr", "crop"),
    [
        ("wide_resnet38", 24, 1e-3, 321),
        ("vgg16", 32, 1e-3, 448),
        ("resnet50", 20, 5e-4, 448),
        ("resnet101", 20, 1e-3, 448),
    ],
)
def test_presets_of_the_paper(backbone: str, epochs: int, lr: float, crop: int) -> None:
    settings = parse_arguments(["--preset", "paper", "--backbone", backbone])
    assert (settings.backbone, settings.epochs, settings.lr, settings.crop_size) == (backbone, epochs, lr, crop)
    assert settings.loss == "published"
