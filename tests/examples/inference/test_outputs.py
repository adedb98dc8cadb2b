"""The files that inference writes."""

import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from voc.dataset.errors import DataError
from voc.dataset.images import read_mask
from voc.inference import pipeline
from voc.inference.outputs import Outputs, write_scores
from voc.inference.pictures import Picture, read_picture
from voc.inference.pipeline import Pipeline, Work
from voc.inference.segmenter import SoftMasks
from voc.inference.sources import Source


@pytest.mark.skipif(sys.platform == "win32", reason="file names are valid Unicode on Windows")
def test_file_name_that_is_not_valid_utf8(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9")
    write_scores(tmp_path / "scores.csv", ["a,b", "c"], [(name, [0.25, 1e-9])])
    assert (tmp_path / "scores.csv").read_bytes() == b'image,"a,b",c\r\ncaf\xe9,0.250000,0.000000\r\n'


@pytest.fixture
def source(tmp_path: Path) -> Source:
    Image.new("RGB", (5, 4), (9, 9, 9)).save(tmp_path / "a.png")
    return Source("a", tmp_path / "a.png", None)


def write(source: Source, folder: Path, power: float, index: int) -> Outputs:
    """Write the outputs of an image: class `index` everywhere."""
    found = Outputs(folder, ["masks", "crf"], {"power": power})
    found.make_folders()
    masks = torch.zeros(3, 4, 5)
    masks[index] = 1
    soft = SoftMasks(masks, torch.ones(2), torch.ones(2, dtype=torch.bool))
    refined = np.full((4, 5), index, np.uint8)
    found.write(source, found.key(source), read_picture(source.path, 100), soft, refined)
    return found


@pytest.mark.parametrize("renamed", [0, 1])
def test_a_kill_leaves_no_mask_beside_files_of_other_arguments(
    renamed: int, source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = write(source, tmp_path / "out", 1.0, 1)
    assert first.find(source, first.key(source)) == [1.0, 1.0]
    replace = os.replace
    calls: list[tuple[Path, ...]] = []

    def killed(*paths: Path) -> None:
        if len(calls) == renamed:
            raise KeyboardInterrupt
        calls.append(paths)
        replace(*paths)

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        write(source, tmp_path / "out", 2.0, 2)
    assert read_mask(tmp_path / "out/crf/a.png").max() == 1 + renamed
    assert first.find(source, first.key(source)) is None
    assert sorted(path.name for path in (tmp_path / "out").rglob("*.png")) == ["a.png"]


def test_an_image_that_was_deleted(source: Source, tmp_path: Path) -> None:
    source.path.unlink()
    with pytest.raises(DataError, match="not found"):
        Outputs(tmp_path, ["masks"], {}).key(source)


def test_a_file_that_is_replaced_while_it_is_read(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def replaced(path: Path, max_pixels: int) -> Picture:
        picture = read_picture(path, max_pixels)
        Image.new("RGB", (7, 7)).save(path)
        return picture

    found = Outputs(tmp_path / "out", ["masks"], {})
    found.make_folders()
    before = found.key(source)
    monkeypatch.setattr(pipeline, "read_picture", replaced)
    work = Pipeline(None, 100, found, None, 1).read(source, None)  # type: ignore[arg-type]
    assert isinstance(work, Work)
    work.claim.release()
    assert work.key == before != found.key(source)
