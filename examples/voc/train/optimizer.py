"""Which parameters and statistics are trained, and how fast."""

import torch
from torch import nn

from ..model import Network

MOMENTUM = 0.9
NEW_MULTIPLE = 10  # learning rate of weights that start at random, as a multiple of the backbone's


def freeze(model: Network) -> None:
    """Turn off the gradient of the backbone's first layers and of all its BatchNorms."""
    backbone = model.backbone
    for module in backbone.frozen_modules():
        module.requires_grad_(False)
    for module in backbone.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.requires_grad_(False)


def freeze_norm_statistics(model: Network) -> None:
    """Put the pre-trained BatchNorms into eval mode: call it after every `model.train()`."""
    for part in model.frozen_norms():
        for layer in part.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.eval()


def decay_factor(done: int, total: int, power: float) -> float:
    """Return the factor of the learning rates after `done` of `total` steps: 1 at first, 0 after the last step."""
    return max(0.0, 1 - done / total) ** power


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, decay: float, updates: int) -> None:
    """Update the averaged weights and BatchNorm statistics: average = decay * average + (1 - decay) * model.

    The decay is at most (1 + updates) / (10 + updates), where `updates` is the number of earlier updates, so that the
    average forgets the start of the training sooner.
    """
    decay = min(decay, (1 + updates) / (10 + updates))
    current = model.state_dict()
    for key, value in average.state_dict().items():
        if value.is_floating_point():
            value.lerp_(current[key], 1 - decay)
        else:  # BatchNorm's number of batches
            value.copy_(current[key])


def build_optimizer(model: Network, lr: float, weight_decay: float) -> torch.optim.SGD:
    """Return SGD with the learning-rate multiples of the paper's implementation; biases are not decayed."""
    new = {id(p) for module in model.new_modules() for p in module.parameters()}
    groups: dict[tuple[int, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        is_bias = name.endswith(".bias")
        multiple = NEW_MULTIPLE if id(parameter) in new else 1
        if is_bias:
            multiple *= model.backbone.bias_lr_multiple
        groups.setdefault((multiple, 0.0 if is_bias else weight_decay), []).append(parameter)
    return torch.optim.SGD(
        [
            {"params": params, "lr": lr * multiple, "weight_decay": decay}
            for (multiple, decay), params in groups.items()
        ],
        lr=lr,
        momentum=MOMENTUM,
    )
