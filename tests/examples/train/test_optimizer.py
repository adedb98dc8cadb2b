"""The decay of the learning rate, and the moving average of the weights."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from voc.train.optimizer import decay_factor, update_average


@given(total=st.integers(1, 1000), power=st.floats(0.1, 4), data=st.data())
def test_the_rate_falls_from_one_to_zero(total: int, power: float, data: st.DataObject) -> None:
    done = data.draw(st.integers(0, total))
    assert decay_factor(done, total, power) == pytest.approx(((total - done) / total) ** power)
    assert decay_factor(0, total, power) == 1
    assert decay_factor(total, total, power) == 0
    assert decay_factor(total + 1, total, power) == 0


@given(steps=st.integers(1, 30), decay=st.floats(0.05, 0.999), seed=st.integers(0, 99))
def test_the_average_of_the_weights(steps: int, decay: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    model = nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3))
    average = copy.deepcopy(model)
    expected = {key: value.double().numpy().copy() for key, value in model.state_dict().items()}
    for step in range(steps):
        for key, value in model.state_dict().items():
            drawn = rng.normal(size=value.shape) if value.is_floating_point() else rng.integers(9, size=value.shape)
            value.copy_(torch.as_tensor(drawn))
            rate = min(decay, (1 + step) / (10 + step)) if value.is_floating_point() else 0
            expected[key] = rate * expected[key] + (1 - rate) * value.double().numpy()
        update_average(average, model, decay, updates=step)
    for key, value in average.state_dict().items():
        np.testing.assert_allclose(value.double().numpy(), expected[key], atol=1e-5)
