"""Overlays and curves."""

from pathlib import Path
from typing import Any

import matplotlib.axes
import numpy as np
import pytest
import torch
from voc.visualise import overlay, save_curves


def test_overlay_leaves_the_background_as_it_is() -> None:
    image = torch.rand(3, 2, 2)
    painted = overlay(image, torch.tensor([[0, 1], [0, 255]]))
    pixels = image.permute(1, 2, 0).double().numpy()
    np.testing.assert_allclose(painted[:, 0], pixels[:, 0])
    assert np.abs(painted[:, 1] - pixels[:, 1]).max() > 0.1


@pytest.mark.parametrize("classification_epochs", [None, 0, 2])
def test_curves_mark_the_start_of_self_supervision(
    classification_epochs: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[float] = []

    def recorded(_: Any, x: float, **_kwargs: Any) -> None:
        drawn.append(x)

    monkeypatch.setattr(matplotlib.axes.Axes, "axvline", recorded)
    history = [{"loss": 1.0, "miou": 30.0}, {"loss": 0.5, "miou": 40.0}]
    save_curves(tmp_path / "curves.png", {"ours": history}, classification_epochs)
    assert drawn == ([] if classification_epochs is None else [classification_epochs + 0.5] * 2)
    assert (tmp_path / "curves.png").stat().st_size > 1000
