"""IoU, precision and recall by hand, and the tables."""

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from voc.dataset.layout import VOC_CLASSES
from voc.evaluation.metrics import IoUMeter, average_precision, class_metrics, confusion_matrix, mean_iou
from voc.evaluation.tables import iou_table, load_iou_csv, method_table, save_iou_csv, save_method_csv

NAN = float("nan")


def test_iou_by_hand() -> None:
    meter = IoUMeter(4)
    meter.update(torch.tensor([[0, 0, 1], [1, 1, 2]]), torch.tensor([[0, 1, 1], [1, 255, 1]]))
    meter.update(torch.tensor([[2]]), torch.tensor([[2]]))
    # (correct, predicted without void, actual): class 0: 1, 2, 1; class 1: 2, 2, 4; class 2: 1, 2, 1
    assert meter.iou()[:3].tolist() == pytest.approx([100 * 1 / 2, 100 * 2 / 4, 100 * 1 / 2])
    assert meter.iou()[3].isnan()
    assert mean_iou(meter.iou()) == pytest.approx(50)
    assert mean_iou(meter.iou(), rows=[1, 3]) == pytest.approx(50)


def test_a_perfect_mask() -> None:
    meter = IoUMeter(3)
    mask = torch.tensor([[0, 1], [2, 2]])
    meter.update(mask, mask)
    assert meter.iou().tolist() == [100, 100, 100]


def test_precision_and_recall_by_hand() -> None:
    predicted = torch.tensor([[0, 0, 1, 1], [1, 1, 3, 0]], dtype=torch.uint8)
    target = torch.tensor([[0, 1, 1, 1], [255, 0, 0, 2]], dtype=torch.uint8)
    metrics = class_metrics(confusion_matrix(predicted, target, 5))
    # (correct, predicted without void, actual): class 0: 1, 3, 3; class 1: 2, 3, 3; class 2: 0, 0, 1; class 3: 0, 1, 0;
    # class 4: 0, 0, 0
    expected = [[20, 50, 0, 0, NAN], [100 / 3, 200 / 3, NAN, 0, NAN], [100 / 3, 200 / 3, 0, NAN, NAN]]
    for values, by_hand in zip(metrics, expected, strict=True):
        assert values.tolist() == pytest.approx(by_hand, nan_ok=True)
    assert mean_iou(metrics.iou) == pytest.approx(17.5)
    assert mean_iou(metrics.precision) == pytest.approx(100 / 3)


def test_nothing_but_void() -> None:
    metrics = class_metrics(confusion_matrix(torch.tensor([[0, 1]]), torch.tensor([[255, 255]]), 2))
    assert all(values.isnan().all() for values in metrics)
    assert math.isnan(mean_iou(metrics.iou))


@given(st.lists(st.tuples(st.integers(0, 20), st.sampled_from([*range(21), 255])), min_size=1, max_size=40))
def test_metrics_are_those_of_counted_pixels(pixels: list[tuple[int, int]]) -> None:
    predicted, target = torch.tensor(pixels, dtype=torch.uint8).T
    metrics = class_metrics(confusion_matrix(predicted, target, 21))
    counted = [(p, t) for p, t in pixels if t != 255]
    for index in range(21):
        right = sum(p == t == index for p, t in counted)
        claimed, there = sum(p == index for p, _ in counted), sum(t == index for _, t in counted)
        either = sum(index in pixel for pixel in counted)
        for values, count in zip(metrics, (either, claimed, there), strict=True):
            assert values[index].item() == pytest.approx(100 * right / count if count else NAN, nan_ok=True)


def average_precision_by_hand(scores: list[float], labels: list[int]) -> float:
    """Return the sum over all thresholds, from the highest, of the recall that each one gains, times its precision."""
    total, recall = 0.0, 0.0
    for threshold in sorted(set(scores), reverse=True):
        found = [label for score, label in zip(scores, labels, strict=True) if score >= threshold]
        gained = sum(found) / sum(labels) - recall
        total += gained * sum(found) / len(found)
        recall += gained
    return 100 * total


