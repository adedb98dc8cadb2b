"""Dilated depthwise convolutions by phases are PyTorch's own, in value and gradients."""

import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import gradcheck
from voc.backbones.efficientnet_lite import SameConv2d
from voc.backbones.phases import depthwise_by_phases, join_phases, split_phases

SIDES = st.integers(1, 11)


@given(SIDES, SIDES, st.integers(1, 3), st.integers(1, 4))
def test_split_and_join(height: int, width: int, batch: int, dilation: int) -> None:
    x = torch.rand(batch, 2, height, width)
    assert torch.equal(join_phases(split_phases(x, dilation), dilation, (height, width)), x)


@given(SIDES, SIDES, st.sampled_from([1, 3, 5]), st.integers(1, 4), st.booleans())
def test_equals_the_dilated_convolution(height: int, width: int, kernel: int, dilation: int, has_bias: bool) -> None:
    x = torch.randn(2, 3, height, width, dtype=torch.float64)
    weight = torch.randn(3, 1, kernel, kernel, dtype=torch.float64)
    bias = torch.randn(3, dtype=torch.float64) if has_bias else None
    expected = F.conv2d(x, weight, bias, padding=dilation * (kernel // 2), dilation=dilation, groups=3)
    torch.testing.assert_close(depthwise_by_phases(x, weight, bias, dilation), expected)


def test_gradients() -> None:
    shapes = ((2, 3, 5, 4), (3, 1, 3, 3), (3,))
    inputs = tuple(torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes)
    assert gradcheck(lambda x, weight, bias: depthwise_by_phases(x, weight, bias, 2), inputs)


def test_a_layer_has_one_result_in_training_and_inference() -> None:
    layer = SameConv2d(4, 4, 5, dilation=2, groups=4).double()
    x = torch.randn(2, 4, 7, 6, dtype=torch.float64)
    torch.testing.assert_close(layer(x.clone().requires_grad_()), layer(x))
