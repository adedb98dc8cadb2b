"""One training step of the published ResNet-50 network, if its record is at hand: see `RELEASED`."""

import importlib.util
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from voc.backbones import build_backbone, normalise
from voc.losses import classification_loss, published_segmentation_loss
from voc.model import SingleStageNet, resize
from voc.presets import paper_settings
from voc.released import load_released_checkpoint, rename_key
from voc.train.optimizer import build_optimizer, freeze, freeze_norm_statistics

from wsseg_layers import PAMR
from wsseg_layers.functional import threshold_pseudo_labels

# A folder with train_resnet50.npz and .json (inputs and outputs of the step), resnet50_keys.json (names and shapes of
# the weights) and weights.py (the function that fills them).
RELEASED = os.environ.get("WSSEG_RELEASED", "")
pytestmark = pytest.mark.skipif(
    not RELEASED, reason="the environment variable WSSEG_RELEASED does not name the folder of the published step"
)


def published_network(folder: Path) -> SingleStageNet:
    """Return the network in training mode, without dropout, with the weights of the record."""
    spec = importlib.util.spec_from_file_location("weights", folder / "weights.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    tensor_for: Callable[[str, list[int], bool], Tensor] = module.tensor_for
    keys: dict[str, Any] = json.loads((folder / "resnet50_keys.json").read_text())
    weights = {key: tensor_for(key, shape, kind == "norm") for key, (shape, kind) in keys.items() if kind != "pamr"}
    weights["last_conv.8.weight"] *= 3
    weights["last_conv.8.bias"] -= 2
    model = SingleStageNet(build_backbone("resnet50"), 20)
    load_released_checkpoint(model, weights)
    freeze(model)
    model.train()
    freeze_norm_statistics(model)
    for layer in model.modules():
        if isinstance(layer, nn.Dropout):
            layer.p = 0
    return model


def test_one_step(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path(RELEASED)
    record = np.load(folder / "train_resnet50.npz")
    expected = json.loads((folder / "train_resnet50.json").read_text())
    settings = paper_settings("resnet50")
    model = published_network(folder)
    image, labels = torch.from_numpy(record["image"]), torch.from_numpy(record["labels"])

    shape = tuple(record["gate_shape"])
    kept = torch.from_numpy(np.unpackbits(record["gate"])[: np.prod(shape)].reshape(shape)).float()
    with monkeypatch.context() as patch:
        patch.setattr(torch, "rand", lambda *_, **__: kept.clone())  # the gate compares it with the mixing rate
        # Contiguous, because rounding differs by memory layout and moves some inputs of ReLU and max pooling across 0.
        output = model(normalise(image, model.backbone).contiguous())
    torch.testing.assert_close(output.class_scores, torch.from_numpy(record["cls"]), rtol=1e-5, atol=1e-5)
    scale = float(np.abs(record["logits"]).max())
    torch.testing.assert_close(output.logits / scale, torch.from_numpy(record["logits"]) / scale, rtol=0, atol=1e-5)

    pamr = PAMR(settings.pamr_iterations, settings.pamr_dilations, resize="image")
    refined = resize(pamr(image, output.masks.detach()), image.shape[-2:])
    target = threshold_pseudo_labels(refined, labels, discard="all")
    np.testing.assert_array_equal(target.numpy(), record["pseudo"])
    classification = classification_loss(output.class_scores, labels)
    segmentation = published_segmentation_loss(output.logits, target)
    assert classification.item() == pytest.approx(record["loss_cls"], rel=1e-5)
    assert segmentation.item() == pytest.approx(record["loss_seg"], rel=1e-5)

    assert settings.lr == expected["lr"]
    optimizer = build_optimizer(model, settings.lr, settings.weight_decay)
    (classification + segmentation).backward()
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    optimizer.step()
    rates = {id(p): (group["lr"], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]}
    found = {}
    for name, parameter in parameters.items():
        assert parameter.grad is not None
        step = parameter.detach() - before[name]
        found[name] = [*rates[id(parameter)], parameter.grad.norm().item(), step.norm().item()]
    assert set(found) == {rename_key(key) for key in expected["params"]}
    for key, values in expected["params"].items():
        assert found[rename_key(key)] == pytest.approx(values, rel=1e-3), key
