"""IoU by hand, and the table."""

from pathlib import Path

import pytest
import torch
from voc.metrics import IoUMeter, iou_table, load_iou_csv, mean_iou, save_iou_csv


def test_iou_by_hand() -> None:
    meter = IoUMeter(4)
    meter.update(torch.tensor([[0, 0, 1], [1, 1, 2]]), torch.tensor([[0, 1, 1], [1, 255, 1]]))
    meter.update(torch.tensor([[2]]), torch.tensor([[2]]))
    # class 0: 1 right, 2 claimed, 1 there. class 1: 2 right, 2 claimed (void aside), 4 there. class 2: 1, 2, 1
    assert meter.iou()[:3].tolist() == pytest.approx([100 * 1 / 2, 100 * 2 / 4, 100 * 1 / 2])
    assert meter.iou()[3].isnan()
    assert mean_iou(meter.iou()) == pytest.approx(50)
    assert mean_iou(meter.iou(), rows=[1, 3]) == pytest.approx(50)


def test_a_perfect_mask() -> None:
    meter = IoUMeter(3)
    mask = torch.tensor([[0, 1], [2, 2]])
    meter.update(mask, mask)
    assert meter.iou().tolist() == [100, 100, 100]


def test_table() -> None:
    columns = {"CAM-GAP": torch.tensor([80.0, 20.0, float("nan")]), "ours": torch.tensor([90.0, 50.0, 10.0])}
    table = iou_table(["background", "cat", "dog"], columns, rows=[0, 1]).splitlines()
    assert table[0] == "| class | CAM-GAP | ours |"
    assert table[2:] == [
        "| background | 80.0 | 90.0 |",
        "| cat | 20.0 | 50.0 |",
        "| **mean of 2** | **50.0** | **70.0** |",
    ]


def test_csv_round_trip(tmp_path: Path) -> None:
    columns = {"CAM-GAP": torch.tensor([80.0, float("nan")]), "ours": torch.tensor([90.0, 50.0])}
    save_iou_csv(tmp_path / "iou.csv", ["background", "cat"], columns)
    classes, read = load_iou_csv(tmp_path / "iou.csv")
    assert classes == ("background", "cat")
    assert list(read) == list(columns)
    for name, iou in columns.items():
        torch.testing.assert_close(read[name], iou.double(), equal_nan=True)
