"""What a training step needs beside the losses: devices, parameter groups, seeds, loaders, one epoch."""

import random

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader

from .data import Sample, VOCDataset
from .model import CAMNet, SingleStageNet

MOMENTUM = 0.9
NEW_WEIGHT, NEW_BIAS, OLD_BIAS = 10, 20, 2  # multiples of the backbone's learning rate


def choose_device(name: str) -> torch.device:
    """Return the device of that name; `auto` takes the first of cuda, mps and cpu that there is."""
    if name != "auto":
        try:
            return torch.empty(0, device=name).device
        except (RuntimeError, AssertionError) as error:
            raise ValueError(f"--device: cannot use {name!r}: {str(error).splitlines()[0]}") from error
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and PyTorch."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def freeze(model: SingleStageNet | CAMNet) -> None:
    """Stop the gradient of the backbone's first layers and of all its BatchNorms."""
    backbone = model.backbone
    for module in backbone.frozen_modules():
        module.requires_grad_(False)
    for module in backbone.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.requires_grad_(False)


def build_optimizer(model: SingleStageNet | CAMNet, lr: float, weight_decay: float) -> torch.optim.SGD:
    """Return SGD with the learning-rate multiples of the paper's implementation; biases are not decayed."""
    new = {id(p) for module in model.new_modules() for p in module.parameters()}
    groups: dict[tuple[int, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        is_bias = name.endswith(".bias")
        multiple = (NEW_BIAS if is_bias else NEW_WEIGHT) if id(parameter) in new else (OLD_BIAS if is_bias else 1)
        groups.setdefault((multiple, 0.0 if is_bias else weight_decay), []).append(parameter)
    return torch.optim.SGD(
        [
            {"params": params, "lr": lr * multiple, "weight_decay": decay}
            for (multiple, decay), params in groups.items()
        ],
        lr=lr,
        momentum=MOMENTUM,
    )


def build_loader(dataset: VOCDataset, batch_size: int, workers: int, seed: int) -> DataLoader[Sample]:
    """Return a shuffling loader; its order and augmentation follow from `seed`."""
    return DataLoader(
        dataset,
        batch_size=batch_size,
        shuffle=True,
        drop_last=len(dataset) > batch_size,  # BatchNorm of a lone last image would be noise
        num_workers=workers,
        persistent_workers=workers > 0,
        generator=torch.Generator().manual_seed(seed),
    )
