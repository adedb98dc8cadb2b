"""Several processes that segment one folder of images: each image once, also after a kill."""

import csv
import re
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import infer_voc
import numpy as np
import pytest
import torch
from PIL import Image
from voc.checkpoints import save_checkpoint
from voc.dataset.images import read_mask
from voc.dataset.toy import OBJECTS
from voc.inference.claims import CLAIMS, claim_outputs
from voc.model import build_model
from voc.presets import PRESETS

from tests import processes

SETTINGS = replace(PRESETS["toy"], channels=8, scales=(1.0,), background_power=2.0, min_probability=0.2)
NUM_IMAGES = 12
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")

started = partial(processes.started, infer_voc.__file__)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network with random weights outside of its backbone."""
    path = tmp_path_factory.mktemp("checkpoint") / "single_stage.pt"
    torch.manual_seed(1)
    save_checkpoint(path, build_model(SETTINGS, len(OBJECTS)), SETTINGS, list(OBJECTS), {})
    return path


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    random = np.random.default_rng(3)
    for index in range(NUM_IMAGES):
        coarse = Image.fromarray(random.integers(0, 256, (5, 5, 3), dtype=np.uint8))
        coarse.resize((60 + index, 50)).save(folder / f"{index:02}.png")
    return folder


def arguments_for(trained: Path, images: Path, output: Path, *others: str) -> list[str]:
    return [str(trained), str(images), "--output", str(output), "--device", "cpu", *others]


def masks_of(output: Path) -> dict[str, tuple[int, int]]:
    """The names of the masks, each with the file's number and time, which change if it is written again."""
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in output.glob("masks/[0-9]*.png")}


def new_ones(printed: str) -> int:
    """The number of images that a run has segmented."""
    found = re.search(r"(\d+) new ones?, [\d.]+ images per second", printed)
    return int(found[1]) if found else 0


def test_two_processes_split_the_images(trained: Path, images: Path, tmp_path: Path) -> None:
    (images / "damaged.png").write_text("this is no image")
    assert infer_voc.main(arguments_for(trained, images, tmp_path / "one", "--scores")) == 1
    with started(arguments_for(trained, images, tmp_path / "two", "--scores"), TORCHRUN) as process:
        printed, _ = process.communicate()
    assert process.returncode == 1, printed
    assert printed.count("skipped") == 1
    assert f"{NUM_IMAGES} of {NUM_IMAGES + 1} images have a mask in {tmp_path}/two/crf; {NUM_IMAGES} new" in printed
    assert len(masks_of(tmp_path / "two")) == NUM_IMAGES
    for path in (tmp_path / "one").glob("*/*.png"):
        np.testing.assert_array_equal(read_mask(path), read_mask(tmp_path / "two" / path.relative_to(tmp_path / "one")))
    one, two = (list(csv.reader((tmp_path / name / "scores.csv").open())) for name in ("one", "two"))
    assert one[0] == two[0]
    assert [line[0] for line in one[1:]] == [line[0] for line in two[1:]] == [f"{i:02}" for i in range(NUM_IMAGES)]
    np.testing.assert_allclose(np.array(one[1:], float), np.array(two[1:], float), atol=2e-6)
    assert not list((tmp_path / "two" / CLAIMS).iterdir())


@pytest.mark.parametrize("launcher", [(), TORCHRUN])
def test_a_second_start_skips_what_is_done(
    launcher: tuple[str, ...], trained: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = arguments_for(trained, images, tmp_path / "out", "--scores")
    with started(arguments, launcher) as process:
        while not masks_of(tmp_path / "out") and process.poll() is None:
            time.sleep(0.01)
        if launcher:
            process.terminate()  # torchrun ends its processes by a signal that they do not handle
        else:
            process.kill()
        process.communicate()
    before = masks_of(tmp_path / "out")
    assert before
    assert infer_voc.main(arguments) == 0
    after = masks_of(tmp_path / "out")
    assert len(after) == NUM_IMAGES
    assert {name: after[name] for name in before} == before
    assert new_ones(capsys.readouterr().out) == NUM_IMAGES - len(before)
    lines = (tmp_path / "out/scores.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in lines[1:]] == [f"{index:02}" for index in range(NUM_IMAGES)]
    assert not list((tmp_path / "out" / CLAIMS).iterdir())


def test_two_at_once_segment_each_image_once(trained: Path, images: Path, tmp_path: Path) -> None:
    arguments = arguments_for(trained, images, tmp_path / "out")
    with started(arguments) as first, started(arguments) as second:
        printed = [process.communicate()[0] for process in (first, second)]
    assert [first.returncode, second.returncode] == [0, 0], printed
    assert new_ones(printed[0]) + new_ones(printed[1]) == NUM_IMAGES
    assert len(masks_of(tmp_path / "out")) == NUM_IMAGES


@pytest.mark.skipif(sys.platform == "win32", reason="claims need fcntl")
def test_an_image_of_another_process_is_left_to_it(
    trained: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out" / CLAIMS).mkdir(parents=True)
    claim = claim_outputs(tmp_path / "out", "03")
    assert claim is not None
    arguments = arguments_for(trained, images, tmp_path / "out")
    assert infer_voc.main(arguments) == 0
    assert "11 of 12 images have a mask" in (printed := capsys.readouterr().out)
    assert "; another process is segmenting 1" in printed
    assert "03.png" not in masks_of(tmp_path / "out")
    claim.release()
    assert infer_voc.main(arguments) == 0
    assert "12 of 12 images have a mask" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "count"),
    [
        ([], 0),
        (["--workers", "1"], 0),
        (["--background-power", "3"], NUM_IMAGES),
        (["--refine", "pamr"], NUM_IMAGES),
        ("image", 1),
        ("output", 1),
        ("damage", 1),
    ],
)
def test_number_of_images_segmented_again(
    change: list[str] | str,
    count: int,
    trained: Path,
    images: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "out"
    arguments = arguments_for(trained, images, output)
    assert infer_voc.main(arguments) == 0
    before = masks_of(output)
    if change == "image":
        Image.new("RGB", (30, 20), (200, 10, 20)).save(images / "05.png")
    elif change == "output":
        (output / "crf/05.png").unlink()
    elif change == "damage":
        (output / "masks/05.png").write_text("half a m")
    capsys.readouterr()
    assert infer_voc.main([*arguments, *(change if isinstance(change, list) else [])]) == 0
    assert new_ones(capsys.readouterr().out) == count
    after = masks_of(output)
    assert sum(after[name] != before[name] for name in before) == count
    if count == 1:
        assert read_mask(output / "masks/05.png").shape == Image.open(images / "05.png").size[::-1]
        assert (output / "crf/05.png").is_file()
