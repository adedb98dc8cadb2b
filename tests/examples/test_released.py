"""The published network: its forward pass, written down from its keys alone, against ours with the same weights."""

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from infer_voc import main
from PIL import Image
from torch import Tensor
from voc.backbones import WeightsError, build_backbone
from voc.dataset.images import read_image, read_mask
from voc.dataset.layout import VOC_CLASSES
from voc.inference.masks import multi_scale_masks, segment
from voc.model import SingleStageNet
from voc.released import MODULES, PAMR_PREFIX, load_released_checkpoint

SIZE = (41, 33)


class Published(Mapping[str, Tensor]):
    """A published state_dict that records the keys that were read."""

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        self.weights = weights
        self.read: set[str] = set()

    def __getitem__(self, key: str) -> Tensor:
        self.read.add(key)
        return self.weights[key]

    def __iter__(self):  # type: ignore[no-untyped-def]
        return iter(self.weights)

    def __len__(self) -> int:
        return len(self.weights)

    def norm(self, x: Tensor, name: str, affine: bool = True) -> Tensor:
        weight, bias = (self[f"{name}.weight"], self[f"{name}.bias"]) if affine else (None, None)
        return F.batch_norm(x, self[f"{name}.running_mean"], self[f"{name}.running_var"], weight, bias, eps=1e-5)

    def conv(self, x: Tensor, name: str, stride: int = 1, dilation: int = 1, bias: bool = False) -> Tensor:
        weight = self[f"{name}.weight"]
        padding = dilation * (weight.shape[-1] // 2)
        return F.conv2d(x, weight, self[f"{name}.bias"] if bias else None, stride, padding, dilation)


def wide_resnet38(p: Published, x: Tensor) -> tuple[Tensor, Tensor]:
    x = p.conv(x, "conv1a")
    for stage, blocks in ((2, 3), (3, 3), (4, 6), (5, 3)):
        for index in range(blocks):
            name = f"b{stage}" + (f"_{index}" if index else "")
            stride = 2 if index == 0 and stage < 5 else 1
            dilation = 2 if stage == 5 else 1
            out = F.relu(p.norm(x, f"{name}.bn_branch2a"))
            if index == 0:
                x = p.conv(out, f"{name}.conv_branch1", stride)
            out = p.conv(out, f"{name}.conv_branch2a", stride, 1 if index == 0 else dilation)
            out = F.relu(p.norm(out, f"{name}.bn_branch2b1"))
            x = x + p.conv(out, f"{name}.conv_branch2b1", 1, dilation)
        if stage == 3:
            conv3 = x
    for name in ("b6", "b7"):
        first = F.relu(p.norm(x, f"{name}.bn_branch2a"))
        out = F.relu(p.norm(p.conv(first, f"{name}.conv_branch2a"), f"{name}.bn_branch2b1"))
        out = F.relu(p.norm(p.conv(out, f"{name}.conv_branch2b1", dilation=4), f"{name}.bn_branch2b2"))
        x = p.conv(first, f"{name}.conv_branch1") + p.conv(out, f"{name}.conv_branch2b2")
    return conv3, F.relu(p.norm(x, "bn7"))


def resnet50(p: Published, x: Tensor) -> tuple[Tensor, Tensor]:
    x = F.conv2d(x, p["conv1.weight"], stride=2, padding=3)
    x = F.max_pool2d(F.relu(p.norm(x, "bn1")), 3, 2, 1)
    for layer, blocks in enumerate((3, 4, 6, 3), start=1):
        for index in range(blocks):
            name = f"layer{layer}.{index}"
            stride = 2 if index == 0 and layer in (2, 3) else 1
            out = F.relu(p.norm(p.conv(x, f"{name}.conv1"), f"{name}.bn1"))
            out = F.relu(p.norm(p.conv(out, f"{name}.conv2", stride), f"{name}.bn2"))
            out = p.norm(p.conv(out, f"{name}.conv3"), f"{name}.bn3")
            if index == 0:
                x = p.norm(p.conv(x, f"{name}.downsample.0", stride), f"{name}.downsample.1")
            x = F.relu(out + x)
        if layer == 1:
            conv3 = x
    return conv3, x


def vgg16(p: Published, x: Tensor) -> tuple[Tensor, Tensor]:
    for stage, convs in enumerate((2, 2, 3, 3, 3), start=1):
        for index in range(1, convs + 1):
            x = F.relu(p.conv(x, f"conv{stage}_{index}", dilation=2 if stage == 5 else 1, bias=True))
        if stage == 3:
            conv3 = x
        if stage < 5:
            x = F.max_pool2d(x, 3, 2 if stage < 4 else 1, 1)
    x = F.relu(p.conv(x, "fc6", bias=True))
    return conv3, F.relu(p.conv(x, "fc7", bias=True))


def published_logits(p: Published, conv3: Tensor, conv6: Tensor) -> Tensor:
    def resized(x: Tensor, size: torch.Size) -> Tensor:
        return F.interpolate(x, size=size, mode="bilinear", align_corners=True)

    branches = [
        F.relu(p.norm(p.conv(conv6, f"aspp.aspp{i}.atrous_conv", dilation=dilation), f"aspp.aspp{i}.bn"))
        for i, dilation in enumerate((1, 12, 24, 36), start=1)
    ]
    pooled = p.conv(conv6.mean(dim=(2, 3), keepdim=True), "aspp.global_avg_pool.1")
    branches.append(resized(F.relu(p.norm(pooled, "aspp.global_avg_pool.2")), conv6.shape[-2:]))
    aspp = F.relu(p.norm(p.conv(torch.cat(branches, dim=1), "aspp.conv1"), "aspp.bn1"))
    skip = F.relu(p.norm(p.conv(conv3, "fc8_skip.0"), "fc8_skip.1"))
    deep = torch.cat([resized(aspp, conv3.shape[-2:]), skip], dim=1)
    deep = F.relu(p.norm(p.conv(deep, "fc8_x.0"), "fc8_x.1"))
    cues = F.relu(p.norm(p.conv(deep, "shallow_mask.fc_deep.0"), "shallow_mask.fc_deep.1"))
    gamma, beta = cues.amax(dim=(2, 3), keepdim=True).chunk(2, dim=1)
    shallow = p.norm(p.conv(conv3, "shallow_mask.fc_skip.0"), "shallow_mask.fc_skip.1", affine=False)
    shallow = F.relu(shallow * (gamma + 1) + beta)
    shallow = F.relu(p.norm(p.conv(shallow, "shallow_mask.fc_cls.0"), "shallow_mask.fc_cls.1"))
    x = 0.7 * deep + 0.3 * shallow  # the gate in eval mode, eq. 10
    x = F.relu(p.norm(p.conv(x, "last_conv.0"), "last_conv.1"))
    x = F.relu(p.norm(p.conv(x, "last_conv.4"), "last_conv.5"))
    x = p.conv(x, "last_conv.8", bias=True)
    return torch.cat([torch.ones_like(x[:, :1]), x], dim=1)


def published_weights(model: SingleStageNet) -> dict[str, Tensor]:
    """Return the weights of a model under the published names."""
    weights = {}
    for key, value in model.state_dict().items():
        name = key.removeprefix("backbone.")
        for published, ours in MODULES.items():
            if key.startswith(ours + "."):
                name = published + key.removeprefix(ours)
        weights[name] = value
    for kernel, count in (("x", 8), ("m", 8), ("std", 9)):
        weights[f"{PAMR_PREFIX}aff_{kernel}.kernel"] = torch.zeros(count, 1, 3, 3)
    return weights


def random_network(name: str) -> SingleStageNet:
    """Return a network in eval mode with random BatchNorm statistics."""
    model = SingleStageNet(build_backbone(name), 20).eval()
    for key, value in model.state_dict().items():
        if re.search(r"running_|norm|bn", key) and value.is_floating_point():
            value.uniform_(0.5, 1.5) if key.endswith(("var", "weight")) else value.normal_(std=0.1)
    return model


@pytest.mark.parametrize(
    ("name", "reference"), [("wide_resnet38", wide_resnet38), ("resnet50", resnet50), ("vgg16", vgg16)]
)
def test_the_published_network(name, reference) -> None:  # type: ignore[no-untyped-def]
    torch.manual_seed(0)
    published = Published({key: value.clone() for key, value in published_weights(random_network(name)).items()})
    model = SingleStageNet(build_backbone(name), 20).eval()
    load_released_checkpoint(model, {"model": {f"module.{key}": value for key, value in published.weights.items()}})
    image = torch.randn(1, 3, *SIZE)
    with torch.no_grad():
        prediction = model(image)
        expected = published_logits(published, *reference(published, image))
    scale = expected.abs().max()
    torch.testing.assert_close(prediction.logits / scale, expected / scale, rtol=1e-4, atol=1e-4)
    unread = {key for key in published if not key.startswith(PAMR_PREFIX)} - published.read
    assert all(key.endswith("num_batches_tracked") for key in unread)


def test_released_weights_from_the_command_line(tmp_path: Path) -> None:
    torch.manual_seed(0)
    torch.save({"model": published_weights(random_network("resnet50"))}, tmp_path / "model_enc.pth")
    random = np.random.default_rng(0)
    Image.fromarray(random.integers(0, 256, (30, 41, 3), dtype=np.uint8)).save(tmp_path / "image.png")
    arguments = ["--released", str(tmp_path / "model_enc.pth"), "--backbone", "resnet50", str(tmp_path / "image.png")]
    assert main([*arguments, "--output", str(tmp_path), "--scores", "--device", "cpu"]) == 0

    model = SingleStageNet(build_backbone("resnet50"), 20).eval()
    load_released_checkpoint(model, tmp_path / "model_enc.pth")
    image = read_image(tmp_path / "image.png")
    masks, probabilities = multi_scale_masks(model, image, scales=(1.0, 0.75, 1.25, 1.5))
    masks[0] = masks[0] ** 3
    expected = segment(masks, probabilities, min_probability=0.3)
    np.testing.assert_array_equal(read_mask(tmp_path / "masks/image.png"), expected.numpy())
    header, line = (tmp_path / "scores.csv").read_text().splitlines()
    assert tuple(header.split(",")[1:]) == VOC_CLASSES
    assert [float(value) for value in line.split(",")[1:]] == pytest.approx(probabilities.tolist(), abs=1e-5)


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    return published_weights(random_network("vgg16"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("fc8_x.1.bias"), r"1 missing \(fuse.1.bias"),
        (lambda w: w.update({"fc9.weight": torch.zeros(1)}), r"1 unexpected \(backbone.fc9.weight"),
        (lambda w: w.update({"last_conv.8.bias": torch.zeros(3)}), r"decoder.4.bias has shape \[3\], expected \[20\]"),
    ],
)
def test_missing_and_unknown_keys_are_errors(weights, change, message: str) -> None:  # type: ignore[no-untyped-def]
    changed = dict(weights)
    change(changed)
    with pytest.raises(WeightsError, match=message):
        load_released_checkpoint(SingleStageNet(build_backbone("vgg16"), 20), changed)


def test_a_file_that_holds_no_weights(tmp_path: Path) -> None:
    model = SingleStageNet(build_backbone("efficientnet_lite0"), 2, channels=8)
    with pytest.raises(WeightsError, match="weights not found"):
        load_released_checkpoint(model, tmp_path / "none.pth")
    (tmp_path / "text.pth").write_text("no weights")
    with pytest.raises(WeightsError, match="cannot read weights"):
        load_released_checkpoint(model, tmp_path / "text.pth")
    torch.save({"epoch": 3}, tmp_path / "epoch.pth")
    with pytest.raises(WeightsError, match="it holds epoch"):
        load_released_checkpoint(model, str(tmp_path / "epoch.pth"))
