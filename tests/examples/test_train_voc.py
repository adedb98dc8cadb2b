"""The whole job in small, and what its command line does when something is not there."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import train_voc
from PIL import Image
from train_voc import main, parse_arguments
from voc.backbones import build_backbone
from voc.checkpoints import CheckpointError, build_model, load_trained, read_checkpoint, save_checkpoint
from voc.data import read_image
from voc.inference import multi_scale_masks
from voc.metrics import load_iou_csv
from voc.settings import PAPER, PRESETS, Settings
from voc.training import AugmentedDataset
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
    assert [name.split(" (")[0] for name in columns] in (["CAM-GAP", "ours"], ["CAM-GAP", "CAM-GAP", "ours"])
    assert "CAM-GAP (background 0.1)" in columns
    for name in ("curves.png", "overlays.png"):
        assert read_image(output / name).std() > 0.01
    assert json.loads((output / "settings.json").read_text())["crop_size"] == 65

    assert list((output / "tensorboard/single_stage").glob("events.*"))
    for name in ("cam", "single_stage"):
        model, names, settings = load_trained(output / f"{name}.pt")
        assert names == classes[1:]
        assert settings.model == name
        masks, _ = multi_scale_masks(model, torch.rand(3, 40, 50))
        assert masks.shape == (6, 40, 50)


def weights_of(path: Path) -> dict[str, torch.Tensor]:
    return read_checkpoint(path)["model"]


def assert_same_run(first: Path, second: Path) -> None:
    assert (first / "iou.csv").read_text() == (second / "iou.csv").read_text()
    ours, theirs = (read_checkpoint(folder / "single_stage.pt") for folder in (first, second))
    assert all(torch.equal(value, theirs["model"][key]) for key, value in ours["model"].items())
    assert ours["progress"]["history"] == theirs["progress"]["history"]


@pytest.fixture(scope="module")
def finished(toy_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two epochs that nothing disturbed."""
    output = tmp_path_factory.mktemp("finished")
    assert main([*QUICK, "--data", str(toy_root), "--output", str(output), "--no-baseline", "--keep-checkpoints"]) == 0
    return output


def test_a_seed_gives_the_same_table(finished: Path, toy_root: Path, tmp_path: Path) -> None:
    main([*QUICK, "--data", str(toy_root), "--output", str(tmp_path), "--no-baseline"])
    assert_same_run(finished, tmp_path)


