"""Several processes compute what one process with the whole batch would: the same noise, the same BatchNorm.

Each process holds an equal share of every batch, in the order of its rank.
"""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce
from torch.overrides import TorchFunctionMode


class GlobalBatchNoise(TorchFunctionMode):
    """Inside this context, dropout and `torch.rand` draw for the whole batch and return this process's share.

    All processes must have the same random state, and the batch must be the first dimension. It is used with one
    process too, so that the numbers do not depend on how many there are.
    """

    def __init__(self, rank: int = 0, world_size: int = 1) -> None:
        super().__init__()
        self.rank = rank
        self.world_size = world_size

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Replace the random functions that the networks use; pass on all others."""
        kwargs = kwargs or {}
        if func is F.dropout or func is F.dropout2d:
            kwargs.pop("inplace", None)
            return self._dropout(*args, **kwargs, whole_channels=func is F.dropout2d)
        if func is torch.rand:
            batch, *others = args[0]
            return self._share(torch.rand((batch * self.world_size, *others), **kwargs))
        return func(*args, **kwargs)

    def _dropout(self, x: Tensor, p: float = 0.5, training: bool = True, *, whole_channels: bool) -> Tensor:
        if not training or p == 0:
            return x
        shape = [x.shape[0] * self.world_size, *x.shape[1:]]
        if whole_channels:
            shape[2:] = [1] * (x.dim() - 2)
        channels_last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
        layout = torch.channels_last if channels_last else torch.contiguous_format
        kept = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout).bernoulli_(1 - p)
        return x * self._share(kept).div_(1 - p)

    def _share(self, noise: Tensor) -> Tensor:
        return noise.chunk(self.world_size)[self.rank]


class GlobalBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm over the batches of all processes, on any device: `nn.SyncBatchNorm` knows no CPU."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalise by the statistics of the whole batch; update the running ones."""
        if not self.training:
            return super().forward(input)
        x = input.float()
        count = x.numel() // x.shape[1] * dist.get_world_size()
        mean = all_reduce(x.sum(dim=(0, 2, 3), keepdim=True)) / count
        variance = all_reduce((x - mean).square().sum(dim=(0, 2, 3), keepdim=True)) / count
        if self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None:
            with torch.no_grad():
                momentum = 0.1 if self.momentum is None else self.momentum
                self.running_mean.lerp_(mean.flatten(), momentum)
                self.running_var.lerp_(variance.flatten() * count / max(count - 1, 1), momentum)
                self.num_batches_tracked += 1
        normalised = (x - mean) * torch.rsqrt(variance + self.eps)
        if self.weight is not None and self.bias is not None:
            normalised = normalised * self.weight[:, None, None] + self.bias[:, None, None]
        return normalised.to(input.dtype)


def share_batch_statistics(model: nn.Module) -> None:
    """Make every BatchNorm of the model one over all processes. Its parameters and buffers stay the same objects."""
    for module in model.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = GlobalBatchNorm2d
