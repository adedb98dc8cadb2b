"""The interface of a backbone, the normalisation of its input, and the reader of its weights."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..files.tensors import load_tensors

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class WeightsError(ValueError):
    """A file of weights is missing or does not fit the network; the message names the file and the reason."""


class Backbone(nn.Module, ABC):
    """A pre-trained network that returns `conv3` (stride 4: skip and shallow features) and `conv6` (the deepest)."""

    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    conv3_channels: int
    conv6_channels: int
    stride8_channels: int | None = None
    """Channels of the features at stride 8 that `features` returns; None for a backbone without it."""
    aspp_dilations: tuple[int, int, int] = (12, 24, 36)
    bias_lr_multiple: int = 2
    channels_last_on_cpu: bool = False
    """Whether a CPU trains faster in the memory format channels_last, as with depthwise convolutions."""
    weights_file: ClassVar[str]
    """The usual name of the file of ImageNet weights, and its source."""

    @abstractmethod
    def frozen_modules(self) -> list[nn.Module]:
        """Return the first layers, whose pre-trained weights are not trained."""

    @abstractmethod
    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Return (conv3, conv6) of a normalised image [B, 3, H, W]."""

    def features(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return (conv3, features of stride 8, conv6) of a normalised image [B, 3, H, W]."""
        raise NotImplementedError(f"{type(self).__name__} has no separate features of stride 8")

    def memory_format(self, device: torch.device) -> torch.memory_format:
        """Return the memory format that is fast on a device, in training or in evaluation mode.

        This is channels_last, except in training on a CPU where `channels_last_on_cpu` is False. With AVX2, the
        gradient of a 3x3 convolution with respect to its weights takes up to 2.5 times as long in channels_last (AMD
        EPYC, family 25, model 17).
        """
        is_last = device.type != "cpu" or self.channels_last_on_cpu or not self.training
        return torch.channels_last if is_last else torch.contiguous_format

    def rename_weights(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the weights of a file under this module's names, without those of its ImageNet classifier."""
        return dict(weights)

    def load_weights(self, path: Path) -> None:
        """Load ImageNet weights from a file, which must hold every weight of the backbone and no others."""
        content = read_state_dict(path)
        try:
            weights = self.rename_weights(content)
        except (KeyError, RuntimeError) as error:  # the file has some of the names, and other layers
            raise WeightsError(f"{path} does not fit {type(self).__name__}: {error}") from error
        load_strictly(self, weights, f"{path} does not fit {type(self).__name__}")


def normalise(image: Tensor, backbone: Backbone) -> Tensor:
    """Normalise an image [B, 3, H, W] in [0, 1] as in the pre-training of the backbone, in its memory format."""
    mean, std = image.new_tensor(backbone.mean), image.new_tensor(backbone.std)
    normalised = (image - mean[:, None, None]) / std[:, None, None]
    return normalised.contiguous(memory_format=backbone.memory_format(image.device))


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Read a state_dict; it may lie under a key such as `model`, and its keys may start with `module.`."""
    if not path.is_file():
        raise WeightsError(f"weights not found: {path}")
    try:
        content = load_tensors(path)
    except ValueError as error:
        raise WeightsError(f"cannot read weights {path}: {error}") from error
    return unwrap_state_dict(content, str(path))


def unwrap_state_dict(content: Any, source: str) -> dict[str, Tensor]:
    """Return the state_dict in the content of a checkpoint file."""
    while isinstance(content, Mapping) and not any(isinstance(value, Tensor) for value in content.values()):
        inner = [content[key] for key in ("model", "state_dict", "model_state", "net") if key in content]
        if not inner:
            raise WeightsError(
                f"no weights in {source}: it holds {', '.join(map(str, list(content)[:5])) or 'nothing'}"
            )
        content = inner[0]
    if not isinstance(content, Mapping):
        raise WeightsError(f"no weights in {source}: it holds a {type(content).__name__}")
    if not all(isinstance(key, str) for key in content):
        raise WeightsError(f"no weights in {source}: its keys are not names")
    return {key.removeprefix("module."): value for key, value in content.items()}


def load_strictly(module: nn.Module, weights: Mapping[str, Tensor], error: str) -> None:
    """Load weights of exactly the module's names and shapes; `num_batches_tracked` may be missing (old files)."""
    own = module.state_dict()
    missing = [key for key in own if key not in weights and not key.endswith("num_batches_tracked")]
    unexpected = [key for key in weights if key not in own]
    if missing or unexpected:
        parts = [
            f"{len(keys)} {what} ({keys[0]}, ...)"
            for what, keys in (("missing", missing), ("unexpected", unexpected))
            if keys
        ]
        raise WeightsError(f"{error}: {' and '.join(parts)}")
    for key, value in weights.items():
        if value.shape != own[key].shape:
            raise WeightsError(f"{error}: {key} has shape {list(value.shape)}, expected {list(own[key].shape)}")
    module.load_state_dict(weights, strict=False)
