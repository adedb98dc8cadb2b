"""Which background scores of CAM-GAP the table shows."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from voc.evaluation import network
from voc.evaluation.network import CAM_BACKGROUNDS, Evaluation, cam_backgrounds
from voc.model import CAMNet
from voc.presets import PAPER
from voc.train.distribution import ALONE

# IoU of background and one class on training images, by background score.
TRAINING = [(50, 20), (40, 50), (10, 60)] + [(0, 0)] * (len(CAM_BACKGROUNDS) - 3)


def chosen(rows: list[int], dataset: Sequence[int], monkeypatch: pytest.MonkeyPatch) -> tuple[float, ...]:
    def evaluate(_model: CAMNet, images: Sequence[int], *_others: Any) -> Evaluation:
        assert images is dataset
        iou = [torch.tensor(values, dtype=torch.float64) for values in TRAINING]
        return Evaluation({str(score): one for score, one in zip(CAM_BACKGROUNDS, iou, strict=True)}, torch.zeros(1))

    monkeypatch.setattr(network, "evaluate", evaluate)
    model = CAMNet.__new__(CAMNet)
    return cam_backgrounds(model, dataset, rows, PAPER, torch.device("cpu"), ALONE)  # type: ignore[arg-type]


@pytest.mark.parametrize(("rows", "best"), [([0, 1], (0.1, 0.2)), ([1], (0.1, 0.3)), ([0], (0.1,))])
def test_the_score_is_chosen_on_training_images(
    rows: list[int], best: tuple[float, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert chosen(rows, [7], monkeypatch) == best


def test_without_training_masks_there_is_no_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    assert chosen([0, 1], [], monkeypatch) == (0.1,)
