"""Which columns of CAM-GAP the report shows."""

import torch
from voc.evaluation.network import Evaluation
from voc.evaluation.report import Report


def percent(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


TEST = {"score 0.1": percent(10, 20), "score 0.2": percent(90, 80), "score 0.3": percent(30, 40)}
TRAINING = {"score 0.1": percent(50, 20), "score 0.2": percent(40, 50), "score 0.3": percent(10, 60)}


def columns(rows: list[int], training: dict[str, torch.Tensor] | None) -> list[str]:
    report = Report(("background", "cat"), rows)
    report.add("CAM-GAP", Evaluation(TEST, percent(50)), [], training)
    for name, iou in report.iou.items():
        assert torch.equal(iou, TEST[name])
    return list(report.iou)


def test_the_score_is_chosen_on_training_images() -> None:
    assert columns([0, 1], TRAINING) == ["score 0.1", "score 0.2"]
    assert columns([1], TRAINING) == ["score 0.1", "score 0.3"]
    assert columns([0], TRAINING) == ["score 0.1"]


def test_without_training_masks_there_is_no_choice() -> None:
    assert columns([0, 1], {}) == ["score 0.1"]


def test_refined_masks_stand_beside_the_chosen_ones() -> None:
    report = Report(("background", "cat"), [0, 1])
    refined = {f"{name} + PAR": 1 + iou for name, iou in TEST.items()}
    report.add("CAM-GAP", Evaluation(TEST | refined, percent(50)), [], TRAINING)
    assert set(report.iou) == {"score 0.1", "score 0.1 + PAR", "score 0.2", "score 0.2 + PAR"}


def test_all_columns_of_our_model() -> None:
    assert columns([0, 1], None) == list(TEST)