@given(st.lists(st.tuples(st.integers(-3, 3), st.integers(0, 1)), min_size=1, max_size=20))
def test_average_precision(images: list[tuple[int, int]]) -> None:
    scores, labels = ([float(score) for score, _ in images], [label for _, label in images])
    found = average_precision(torch.tensor(scores)[:, None], torch.tensor(labels)[:, None])
    expected = average_precision_by_hand(scores, labels) if any(labels) else NAN
    assert found.tolist() == pytest.approx([expected], nan_ok=True)


def test_table() -> None:
    columns = {"CAM-GAP": torch.tensor([80.0, 20.0, NAN]), "ours": torch.tensor([90.0, 50.0, 10.0])}
    table = iou_table(["background", "cat", "dog"], columns, rows=[0, 1]).splitlines()
    assert table[0] == "| class | CAM-GAP | ours |"
    assert table[2:] == [
        "| background | 80.0 | 90.0 |",
        "| cat | 20.0 | 50.0 |",
        "| **mean of 2** | **50.0** | **70.0** |",
    ]


@pytest.fixture
def crf_rnn() -> Tensor:
    """A line of Table 5, whose printed mean is 52.8."""
    line = "85.8 65.2 29.4 63.8 31.2 37.2 69.6 64.3 76.2 21.4 56.3 29.8 68.2 60.6 66.2 55.8 30.8 66.1 34.9 48.8 47.1"
    return torch.tensor([float(value) for value in line.split()], dtype=torch.float64)


def test_a_line_of_table_5(crf_rnn: Tensor) -> None:
    classes = ("background", *VOC_CLASSES)
    header, _, line = method_table(classes, {"CRF-RNN [43]": crf_rnn}).splitlines()
    columns = "bg aero bike bird boat bot. bus car cat chair cow tab. dog horse mbk per. plant sheep sofa train tv mean"
    assert header.strip("| ").split(" | ") == ["Method", *columns.split()]
    assert line.startswith("| CRF-RNN [43] | 85.8 | 65.2 | 29.4 | ")
    assert line.endswith(" | 48.8 | 47.1 | 52.8 |")
    header, _, line = method_table(classes, {"CRF-RNN [43]": crf_rnn}, rows=[0, 8, 15]).splitlines()
    assert (header, line) == ("| Method | bg | cat | per. | mean |", "| CRF-RNN [43] | 85.8 | 76.2 | 55.8 | 72.6 |")


def test_other_classes_keep_their_names(tmp_path: Path) -> None:
    methods = {"a|b": torch.tensor([80.0, NAN, 20.0]), "c": torch.tensor([1.0, 2.0, 3.0])}
    table = method_table(["background", "person", "unicorn"], methods)
    assert table.splitlines() == [
        "| Method | background | person | unicorn | mean |",
        "|:--|--:|--:|--:|--:|",
        r"| a\|b | 80.0 | nan | 20.0 | 50.0 |",
        "| c | 1.0 | 2.0 | 3.0 | 2.0 |",
    ]
    save_method_csv(tmp_path / "methods.csv", ["background", "person", "unicorn"], methods, rows=[2])
    assert (tmp_path / "methods.csv").read_text().splitlines() == [
        "Method,unicorn,mean",
        "a|b,20.0000,20.0000",
        "c,3.0000,3.0000",
    ]


def test_csv_round_trip(tmp_path: Path) -> None:
    columns = {"CAM-GAP": torch.tensor([80.0, NAN]), "ours": torch.tensor([90.0, 50.0])}
    save_iou_csv(tmp_path / "iou.csv", ["background", "cat"], columns)
    classes, read = load_iou_csv(tmp_path / "iou.csv")
    assert classes == ("background", "cat")
    assert list(read) == list(columns)
    for name, iou in columns.items():
        torch.testing.assert_close(read[name], iou.double(), equal_nan=True)
