"""The benchmark of DenseCRF runs, and compares the same masks."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from voc.checkpoints import save_checkpoint
from voc.dataset.images import IGNORE
from voc.dataset.toy import OBJECTS, toy_voc
from voc.model import build_model
from voc.presets import PRESETS

pytest.importorskip("pydensecrf.densecrf", reason="pydensecrf2 is not installed")

from benchmarks import crf_iou, dense_crf


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_voc(tmp_path_factory.mktemp("data"), num_train=2, num_val=3, seed=1)


def test_the_page(root: Path, tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    page = tmp_path / "page.md"
    assert dense_crf.main([str(root), "--smoke", "--page", str(page), "--images", "2"]) == 0
    assert torch.get_num_threads() == threads
    text = page.read_text()
    for line in ("| 32 x 24, 3 classes | 100.000 % |", "| 2 x 20 x 20, 3 classes | ", "2 images of the split `val`"):
        assert line in text
    assert dense_crf.main([str(root / "nothing"), "--smoke", "--page", str(page)]) == 2
    assert dense_crf.main([str(root), "--smoke", "--page", str(page), "--images", "0"]) == 2
    assert dense_crf.main([str(root), "--smoke", "--page", str(page), "--table-classes", "unicorn"]) == 2
    assert page.read_text() == text


@pytest.mark.parametrize("with_checkpoint", [False, True])
def test_both_crfs_refine_the_same_masks(with_checkpoint: bool, root: Path, tmp_path: Path) -> None:
    checkpoint = None
    if with_checkpoint:
        settings = replace(PRESETS["toy"], channels=8, min_probability=0.2)
        checkpoint = tmp_path / "network.pt"
        save_checkpoint(checkpoint, build_model(settings, len(OBJECTS)), settings, list(OBJECTS), {})
    found = crf_iou.compare_iou(root, 2, checkpoint, ["background", "tiger"])
    assert found.num_images == 2
    assert found.equal > 0.99
    assert found.miou["DenseCRF"] == pytest.approx(found.miou["pydensecrf2"], abs=0.5)
    assert with_checkpoint or found.miou["masks"] != found.miou["DenseCRF"]  # nothing is sure of an untrained network


def test_soft_masks_are_those_of_the_ground_truth() -> None:
    mask = torch.zeros(128, 160, dtype=torch.int64)
    mask[:, 80:] = 3
    mask[:, 75:85] = IGNORE
    soft = crf_iou.blur(mask, [0, 3], seed=0)
    torch.testing.assert_close(soft.sum(dim=0), torch.ones(128, 160))
    assert (soft[0, :, :60] > 0.5).float().mean() > 0.9
    assert (soft[1, :, 100:] > 0.5).float().mean() > 0.9
    assert torch.equal(soft, crf_iou.blur(mask, [0, 3], seed=0))
