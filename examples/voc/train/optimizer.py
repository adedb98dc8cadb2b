"""Which parameters and statistics are trained, and how fast."""

from typing import Literal

import torch
from torch import nn

from ..model import Network

MOMENTUM = 0.9
WARM_UP = 40  # steps over which the learning rates of AdamW rise to their full values
MAX_NORM = 5.0  # of the gradient of all parameters, with AdamW
NEW_MULTIPLE = 10  # learning rate of weights that start at random, as a multiple of the backbone's


def freeze(model: Network, whole_backbone: bool = False) -> None:
    """Turn off the gradient of the backbone's first layers and of all its BatchNorms, or of the whole backbone."""
    backbone = model.backbone
    backbone.requires_grad_(not whole_backbone)  # an earlier call may have frozen the whole backbone
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
    """Return the factor of the learning rates after `done` of `total` steps: 1 at first, 0 after the last step.

    With power 0, it is always 1.
    """
    return max(0.0, 1 - done / total) ** power


def warm_up_factor(done: int) -> float:
    """Return the factor of AdamW's learning rates after `done` steps: it rises to 1 in `WARM_UP` steps."""
    return min(1.0, (done + 1) / WARM_UP)


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


def build_optimizer(
    model: Network, lr: float, weight_decay: float, name: Literal["sgd", "adamw"] = "sgd"
) -> torch.optim.Optimizer:
    """Return the optimizer; weights that start at random have `NEW_MULTIPLE` times the rate of the backbone.

    SGD is that of the paper's implementation: biases have a multiple of the rate and are not decayed. AdamW gives them
    the rate of the weights, and decays neither biases nor the scales of BatchNorm.
    """
    new = {id(p) for module in model.new_modules() for p in module.parameters()}
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for key, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        rate = lr * NEW_MULTIPLE if id(parameter) in new else lr
        is_bias = key.endswith(".bias")
        if name == "sgd" and is_bias:
            rate *= model.backbone.bias_lr_multiple
        decays = not is_bias if name == "sgd" else parameter.ndim > 1
        groups.setdefault((rate, weight_decay if decays else 0.0), []).append(parameter)
    found = [{"params": params, "lr": rate, "weight_decay": decay} for (rate, decay), params in groups.items()]
    if name == "adamw":
        return torch.optim.AdamW(found, lr=lr)
    return torch.optim.SGD(found, lr=lr, momentum=MOMENTUM)
