"""Overlays."""

import numpy as np
import torch
from voc.visualise import overlay


def test_overlay_leaves_the_background_as_it_is() -> None:
    image = torch.rand(3, 2, 2)
    painted = overlay(image, torch.tensor([[0, 1], [0, 255]]))
    pixels = image.permute(1, 2, 0).double().numpy()
    np.testing.assert_allclose(painted[:, 0], pixels[:, 0])
    assert np.abs(painted[:, 1] - pixels[:, 1]).max() > 0.1
