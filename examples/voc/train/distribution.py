"""Training on several processes with the result of one: the same noise, and BatchNorm over the whole batch.

Each process holds an equal share of every batch, in the order of its rank.
"""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from accelerate import Accelerator, DistributedDataParallelKwargs
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce
from torch.overrides import TorchFunctionMode

from ..devices import choose_device
from ..settings import Settings


class Group(NamedTuple):
    """The processes that share the work: the rank of this one, and their number."""

    rank: int
    size: int


ALONE = Group(0, 1)


def start_accelerator(settings: Settings) -> Accelerator:
    """Choose device and precision, and join the other processes if `torchrun` started several."""
    device = choose_device(settings.device)
    if settings.device.startswith("cuda:"):
        torch.cuda.set_device(device)
    if settings.precision == "fp16" and device.type != "cuda":
        raise ValueError("--precision fp16 needs a CUDA device; bf16 works everywhere")
    precision = "no" if settings.precision == "fp32" else settings.precision
    # A frozen backbone has no gradients to share.
    parallel = DistributedDataParallelKwargs(find_unused_parameters=settings.freeze_backbone)
    accelerator = Accelerator(cpu=device.type == "cpu", mixed_precision=precision, kwargs_handlers=[parallel])
    if accelerator.device.type != device.type:
        raise ValueError(f"--device {settings.device}: the training would run on {accelerator.device}")
    shares = accelerator.num_processes * settings.accumulate
    if settings.batch_size % shares:
        raise ValueError(
            f"--batch-size must be divisible by processes x --accumulate = {accelerator.num_processes} x "
            f"{settings.accumulate}, got {settings.batch_size}"
        )
    return accelerator


class GlobalBatchNoise(TorchFunctionMode):
    """A context in which dropout and `torch.rand` draw for the whole batch and return this process's share.

    All processes must have the same random state, and the batch must be the first dimension. A single process uses it
    too, so that the random numbers do not depend on the number of processes.
    """

    def __init__(self, group: Group = ALONE) -> None:
        super().__init__()
        self.group = group

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Replace the random functions that the networks use; call all others unchanged."""
        kwargs = kwargs or {}
        if func is F.dropout or func is F.dropout2d:
            kwargs.pop("inplace", None)
            return self._dropout(*args, **kwargs, whole_channels=func is F.dropout2d)
        if func is torch.rand:
            batch, *others = args[0]
            return self._share(torch.rand((batch * self.group.size, *others), **kwargs))
        return func(*args, **kwargs)

    def _dropout(self, x: Tensor, p: float = 0.5, training: bool = True, *, whole_channels: bool) -> Tensor:
        if not training or p == 0:
            return x
        shape = [x.shape[0] * self.group.size, *x.shape[1:]]
        if whole_channels:
            shape[2:] = [1] * (x.dim() - 2)
        channels_last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
        layout = torch.channels_last if channels_last else torch.contiguous_format
        kept = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout).bernoulli_(1 - p)
        return x * self._share(kept).div_(1 - p)

    def _share(self, noise: Tensor) -> Tensor:
        return noise.chunk(self.group.size)[self.group.rank]


class GlobalBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm over the batches of all processes, on any device; `nn.SyncBatchNorm` does not run on a CPU."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalise by the statistics of the whole batch; update the running statistics."""
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
    """Turn every BatchNorm of the model into a `GlobalBatchNorm2d` with the same parameters and buffers."""
    for module in model.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = GlobalBatchNorm2d
