"""The procedural data set."""

from pathlib import Path

import numpy as np
import pytest
from voc.dataset.images import read_mask
from voc.dataset.layout import read_classes, read_split
from voc.dataset.splits import VOCDataset, load_split, load_split_with_masks
from voc.dataset.toy import OBJECTS, draw_scene, toy_voc


def test_layout(toy_root: Path) -> None:
    assert read_classes(toy_root) == tuple(OBJECTS)
    train, val = read_split(toy_root, "train"), read_split(toy_root, "val")
    assert (len(train), len(val)) == (12, 4)
    assert not set(train) & set(val)
    assert len(load_split(toy_root, train, tuple(OBJECTS))) == 12
    dataset = VOCDataset(load_split_with_masks(toy_root, val, tuple(OBJECTS)))
    for index in range(4):
        sample = dataset[index]
        assert sample.image.shape[1:] == sample.mask.shape
        assert 1 <= sample.labels.sum() <= 3


def test_the_seed_decides(tmp_path: Path, toy_root: Path) -> None:
    again = toy_voc(tmp_path, num_train=12, num_val=4, seed=1)
    other = toy_voc(tmp_path, num_train=12, num_val=4, seed=2)
    image = "JPEGImages/toy_000003.jpg"
    assert (again / image).read_bytes() == (toy_root / image).read_bytes()
    assert (other / image).read_bytes() != (toy_root / image).read_bytes()


def test_toy_data_is_drawn_once(tmp_path: Path) -> None:
    root = toy_voc(tmp_path, num_train=2, num_val=1)
    mask = root / "SegmentationClass/toy_000000.png"
    mask.write_bytes(b"touched")
    assert toy_voc(tmp_path, num_train=2, num_val=1) == root
    assert mask.read_bytes() == b"touched"
    assert [path.name for path in tmp_path.iterdir()] == [root.name]


@pytest.mark.parametrize("index", range(8))
def test_every_object_can_be_seen(index: int) -> None:
    image, mask = draw_scene(np.random.default_rng(index))
    assert image.shape == (*mask.shape, 3)
    labels = set(np.unique(mask)) - {0}
    assert 1 <= len(labels) <= 3
    assert labels <= set(range(1, len(OBJECTS) + 1))
    assert all((mask == label).mean() >= 0.02 for label in labels)


def test_masks_on_disk_are_those_drawn(toy_root: Path) -> None:
    _, mask = draw_scene(np.random.default_rng((1, 5)))
    assert (read_mask(toy_root / "SegmentationClass/toy_000005.png") == mask).all()
