"""The images to segment, from a folder or a split."""

from pathlib import Path

import pytest
from voc.dataset.errors import DataError
from voc.inference.sources import find_sources, split_sources


def test_a_folder(tmp_path: Path) -> None:
    for name in ("b.JPG", "a.png", "C.jpeg", "notes.txt", "d.Tiff", "no_suffix"):
        (tmp_path / name).touch()
    (tmp_path / "below").mkdir()
    (tmp_path / "below/e.png").touch()
    assert [source.path.name for source in find_sources(tmp_path)] == ["C.jpeg", "a.png", "b.JPG", "d.Tiff"]
    assert [source.name for source in find_sources(tmp_path / "b.JPG")] == ["b"]


@pytest.mark.parametrize("entry", ["../a", "x/../../a", "..", "/JPEGImages/../a.jpg", "..\\a"])
def test_names_outside_the_data_set(entry: str, tmp_path: Path) -> None:
    (tmp_path / "JPEGImages").mkdir()
    (tmp_path / "ImageSets/Segmentation").mkdir(parents=True)
    (tmp_path / "ImageSets/Segmentation/val.txt").write_text(f"good\n{entry}\n")
    with pytest.raises(DataError, match="leads out of the data set"):
        split_sources(tmp_path, "val")


def test_a_split(tmp_path: Path) -> None:
    (tmp_path / "JPEGImages").mkdir()
    (tmp_path / "JPEGImages/b.png").touch()
    (tmp_path / "ImageSets/Segmentation").mkdir(parents=True)
    (tmp_path / "ImageSets/Segmentation/val.txt").write_text("b\n/JPEGImages/a.jpg /SegmentationClassAug/a.png\n")
    sources = split_sources(tmp_path, "val")
    assert [(source.name, source.path.name) for source in sources] == [("b", "b.png"), ("a", "a.jpg")]