def test_an_interrupted_run_goes_on(
    finished: Path, toy_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    steps = 0

    def interrupted_step(*args: Any) -> torch.Tensor:
        nonlocal steps
        steps += 1
        if steps in (2, 5):  # in the first epoch, and in the second after going on
            signal.raise_signal(signal.SIGINT)
        return train_step(*args)

    train_step = train_voc.train_step
    monkeypatch.setattr(train_voc, "train_step", interrupted_step)
    assert main([*QUICK, "--data", str(toy_root), "--output", str(tmp_path), "--no-baseline"]) == 130
    assert f"after step 2; go on with: python examples/train_voc.py --resume {tmp_path}" in capsys.readouterr().err
    assert main(["--resume", str(tmp_path)]) == 130
    assert "stopped in epoch 2 after step 2" in capsys.readouterr().err
    assert main(["--resume", str(tmp_path)]) == 0
    assert steps == 6
    assert_same_run(finished, tmp_path)


def test_going_on_from_any_epoch(finished: Path, tmp_path: Path) -> None:
    for name in ("settings.json", "single_stage_001.pt"):
        (tmp_path / name).write_bytes((finished / name).read_bytes())
    assert main(["--resume", str(tmp_path / "single_stage_001.pt")]) == 0
    assert_same_run(finished, tmp_path)
    # What is finished is not trained again, and can be trained for longer.
    before = weights_of(tmp_path / "single_stage.pt")
    assert main(["--resume", str(tmp_path)]) == 0
    assert all(torch.equal(value, before[key]) for key, value in weights_of(tmp_path / "single_stage.pt").items())
    assert main(["--resume", str(tmp_path), "--epochs", "3"]) == 0
    assert len(read_checkpoint(tmp_path / "single_stage.pt")["progress"]["history"]) == 3


@contextmanager
def started(arguments: list[str], launcher: tuple[str, ...] = ()) -> Iterator["subprocess.Popen[str]"]:
    """Start a training in a process of its own, which ends with the block. There is no time limit to miss."""
    command = [sys.executable, *launcher, str(Path(train_voc.__file__)), *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()  # a launcher ends its own processes
            with suppress(subprocess.TimeoutExpired):
                process.communicate(timeout=30)
            process.kill()
            process.communicate()


def test_a_killed_run_goes_on(finished: Path, toy_root: Path, tmp_path: Path) -> None:
    with started([*QUICK, "--data", str(toy_root), "--output", str(tmp_path), "--no-baseline"]) as process:
        while not (tmp_path / "single_stage.pt").exists() and process.poll() is None:
            time.sleep(0.01)
        process.kill()
        process.communicate()
    assert main(["--resume", str(tmp_path)]) == 0
    assert_same_run(finished, tmp_path)


@pytest.fixture
def _interruptible() -> Iterator[None]:
    """Ctrl-C acts as usual, also in a process that was started in the background and therefore ignores it."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, previous)


@pytest.mark.usefixtures("_interruptible")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_outside_of_an_epoch_ends_in_one_line(
    number: signal.Signals,
    toy_root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        signal.raise_signal(number)

    arguments = [*QUICK, "--data", str(toy_root), "--output", str(tmp_path), "--no-baseline"]
    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        patch.setattr(train_voc, "evaluate", interrupted)
        assert main(arguments) == 130
    assert capsys.readouterr().err.strip().splitlines()[-1].startswith("stopped; go on with: python examples/train_voc")
    with monkeypatch.context() as patch:
        patch.setattr(train_voc, "build_model", lambda *_: signal.raise_signal(signal.SIGINT))
        assert main(arguments) == 130
    assert capsys.readouterr().err.strip().splitlines()[-1] == "stopped before training"
    assert signal.getsignal(number) is before


def test_a_full_disk_is_said_in_one_line(
    toy_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("tensorboard.summary.writer.record_writer.RecordWriter.write", full)
    assert main([*QUICK, "--data", str(toy_root), "--output", str(tmp_path), "--no-baseline"]) == 1
    error = capsys.readouterr().err
    assert "Traceback" not in error
    assert error.strip().splitlines()[-1] == (
        f"train_voc.py: error: {tmp_path}: [Errno {errno.ENOSPC}] No space left on device"
    )


def test_two_processes_have_the_losses_of_one(finished: Path, toy_root: Path, tmp_path: Path) -> None:
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    arguments = [*QUICK, "--data", str(toy_root), "--output", str(tmp_path), "--no-baseline"]
    with started(arguments, launcher) as process:
        printed, _ = process.communicate()
    assert process.returncode == 0, printed
    one, two = (read_checkpoint(folder / "single_stage.pt")["progress"]["history"] for folder in (finished, tmp_path))
    assert len(one) == len(two) == 2
    for expected, found in zip(one, two, strict=True):
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-4)
        assert found["segmentation"] == pytest.approx(expected["segmentation"], rel=1e-3)
    assert expected["segmentation"] > 0


@pytest.mark.parametrize(
    ("arguments", "columns"),
    [
        (["--model", "cam"], {"CAM-GAP (background 0.1)"}),
        (["--supervision", "masks"], {"ours"}),
        (["--no-baseline", "--accumulate", "2"], {"ours"}),
        (["--no-baseline", "--no-gci", "--penalty-weight", "0", "--gate", "deterministic"], {"ours"}),
    ],
)
def test_variants(arguments: list[str], columns: set[str], toy_root: Path, tmp_path: Path) -> None:
    assert main([*QUICK, "--epochs", "1", "--data", str(toy_root), "--output", str(tmp_path), *arguments]) == 0
    _, found = load_iou_csv(tmp_path / "iou.csv")
    assert columns <= set(found)
    assert all("CAM-GAP" in name for name in found) or set(found) == columns
    (model,) = tmp_path.glob("*.pt")
    losses = read_checkpoint(model)["progress"]["history"][0]
    assert losses["loss"] == pytest.approx(losses["classification"] + losses["segmentation"])
    assert (losses["classification"] == 0) == ("masks" in arguments)


@pytest.mark.parametrize("workers", ["0", "2"])
def test_a_truncated_image_is_named_in_one_line(
    workers: str, toy_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "data"
    shutil.copytree(toy_root, root)
    name = (root / "ImageSets/Segmentation/train.txt").read_text().split()[3]
    (image,) = (root / "JPEGImages").glob(f"{name}.*")
    image.write_bytes(image.read_bytes()[:-900])  # its header is whole
    arguments = [*QUICK, "--data", str(root), "--output", str(tmp_path / "run"), "--no-baseline", "--workers", workers]
    assert main(arguments) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"train_voc.py: error: cannot read image {image}: ")


def test_a_worker_that_dies_is_said_in_one_line(
    toy_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(AugmentedDataset, "__getitem__", lambda *_: os._exit(3))
    arguments = [*QUICK, "--data", str(toy_root), "--output", str(tmp_path), "--no-baseline", "--workers", "1"]
    assert main(arguments) == 1
    assert "train_voc.py: error: a process that reads images died" in capsys.readouterr().err


def test_half_precision(finished: Path, toy_root: Path, tmp_path: Path) -> None:
    # In a process of its own: accelerate keeps one precision for the life of a process.
    # One epoch, because bfloat16 is slow on processors without instructions for it.
    arguments = [*QUICK, "--data", str(toy_root), "--output", str(tmp_path), "--no-baseline"]
    with started([*arguments, "--precision", "bf16", "--epochs", "1"]) as process:
        printed, _ = process.communicate()
    assert process.returncode == 0, printed
    half, full = (read_checkpoint(folder / "single_stage.pt") for folder in (tmp_path, finished))
    assert half["progress"]["history"][0]["loss"] == pytest.approx(full["progress"]["history"][0]["loss"], rel=0.1)
    assert half["progress"]["history"][0] != full["progress"]["history"][0]
    assert {value.dtype for value in half["model"].values()} == {torch.float32, torch.int64}


def test_masks_of_another_folder(toy_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [*QUICK, "--data", str(toy_root), "--output", str(tmp_path / "run"), "--supervision", "masks"]
    assert main([*arguments, "--masks", str(tmp_path)]) == 2
    assert f"mask not found: looked for {tmp_path}" in capsys.readouterr().err
    masks = tmp_path / "masks"
    masks.mkdir()
    for name in (toy_root / "ImageSets/Segmentation/train.txt").read_text().split():
        with Image.open(toy_root / f"SegmentationClass/{name}.png") as mask:
            Image.fromarray(np.full(mask.size[::-1], 255, np.uint8)).save(masks / f"{name}.png")
    assert main([*arguments, "--masks", str(masks), "--epochs", "1"]) == 0
    # Nothing but void: there is nothing to learn.
    assert read_checkpoint(tmp_path / "run/single_stage.pt")["progress"]["history"][0]["loss"] == 0


def test_a_loss_that_is_not_finite(
    toy_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def not_a_number(class_scores: torch.Tensor, _labels: torch.Tensor) -> torch.Tensor:
        return class_scores.sum() * torch.nan

    monkeypatch.setattr(train_voc, "classification_loss", not_a_number)
    assert main([*QUICK, "--data", str(toy_root), "--output", str(tmp_path), "--no-baseline"]) == 1
    assert "the loss is nan in epoch 1, step 1" in capsys.readouterr().err
    saved = json.loads((tmp_path / "not_finite_0.json").read_text())
    assert len(saved["images"]) == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "/no/such/folder"], "data folder not found: /no/such/folder"),
        (["--data", "{root}", "--labels", "/no/such/file"], "labels file not found: /no/such/file"),
        (["--data", "{root}", "--table-classes", "unicorn"], "--table-classes: unknown class 'unicorn'"),
        (["--data", "{root}", "--device", "abacus"], "--device: cannot use 'abacus'"),
        (["--data", "{root}", "--backbone", "vgg16"], "--backbone vgg16 needs --weights FILE"),
        (["--data", "{root}", "--weights", "/no/such/file"], "weights not found: /no/such/file"),
        (["--data", "{root}", "--accumulate", "3"], "--batch-size must be divisible by processes x --accumulate"),
        (["--data", "{root}", "--precision", "fp16", "--device", "cpu"], "--precision fp16 needs a CUDA device"),
        (["--resume", "/no/such/run"], "--resume: no run to go on with: looked for /no/such/run"),
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


@pytest.fixture
def checkpoint(tmp_path: Path) -> Callable[..., Path]:
    """Save an untrained network."""
    settings = replace(PRESETS["toy"], channels=8)
    model = build_model(settings, 2, build_backbone(settings.backbone))

    def save() -> Path:
        save_checkpoint(tmp_path / "single_stage.pt", model, settings, ["a", "b"], {"epoch": 1})
        return tmp_path / "single_stage.pt"

    return save


def test_a_failed_write_leaves_the_older_checkpoint(
    checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = checkpoint()
    before = path.read_bytes()

    def disk_full(*_: object) -> None:
        raise RuntimeError("[enforce fail at inline_container.cc:664] unexpected pos 64 vs 0\nmore lines")

    monkeypatch.setattr(torch, "save", disk_full)
    with pytest.raises(OSError, match=r"cannot write checkpoint .*single_stage.pt: .*unexpected pos"):
        checkpoint()
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == ["single_stage.pt"]


def flip_a_bit(content: bytes) -> bytes:
    """Damage a byte in the middle, which is one of a weight."""
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 4]) + content[middle + 1 :]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.unlink(), "checkpoint not found"),
        (lambda path: path.write_bytes(path.read_bytes()[:-500]), "cannot read checkpoint"),
        (lambda path: path.write_bytes(flip_a_bit(path.read_bytes())), "it is damaged: the checksum of "),
        (lambda path: path.write_bytes(b""), "cannot read checkpoint"),
        (lambda path: torch.save({"model": {}}, path), "is no checkpoint of train_voc.py: it has no classes, progress"),
        (lambda path: torch.save([1, 2], path), "is no checkpoint of train_voc.py"),
        (lambda path: torch.save(Path("x"), path), "cannot read checkpoint"),  # a pickled object is not loaded
    ],
)
def test_a_damaged_checkpoint(
    checkpoint: Callable[..., Path], damage: Callable[[Path], object], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = checkpoint()
    damage(path)
    with pytest.raises(CheckpointError, match=message):
        load_trained(path)
    (path.parent / "settings.json").write_text(json.dumps({**PRESETS["toy"].to_json(), "baseline": False}))
    if path.exists():
        assert main(["--resume", str(path)]) == 2
        assert message in capsys.readouterr().err


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


def test_overlay_leaves_the_background_as_it_is() -> None:
    image = torch.rand(3, 2, 2)
    painted = overlay(image, torch.tensor([[0, 1], [0, 255]]))
    pixels = image.permute(1, 2, 0).double().numpy()
    np.testing.assert_allclose(painted[:, 0], pixels[:, 0])
    assert np.abs(painted[:, 1] - pixels[:, 1]).max() > 0.1
