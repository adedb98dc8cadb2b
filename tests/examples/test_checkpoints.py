"""Checkpoints that are damaged, cut off, or of another version."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from train_voc import main
from voc.backbones import build_backbone
from voc.checkpoints import CheckpointError, load_trained, read_checkpoint, save_checkpoint
from voc.model import build_model
from voc.presets import PRESETS


@pytest.fixture
def checkpoint(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that saves an untrained network."""
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
    with pytest.raises(OSError, match=r"cannot write .*single_stage.pt: .*unexpected pos"):
        checkpoint()
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == ["single_stage.pt"]


def flip_a_bit(content: bytes) -> bytes:
    """Damage a byte in the middle of the file, which belongs to a weight."""
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 4]) + content[middle + 1 :]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.unlink(), "checkpoint not found"),
        (lambda path: path.write_bytes(path.read_bytes()[:-500]), "cannot read checkpoint"),
        (lambda path: path.write_bytes(flip_a_bit(path.read_bytes())), "it is damaged: the checksum of "),
        (lambda path: path.write_bytes(b""), "cannot read checkpoint"),
        (
            lambda path: torch.save({"model": {}}, path),
            "is not a checkpoint of train_voc.py: it has no classes, progress",
        ),
        (lambda path: torch.save([1, 2], path), "is not a checkpoint of train_voc.py"),
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


@pytest.mark.parametrize("content", [[], "", None])
def test_settings_that_are_none(
    content: object, checkpoint: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    path = checkpoint()
    saved = read_checkpoint(path)
    torch.save({**saved, "settings": content}, path)
    with pytest.raises(CheckpointError, match=r"is not a checkpoint of train_voc\.py: settings is a "):
        load_trained(path)
    (path.parent / "settings.json").write_text(json.dumps({**saved["settings"], "baseline": False}))
    assert main(["--resume", str(path)]) == 2
    (path.parent / "settings.json").write_text(json.dumps(content))
    assert main(["--resume", str(path)]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("train_voc.py: ")]
    assert "is not a checkpoint of train_voc.py: settings is a " in errors[0]
    assert "settings.json: expected the names and values of settings" in errors[1]


def test_settings_of_another_version(checkpoint: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    path = checkpoint()
    saved = read_checkpoint(path)
    saved["settings"]["penalty_weight"] = 0.01
    torch.save(saved, path)
    with pytest.raises(CheckpointError, match="does not fit this version: unknown setting 'penalty_weight'"):
        load_trained(path)
    settings = path.with_name("settings.json")
    settings.write_text(json.dumps(saved["settings"]))
    assert main(["--resume", str(path.parent)]) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith(f"train_voc.py: error: --resume: cannot read settings {settings}: unknown setting 'penalty")
