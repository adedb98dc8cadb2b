"""ASPP, and convolutions whose kernels are as wide as the map."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck
from voc import aspp as module
from voc.aspp import ASPP, WideConv2d, conv_by_taps, share_inside

SIDES = st.integers(1, 9)
FORMATS = st.sampled_from([torch.contiguous_format, torch.channels_last])


def test_aspp_sees_the_whole_image() -> None:
    aspp = ASPP(4, 6).eval()
    x = torch.randn(1, 4, 9, 7, requires_grad=True)
    out = aspp(x)
    assert out.shape == (1, 6, 9, 7)
    out[0, :, 0, 0].sum().backward()
    assert x.grad is not None
    assert x.grad[0, :, 8, 6].abs().max() > 0


def test_aspp_without_the_mean_sees_as_far_as_its_dilations() -> None:
    aspp = ASPP(4, 6, dilations=(1, 2, 3), image_pool=False).eval()
    x = torch.randn(1, 4, 9, 8, requires_grad=True)
    aspp(x)[0, :, 4, 4].sum().backward()
    assert x.grad is not None
    seen = x.grad[0].abs().amax(dim=0) > 0  # [9, 8]
    rows, columns = torch.meshgrid(torch.arange(9) - 4, torch.arange(8) - 4, indexing="ij")
    distance = torch.maximum(rows.abs(), columns.abs())
    straight = (rows == 0) | (columns == 0) | (rows.abs() == columns.abs())
    assert torch.equal(seen, straight & (distance <= 3))


@given(SIDES, SIDES, st.sampled_from([1, 3, 5]), st.integers(1, 10), FORMATS)
def test_taps_are_the_dilated_convolution(
    height: int, width: int, kernel_size: int, dilation: int, memory_format: torch.memory_format
) -> None:
    x = torch.randn(2, 3, height, width, dtype=torch.float64).contiguous(memory_format=memory_format)
    weight = torch.randn(4, 3, kernel_size, kernel_size, dtype=torch.float64)
    expected = F.conv2d(x, weight, padding=dilation * (kernel_size // 2), dilation=dilation)
    torch.testing.assert_close(conv_by_taps(x, weight, dilation), expected)


@pytest.mark.parametrize("dilation", [1, 2, 4])
def test_gradients_of_taps(dilation: int) -> None:
    shapes = ((2, 2, 4, 3), (3, 2, 3, 3))
    inputs = tuple(torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes)
    assert gradcheck(lambda x, weight: conv_by_taps(x, weight, dilation), inputs)


@given(SIDES, SIDES, st.sampled_from([1, 3, 5]), st.integers(1, 10))
def test_share_inside(height: int, width: int, kernel_size: int, dilation: int) -> None:
    ones, kernel = torch.ones(1, 1, height, width), torch.ones(1, 1, kernel_size, kernel_size)
    products = F.conv2d(ones, kernel, padding=dilation * (kernel_size // 2), dilation=dilation).sum().item()
    share = share_inside(ones.shape[-2:], kernel_size, dilation)
    assert share == pytest.approx(products / (height * width * kernel_size**2))


@pytest.mark.parametrize(("dilation", "is_by_taps"), [(1, False), (3, False), (4, True), (24, True)])
def test_wide_kernels_go_by_taps(monkeypatch: pytest.MonkeyPatch, dilation: int, is_by_taps: bool) -> None:
    calls = []

    def counted(x: Tensor, weight: Tensor, dilation: int) -> Tensor:
        calls.append(dilation)
        return conv_by_taps(x, weight, dilation)

    monkeypatch.setattr(module, "conv_by_taps", counted)
    layer = WideConv2d(3, 4, 3, dilation).double()
    x = torch.randn(2, 3, 9, 9, dtype=torch.float64)
    torch.testing.assert_close(layer(x), F.conv2d(x, layer.weight, padding=dilation, dilation=dilation))
    assert bool(calls) == is_by_taps
