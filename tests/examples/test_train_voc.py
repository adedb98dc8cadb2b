"""The whole job in small, and what its command line does when something is not there."""

import errno
import json
import os
import shlex
import shutil
import signal
import time
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import train_voc
from PIL import Image
from train_voc import main
from voc.checkpoints import load_trained, read_checkpoint, save_checkpoint
from voc.dataset.images import read_image, read_mask, save_mask
from voc.evaluation.tables import load_iou_csv
from voc.inference.masks import multi_scale_masks
from voc.model import build_model
from voc.train import objective, state
from voc.train.batches import AugmentedDataset

from tests import processes

QUICK = shlex.split(
    "--preset toy --epochs 2 --classification-epochs 1 --crop-size 65 --classification-crop-size 65 --channels 8 "
    "--no-freeze-backbone --batch-size 4 --scales 1 --refine none --workers 0 --device cpu"
)

started = partial(processes.started, train_voc.__file__)


def test_the_whole_job(toy_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "run"
    assert main([*QUICK, "--refine", "crf", "--data", str(toy_root), "--output", str(output)]) == 0
    printed = capsys.readouterr().out
    assert "12 training images, 4 test images, 5 classes" in printed
    table = (output / "iou.md").read_text()
    assert table.strip() in printed
    classes, columns = load_iou_csv(output / "iou.csv")
    assert classes == ("background", "tiger", "flag", "ladybird", "shell", "leaf")
    refined = [name for name in columns if name.endswith(" + CRF")]
    assert refined[-1] == "ours + CRF"
    assert refined == [f"{name} + CRF" for name in columns if name not in refined]
    assert "CAM-GAP (background 0.1)" in columns
    ap_classes, precisions = load_iou_csv(output / "average_precision.csv")
    assert ap_classes == classes[1:]
    assert list(precisions) == ["CAM-GAP", "ours"]
    assert list(load_iou_csv(output / "pseudo_labels.csv")[1]) == ["pseudo labels"]
    assert "on 12 training images; they cover " in printed
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


def test_crops_of_every_epoch(toy_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sides: list[list[int]] = []

    def recorded_step(*args: Any) -> torch.Tensor:
        sides.append(list(args[-1].image.shape[-2:]))
        return train_step(*args)

    train_step = train_voc.train_step
    monkeypatch.setattr(train_voc, "train_step", recorded_step)
    options = ["--no-baseline", "--classification-crop-size", "49"]
    assert main([*QUICK, "--data", str(toy_root), "--output", str(tmp_path), *options]) == 0
    assert sides == [[49, 49]] * 3 + [[65, 65]] * 3
    assert list(load_iou_csv(tmp_path / "iou.csv")[1]) == ["ours"]


def test_adamw_warms_up_and_limits_the_gradient(
    toy_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates: list[float] = []
    norms: list[float] = []

    def recorded_step(state: Any, *args: Any) -> torch.Tensor:
        losses = train_step(state, *args)
        rates.append(state.optimizer.param_groups[0]["lr"])
        gradients = [p.grad.double().norm() for p in state.network.parameters() if p.grad is not None]
        norms.append(torch.stack(gradients).norm().item())
        return losses

    train_step = train_voc.train_step
    monkeypatch.setattr(train_voc, "train_step", recorded_step)
    monkeypatch.setattr(train_voc, "MAX_NORM", 1e-3)
    options = ["--no-baseline", "--optimizer", "adamw", "--lr", "4e-4", "--lr-decay", "1"]
    assert main([*QUICK, "--data", str(toy_root), "--output", str(tmp_path), *options]) == 0
    assert rates == pytest.approx([4e-4 * (1 + step) / 40 * (1 - step / 6) for step in range(6)])
    assert norms == pytest.approx([1e-3] * 6, rel=1e-2)


def test_the_learning_rate_restarts(toy_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rates: list[float] = []
    ages: list[float] = []

    def recorded_step(state: Any, *args: Any) -> torch.Tensor:
        losses = train_step(state, *args)
        rates.append(state.optimizer.param_groups[0]["lr"])
        ages.append(next(iter(state.optimizer.state.values()))["step"].item())
        return losses

    train_step = train_voc.train_step
    monkeypatch.setattr(train_voc, "train_step", recorded_step)
    options = ["--no-baseline", "--optimizer", "adamw", "--lr", "4e-4", "--lr-decay", "1", "--lr-restart"]
    assert main([*QUICK, "--data", str(toy_root), "--output", str(tmp_path), *options]) == 0
    once = [4e-4 * (1 + step) / 40 * (1 - step / 3) for step in range(3)]
    assert rates == pytest.approx([*once, *once])
    assert ages == [1, 2, 3, 1, 2, 3]
    rates.clear()
    options += ["--supervision", "masks"]
    assert main([*QUICK, "--data", str(toy_root), "--output", str(tmp_path / "masks"), *options]) == 0
    assert rates == pytest.approx([4e-4 * (1 + step) / 40 * (1 - step / 6) for step in range(6)])


def weights_of(path: Path) -> dict[str, torch.Tensor]:
    return read_checkpoint(path)["model"]


def assert_same_run(first: Path, second: Path) -> None:
    assert (first / "iou.csv").read_text() == (second / "iou.csv").read_text()
    ours, theirs = (read_checkpoint(folder / "single_stage.pt") for folder in (first, second))
    assert all(torch.equal(value, theirs["model"][key]) for key, value in ours["model"].items())
    assert ours["progress"]["history"] == theirs["progress"]["history"]


@pytest.fixture(scope="module")
def finished(toy_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two epochs without interruption."""
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
    assert f"after step 2; resume with: python examples/train_voc.py --resume {tmp_path}" in capsys.readouterr().err
    assert main(["--resume", str(tmp_path)]) == 130
    assert "stopped in epoch 2 after step 2" in capsys.readouterr().err
    assert main(["--resume", str(tmp_path)]) == 0
    assert steps == 6
    assert_same_run(finished, tmp_path)


def test_a_new_run_does_not_go_on_from_an_earlier_one(
    finished: Path, toy_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    output = tmp_path / "run"
    shutil.copytree(finished, output)
    monkeypatch.setattr(train_voc, "train", interrupted)
    assert main([*QUICK, "--data", str(toy_root), "--output", str(output), "--no-baseline", "--seed", "9"]) == 130
    assert state.checkpoint_to_resume(train_voc.parse_arguments(["--resume", str(output)])) is None
    assert not (output / "iou.csv").exists()
    assert not (output / "tensorboard").exists()
    assert (output / "tensorboard.old/single_stage").is_dir()
    kept = output / "single_stage.pt.old"
    assert kept.read_bytes() == (finished / "single_stage.pt").read_bytes()


def test_going_on_from_any_epoch(finished: Path, tmp_path: Path) -> None:
    for name in ("settings.json", "single_stage_001.pt"):
        (tmp_path / name).write_bytes((finished / name).read_bytes())
    assert main(["--resume", str(tmp_path / "single_stage_001.pt")]) == 0
    assert_same_run(finished, tmp_path)
    # A finished run is not trained again, but can be continued with more epochs.
    before = weights_of(tmp_path / "single_stage.pt")
    assert main(["--resume", str(tmp_path)]) == 0
    assert all(torch.equal(value, before[key]) for key, value in weights_of(tmp_path / "single_stage.pt").items())
    assert main(["--resume", str(tmp_path), "--epochs", "3"]) == 0
    assert len(read_checkpoint(tmp_path / "single_stage.pt")["progress"]["history"]) == 3


@pytest.mark.slow
def test_decay_and_average_go_on_too(
    finished: Path, toy_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates: list[float] = []
    trained: list[dict[str, torch.Tensor]] = []

    def recorded_step(state: Any, *args: Any) -> torch.Tensor:
        if len(rates) == 4:
            signal.raise_signal(signal.SIGINT)
        losses = train_step(state, *args)
        rates.append(state.optimizer.param_groups[0]["lr"])
        trained.append({key: value.clone().double() for key, value in state.network.state_dict().items()})
        return losses

    train_step = train_voc.train_step
    arguments = [*QUICK, "--data", str(toy_root), "--no-baseline", "--lr-decay", "0.9", "--ema-decay", "0.5"]
    assert main([*arguments, "--output", str(tmp_path / "whole")]) == 0
    monkeypatch.setattr(train_voc, "train_step", recorded_step)
    assert main([*arguments, "--output", str(tmp_path / "parts")]) == 130
    assert main(["--resume", str(tmp_path / "parts")]) == 0
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    factors = [(1 - step / 6) ** 0.9 for step in range(6)]
    assert [rate / rates[0] for rate in rates] == pytest.approx(factors)

    checkpoint = read_checkpoint(tmp_path / "parts/single_stage.pt")
    expected = weights_of(finished / "single_stage_001.pt")  # only for the names
    for key in expected:
        assert torch.equal(checkpoint["progress"]["weights"][key].double(), trained[-1][key])
        if expected[key].is_floating_point():
            # The last three weights of the average; the earlier ones are in what is left.
            decays = [min(0.5, (1 + step) / (10 + step)) for step in range(6)]
            mean = trained[0][key]
            for decay, weights in zip(decays[1:], trained[1:], strict=True):
                mean = decay * mean + (1 - decay) * weights[key]
            # The start, which is not recorded here, has a share of decays[0] * ... * decays[5] < 0.001.
            limit = 2e-3 * (1 + mean.abs())
            assert ((checkpoint["model"][key].double() - mean).abs() < limit).all()


@pytest.mark.slow
def test_energy_loss_crf_pseudo_labels_and_a_column_of_the_crf(
    finished: Path, toy_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = 0

    def interrupted_step(*args: Any) -> torch.Tensor:
        nonlocal steps
        steps += 1
        if steps == 5:  # in the epoch with self-supervision
            signal.raise_signal(signal.SIGINT)
        return train_step(*args)

    train_step = train_voc.train_step
    options = ["--energy-loss", "0.5", "--pseudo-labels", "crf", "--refine", "crf", "--no-baseline"]
    arguments = [*QUICK, "--data", str(toy_root), *options, "--keep-checkpoints"]
    assert main([*arguments, "--output", str(tmp_path / "whole")]) == 0
    monkeypatch.setattr(train_voc, "train_step", interrupted_step)
    assert main([*arguments, "--output", str(tmp_path / "parts")]) == 130
    assert main(["--resume", str(tmp_path / "parts")]) == 0
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    assert list(load_iou_csv(tmp_path / "whole/iou.csv")[1]) == ["ours", "ours + CRF"]
    # The epoch of classification is that of any run.
    first, plain = (weights_of(folder / "single_stage_001.pt") for folder in (tmp_path / "whole", finished))
    assert all(torch.equal(value, plain[key]) for key, value in first.items())
    last, plain = (weights_of(folder / "single_stage.pt") for folder in (tmp_path / "whole", finished))
    assert not all(torch.equal(value, plain[key]) for key, value in last.items())
    history = read_checkpoint(tmp_path / "whole/single_stage.pt")["progress"]["history"]
    assert history[0]["energy"] == 0 > history[1]["energy"]


def test_a_checkpoint_of_a_version_without_energy_loss_goes_on(finished: Path, tmp_path: Path) -> None:
    checkpoint = read_checkpoint(finished / "single_stage_001.pt")
    del checkpoint["progress"]["sums"][3:]
    torch.save(checkpoint, tmp_path / "single_stage_001.pt")
    (tmp_path / "settings.json").write_bytes((finished / "settings.json").read_bytes())
    assert main(["--resume", str(tmp_path / "single_stage_001.pt")]) == 0
    assert_same_run(finished, tmp_path)


def test_the_best_epoch_makes_the_results(
    toy_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    losses = iter([0.3, 0.1, 0.2])
    evaluated = []
    saved: list[str] = []

    def save(path: Path, *args: Any) -> None:
        saved.append(path.stem.removeprefix("single_stage"))
        save_checkpoint(path, *args)

    def held_out(*_: Any) -> float:
        return next(losses)

    def recorded(model: Any, *args: Any, **kwargs: Any) -> Any:
        if "scales" not in kwargs:  # the evaluation after the training
            evaluated.append({key: value.clone() for key, value in model.state_dict().items()})
        return evaluate(model, *args, **kwargs)

    evaluate = train_voc.evaluate
    monkeypatch.setattr(train_voc, "evaluate", recorded)
    monkeypatch.setattr(train_voc, "held_out_loss", held_out)
    monkeypatch.setattr(state, "save_checkpoint", save)
    arguments = ["--no-baseline", "--checkpoint", "best", "--epochs", "3", "--classification-epochs", "0"]
    assert main([*QUICK, "--data", str(toy_root), "--output", str(tmp_path), *arguments, "--keep-checkpoints"]) == 0
    history = read_checkpoint(tmp_path / "single_stage.pt")["progress"]["history"]
    assert [figures["held-out loss"] for figures in history] == [0.3, 0.1, 0.2]
    second, best = weights_of(tmp_path / "single_stage_002.pt"), weights_of(tmp_path / "single_stage_best.pt")
    for key, value in evaluated[-1].items():
        assert torch.equal(value, second[key])
        assert torch.equal(value, best[key])
    # At the end of an epoch, after its evaluation the copies, and last what `--resume` reads: a kill loses no copy.
    assert saved == ["", "_001", "_best", "", "", "_002", "_best", "", "", "_003", ""]
    assert main(["--resume", str(tmp_path)]) == 0
    assert all(torch.equal(value, best[key]) for key, value in evaluated[-1].items())
    shutil.copy(tmp_path / "single_stage_003.pt", tmp_path / "single_stage_best.pt")
    assert main(["--resume", str(tmp_path)]) == 0
    assert all(torch.equal(value, best[key]) for key, value in evaluated[-1].items())
    (tmp_path / "single_stage_002.pt").unlink()
    assert main(["--resume", str(tmp_path)]) == 1
    assert "no checkpoint of epoch 2, the best one of this run" in capsys.readouterr().err
    assert main(["--resume", str(tmp_path), "--checkpoint", "last"]) == 0
    last = weights_of(tmp_path / "single_stage.pt")
    assert all(torch.equal(value, last[key]) for key, value in evaluated[-1].items())


def test_held_out_loss_needs_no_masks(toy_root: Path, tmp_path: Path) -> None:
    histories = []
    for name in ("masks", "no masks"):
        root = tmp_path / name
        shutil.copytree(toy_root, root)
        labels = []
        for image in (root / "ImageSets/Segmentation/val.txt").read_text().split():
            path = root / f"SegmentationClass/{image}.png"
            mask = read_mask(path)
            labels.append(sorted(set(np.unique(mask).tolist())))
            if name == "no masks":  # only the classes stay the same
                mask[:] = 255
                mask[0, : len(labels[-1])] = labels[-1]
                save_mask(path, mask)
        arguments = [*QUICK, "--data", str(root), "--output", str(tmp_path / f"run with {name}"), "--no-baseline"]
        assert main([*arguments, "--checkpoint", "best"]) == 0
        history = read_checkpoint(tmp_path / f"run with {name}/single_stage.pt")["progress"]["history"]
        histories.append([figures.get("held-out loss") for figures in history])
    assert histories[0] == histories[1]
    assert histories[0][0] is None
    assert histories[0][1] > 0


@pytest.mark.slow
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
    assert (
        capsys.readouterr().err.strip().splitlines()[-1].startswith("stopped; resume with: python examples/train_voc")
    )
    with monkeypatch.context() as patch:
        patch.setattr(train_voc, "build_model", lambda *_: signal.raise_signal(signal.SIGINT))
        assert main(arguments) == 130
    assert capsys.readouterr().err.strip().splitlines()[-1] == "stopped before training"
    assert signal.getsignal(number) is before


def test_a_full_disk_is_reported_in_one_line(
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


def test_too_little_memory_is_reported_in_one_line(
    toy_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def too_large(*_: Any) -> None:
        torch.empty(2**55)

    monkeypatch.setattr(train_voc, "train_step", too_large)
    assert main([*QUICK, "--data", str(toy_root), "--output", str(tmp_path), "--no-baseline"]) == 1
    *_, line = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("train_voc.py: error: not enough memory: try a smaller --batch-size")


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


def changed_weights(first: Mapping[str, torch.Tensor], second: Mapping[str, torch.Tensor]) -> set[str]:
    return {key for key, value in first.items() if value.is_floating_point() and not torch.equal(value, second[key])}


@pytest.mark.slow
def test_a_frozen_run_with_a_restart_goes_on(toy_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ["--freeze-backbone", "--optimizer", "adamw", "--lr-decay", "0.9", "--lr-restart"]
    arguments = [*QUICK, "--data", str(toy_root), "--no-baseline", *options]
    assert main([*arguments, "--output", str(tmp_path / "whole")]) == 0
    steps: list[None] = []

    def counted_step(*args: Any) -> torch.Tensor:
        steps.append(None)
        if len(steps) in (2, 4):  # in the frozen epoch, and in the first step after the restart
            signal.raise_signal(signal.SIGINT)
        return train_step(*args)

    train_step = train_voc.train_step
    monkeypatch.setattr(train_voc, "train_step", counted_step)
    assert main([*arguments, "--output", str(tmp_path / "parts")]) == 130
    assert main(["--resume", str(tmp_path / "parts")]) == 130
    progress = read_checkpoint(tmp_path / "parts/single_stage.pt")["progress"]
    assert (progress["epoch"], progress["step"]) == (2, 1)
    assert main(["--resume", str(tmp_path / "parts")]) == 0
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.slow
def test_a_frozen_backbone(toy_root: Path, tmp_path: Path) -> None:
    arguments = [*QUICK, "--data", str(toy_root), "--no-baseline", "--keep-checkpoints", "--freeze-backbone"]
    assert main([*arguments, "--output", str(tmp_path / "one")]) == 0
    first, second = (weights_of(tmp_path / f"one/single_stage_00{epoch}.pt") for epoch in (1, 2))
    pretrained = build_model(load_trained(tmp_path / "one/single_stage.pt")[2], 5).state_dict()
    in_backbone = {key for key in pretrained if key.startswith("backbone.")}
    assert not changed_weights(pretrained, first) & in_backbone
    assert changed_weights(pretrained, first) - in_backbone
    assert changed_weights(first, second) & in_backbone

    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    with started([*arguments, "--output", str(tmp_path / "two")], launcher) as process:
        printed, _ = process.communicate()
    assert process.returncode == 0, printed
    one, two = (read_checkpoint(tmp_path / run / "single_stage.pt")["progress"]["history"] for run in ("one", "two"))
    assert [figures["loss"] for figures in two] == pytest.approx([figures["loss"] for figures in one], rel=1e-4)

    options = ["--epochs", "1", "--supervision", "masks", "--output", str(tmp_path / "masks")]
    assert main([*arguments, *options]) == 0
    assert changed_weights(pretrained, weights_of(tmp_path / "masks/single_stage.pt")) & in_backbone


@pytest.mark.parametrize(
    ("arguments", "columns"),
    [
        (["--model", "cam"], {"CAM-GAP (background 0.1)"}),
        (["--supervision", "masks"], {"ours"}),
        (["--no-baseline", "--accumulate", "2"], {"ours"}),
        (["--no-baseline", "--loss", "published", "--classification-epochs", "0"], {"ours"}),
        (["--no-baseline", "--pamr-variant", "paper", "--gci-norm", "instance", "--checkpoint", "best"], {"ours"}),
        (["--no-baseline", "--no-gci", "--no-size-penalty", "--gate", "deterministic"], {"ours"}),
        (["--no-baseline", "--skip-stride8"], {"ours"}),
    ],
)
def test_other_networks(arguments: list[str], columns: set[str], toy_root: Path, tmp_path: Path) -> None:
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
    image.write_bytes(image.read_bytes()[:-900])  # the header stays intact
    arguments = [*QUICK, "--data", str(root), "--output", str(tmp_path / "run"), "--no-baseline", "--workers", workers]
    assert main(arguments) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"train_voc.py: error: cannot read image {image}: ")


def test_a_dead_worker_is_reported_in_one_line(
    toy_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(AugmentedDataset, "__getitem__", lambda *_: os._exit(3))
    arguments = [*QUICK, "--data", str(toy_root), "--output", str(tmp_path), "--no-baseline", "--workers", "1"]
    assert main(arguments) == 1
    assert "train_voc.py: error: a process that reads images died" in capsys.readouterr().err


@pytest.mark.slow
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
    # All pixels are void: there is nothing to learn.
    assert read_checkpoint(tmp_path / "run/single_stage.pt")["progress"]["history"][0]["loss"] == 0


def test_a_loss_that_is_not_finite(
    toy_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def not_a_number(class_scores: torch.Tensor, _labels: torch.Tensor) -> torch.Tensor:
        return class_scores.sum() * torch.nan

    monkeypatch.setattr(objective, "classification_loss", not_a_number)
    assert main([*QUICK, "--data", str(toy_root), "--output", str(tmp_path), "--no-baseline"]) == 1
    assert "the loss is nan in epoch 1, step 1" in capsys.readouterr().err
    saved = json.loads((tmp_path / "not_finite_0.json").read_text())
    assert len(saved["images"]) == 4
