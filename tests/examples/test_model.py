"""The network, its baseline, what is frozen, and how parameters are grouped."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from voc.backbones import Backbone, EfficientNetLite0, build_backbone, normalise, pretrained_backbone
from voc.backbones.conv_norm import conv_norm
from voc.backbones.efficientnet_lite import SameConv2d
from voc.dataset.errors import DataError
from voc.inference.masks import multi_scale_masks, segment
from voc.model import CAMNet, Network, SingleStageNet, build_model
from voc.presets import PAPER
from voc.train.optimizer import build_optimizer, freeze, freeze_norm_statistics

from tests import reference
from wsseg_layers import functional as WF


class TinyBackbone(Backbone):
    """Two convolutions at strides 4 and 16 with random weights: quick to build and to run."""

    mean = (0.5, 0.4, 0.3)
    std = (0.2, 0.3, 0.4)
    conv3_channels = 5
    conv6_channels = 7

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 5, 3, stride=4, padding=1)
        self.norm = nn.BatchNorm2d(5)
        self.second = nn.Conv2d(5, 7, 3, stride=4, padding=1)

    def frozen_modules(self) -> list[nn.Module]:
        return [self.first]

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        conv3 = self.norm(self.first(image)).relu()
        return conv3, self.second(conv3).relu()


@pytest.fixture(params=["ours", "CAM-GAP"])
def model(request: pytest.FixtureRequest) -> SingleStageNet | CAMNet:
    torch.manual_seed(0)
    return SingleStageNet(TinyBackbone(), 3, channels=8) if request.param == "ours" else CAMNet(TinyBackbone(), 3)


@pytest.fixture
def ours() -> SingleStageNet:
    torch.manual_seed(0)
    return SingleStageNet(TinyBackbone(), 3, channels=8)


@pytest.mark.parametrize("size", [(64, 64), (33, 50), (17, 5)])
def test_shapes(model: SingleStageNet | CAMNet, size: tuple[int, int]) -> None:
    prediction = model.eval()(torch.randn(2, 3, *size))
    assert prediction.class_scores.shape == (2, 3)
    assert prediction.masks.shape[:2] == (2, 4)
    assert prediction.masks.min() >= 0
    assert prediction.masks.max() <= 1


def test_scores_and_masks_belong_together(ours: SingleStageNet) -> None:
    class_scores, logits, masks = ours.eval()(torch.randn(2, 3, 40, 32))
    assert masks.shape[-2:] == (10, 8)
    assert (logits[:, 0] == 1).all()
    torch.testing.assert_close(masks, logits.softmax(1))
    expected = WF.ngwp_pool(logits[:, 1:], masks[:, 1:]) + WF.focal_size_penalty(masks[:, 1:])
    torch.testing.assert_close(class_scores, expected)


def test_normalisation_of_gci() -> None:
    assert SingleStageNet(TinyBackbone(), 3, channels=8).gci.norm == "batch"
    assert SingleStageNet(TinyBackbone(), 3, channels=8, gci_norm="instance").gci.norm == "instance"


def test_cam_is_normalised_per_class() -> None:
    torch.manual_seed(0)
    masks = CAMNet(TinyBackbone(), 3).eval()(torch.randn(2, 3, 64, 64)).masks
    assert (masks[:, 0] == 0.1).all()
    highest = masks[:, 1:].amax(dim=(2, 3))
    assert ((highest == 0) | ((highest - 1).abs() < 1e-2)).all()


def test_every_trainable_parameter_learns(model: SingleStageNet | CAMNet) -> None:
    freeze(model)
    model.train()
    prediction = model(torch.randn(4, 3, 64, 64))
    (prediction.class_scores.square().sum() + prediction.logits.square().sum()).backward()
    without = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert without == []
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {f"backbone.{name}" for name in ("first.weight", "first.bias", "norm.weight", "norm.bias")}


def test_frozen_statistics(ours: SingleStageNet) -> None:
    def statistics(module: nn.Module) -> dict[str, Tensor]:
        return {key: value.clone() for key, value in module.state_dict().items() if "running_" in key}

    ours.train()
    freeze_norm_statistics(ours)
    before = statistics(ours)
    ours(torch.randn(4, 3, 64, 64))
    changed = {key for key, value in statistics(ours).items() if not torch.equal(value, before[key])}
    assert changed
    assert not any(key.startswith(("backbone", "aspp")) for key in changed)


def test_parameter_groups(ours: SingleStageNet) -> None:
    freeze(ours)
    optimizer = build_optimizer(ours, lr=0.1, weight_decay=0.5)
    rates = {id(p): (group["lr"], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]}
    parameters = dict(ours.named_parameters())
    assert rates[id(parameters["backbone.second.weight"])] == pytest.approx((0.1, 0.5))
    assert rates[id(parameters["backbone.second.bias"])] == pytest.approx((0.2, 0))
    assert rates[id(parameters["decoder.4.weight"])] == pytest.approx((1.0, 0.5))
    assert rates[id(parameters["decoder.4.bias"])] == pytest.approx((2.0, 0))
    assert set(rates) == {id(p) for p in ours.parameters() if p.requires_grad}


def test_parameter_groups_of_adamw(ours: SingleStageNet) -> None:
    freeze(ours)
    optimizer = build_optimizer(ours, lr=0.1, weight_decay=0.5, name="adamw")
    assert isinstance(optimizer, torch.optim.AdamW)
    rates = {id(p): (group["lr"], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]}
    parameters = dict(ours.named_parameters())
    assert rates[id(parameters["backbone.second.weight"])] == pytest.approx((0.1, 0.5))
    assert rates[id(parameters["backbone.second.bias"])] == pytest.approx((0.1, 0))
    assert rates[id(parameters["decoder.4.weight"])] == pytest.approx((1.0, 0.5))
    assert rates[id(parameters["fuse.1.weight"])] == pytest.approx((1.0, 0))  # a scale of BatchNorm
    assert set(rates) == {id(p) for p in ours.parameters() if p.requires_grad}


def test_settings_of_aspp_reach_the_network() -> None:
    def network(**changes: Any) -> Network:
        settings = replace(PAPER, channels=8, **changes)
        return build_model(settings, 2, TinyBackbone())

    plain, local = network(), network(aspp_dilations=(1, 2, 3), aspp_image_pool=False)
    assert isinstance(plain, SingleStageNet)
    assert isinstance(local, SingleStageNet)
    dilations = [[branch[0].dilation for branch in one.aspp.branches[1:]] for one in (plain, local)]  # type: ignore[index]
    assert dilations == [[(12, 12), (24, 24), (36, 36)], [(1, 1), (2, 2), (3, 3)]]
    assert plain.aspp.image_pool is not None
    assert local.aspp.image_pool is None


def test_normalise() -> None:
    image = torch.rand(2, 3, 4, 5)
    mean, std = torch.tensor(TinyBackbone.mean), torch.tensor(TinyBackbone.std)
    expected = (image.permute(0, 2, 3, 1) - mean) / std
    torch.testing.assert_close(normalise(image, TinyBackbone()).permute(0, 2, 3, 1), expected)


def test_memory_format_of_images() -> None:
    image = torch.rand(2, 3, 4, 5)
    assert normalise(image, EfficientNetLite0()).is_contiguous(memory_format=torch.channels_last)
    assert normalise(image, TinyBackbone().train()).is_contiguous()
    assert normalise(image, TinyBackbone().eval()).is_contiguous(memory_format=torch.channels_last)
    assert TinyBackbone().memory_format(torch.device("cuda")) == torch.channels_last


def test_multi_scale_masks_average(ours: SingleStageNet) -> None:
    ours.eval()
    image = torch.rand(3, 31, 45)
    masks, probabilities = multi_scale_masks(ours, image, scales=(1.0, 0.5), flip=True)
    singles = [
        multi_scale_masks(ours, picture, scales=(scale,), flip=False)
        for scale in (1.0, 0.5)
        for picture in (image, image.flip(-1))
    ]
    expected = torch.stack([m.flip(-1) if i % 2 else m for i, (m, _) in enumerate(singles)]).mean(0)
    torch.testing.assert_close(masks, expected)
    torch.testing.assert_close(probabilities, torch.stack([p for _, p in singles]).amax(0))
    torch.testing.assert_close(masks.sum(0), torch.ones(31, 45))


@pytest.mark.parametrize("side", [45, 46, 64])
def test_padding(ours: SingleStageNet, side: int) -> None:
    ours.eval()
    image = torch.rand(3, 30, 45)
    top, left = (side - 30) // 2, (side - 45) // 2
    mean, std = (torch.tensor(values)[:, None, None] for values in (TinyBackbone.mean, TinyBackbone.std))
    square = torch.zeros(1, 3, side, side)
    square[0, :, top : top + 30, left : left + 45] = (image - mean) / std
    output = ours(square)
    whole = F.interpolate(output.masks, size=(side, side), mode="bilinear", align_corners=True)
    masks, probabilities = multi_scale_masks(ours, image, flip=False, pad_to=side)
    torch.testing.assert_close(masks, whole[0, :, top : top + 30, left : left + 45])
    torch.testing.assert_close(probabilities, output.class_scores[0].sigmoid())
    with pytest.raises(DataError, match="scaled to 90x60 pixels, it does not fit into --pad-to 64"):
        multi_scale_masks(ours, image, scales=(2.0,), pad_to=64)


def test_segment_by_hand() -> None:
    masks = torch.tensor([[0.4, 0.2, 0.1], [0.3, 0.5, 0.3], [0.3, 0.3, 0.6]])[:, None]
    assert segment(masks, torch.tensor([0.9, 0.9])).tolist() == [[0, 1, 2]]
    assert segment(masks, torch.tensor([0.9, 0.05])).tolist() == [[0, 1, 1]]
    assert segment(masks, torch.tensor([0.9, 0.05]), min_probability=0.01).tolist() == [[0, 1, 2]]
    assert segment(masks, torch.tensor([0.0, 0.0])).tolist() == [[0, 0, 0]]


@pytest.mark.parametrize("size", [(64, 64), (65, 65), (97, 66)])
def test_efficientnet_strides(size: tuple[int, int]) -> None:
    conv3, conv6 = EfficientNetLite0().eval()(torch.randn(1, 3, *size))
    assert conv3.shape == (1, 24, -(-size[0] // 4), -(-size[1] // 4))
    assert conv6.shape == (1, 1280, -(-size[0] // 16), -(-size[1] // 16))


def test_efficientnet_weights_are_those_of_imagenet() -> None:
    backbone = pretrained_backbone("efficientnet_lite0").eval()
    # The running statistics of BatchNorm fit the features only if the weights are the trained ones.
    seen: list[Tensor] = []
    block = backbone.get_submodule("_blocks.3")
    block.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    image = torch.rand(1, 3, 8, 8).repeat_interleave(20, -1).repeat_interleave(20, -2)
    with torch.no_grad():
        backbone(normalise(image, backbone))
        normalised = block.get_submodule("_bn0")(block.get_submodule("_expand_conv")(seen[0]))
    assert 0.1 < normalised.std().item() < 10


@pytest.mark.parametrize(("stride", "dilation", "side"), [(1, 1, 9), (2, 1, 8), (1, 2, 7)])
def test_convolution_and_fixed_norm_are_one(stride: int, dilation: int, side: int) -> None:
    torch.manual_seed(0)
    conv = SameConv2d(6, 6, 3, stride=stride, dilation=dilation, groups=6, bias=False).double()
    norm = nn.BatchNorm2d(6).double()
    for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
        assert tensor is not None
        nn.init.uniform_(tensor, 0.5, 2)
    x = torch.randn(4, 6, side, side, dtype=torch.float64)
    norm.train()
    before = norm.state_dict()["running_mean"].clone()
    torch.testing.assert_close(conv_norm(x, conv, norm).mean(dim=(0, 2, 3)), norm.bias)  # of the batch: mean is 0
    assert not torch.equal(norm.state_dict()["running_mean"], before)
    norm.eval()
    direct, folded = norm(conv(x)), conv_norm(x, conv, norm)
    torch.testing.assert_close(folded, direct)
    gradients = [torch.autograd.grad(out.square().sum(), [conv.weight, norm.weight]) for out in (direct, folded)]
    torch.testing.assert_close(gradients[1], gradients[0])


def test_unknown_backbone() -> None:
    with pytest.raises(ValueError, match=r"unknown backbone 'resnet7': expected one of"):
        build_backbone("resnet7")


def test_features_of_stride_8_in_the_skip() -> None:
    torch.manual_seed(0)
    backbone = EfficientNetLite0()
    model = SingleStageNet(backbone, 3, channels=8, skip_stride8=True).eval()
    image = torch.randn(1, 3, 64, 48)
    seen: list[Tensor] = []
    model.fuse.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        output = model(image)
        conv3, stride8, conv6 = backbone.features(image)
        assert model.skip_stride8 is not None
        parts = [model.aspp(conv6), model.skip(conv3), model.skip_stride8(stride8)]
    assert stride8.shape == (1, 40, 8, 6)
    resized = [reference.resize(part.double().numpy(), 16, 12) for part in parts]
    np.testing.assert_allclose(seen[0].numpy(), np.concatenate(resized, axis=1), atol=1e-4)
    assert output.masks.shape == (1, 4, 16, 12)
    assert any(module is model.skip_stride8 for module in model.new_modules())
    with torch.device("meta"), pytest.raises(ValueError, match="--skip-stride8 needs an EfficientNet-Lite backbone"):
        SingleStageNet(build_backbone("resnet50"), 3, skip_stride8=True)
