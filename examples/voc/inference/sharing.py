"""Inference on one folder of images by several processes, started by `torchrun`."""

import datetime
import os
from typing import TypeVar

import torch
import torch.distributed as dist

from ..train.distribution import ALONE, Group

Value = TypeVar("Value")

TIMEOUT = datetime.timedelta(days=7)  # the first process to finish waits for the last


def join_group() -> Group:
    """Join the group of processes that `torchrun` started. Without `torchrun`, the group is this process alone."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return ALONE
    dist.init_process_group("gloo", timeout=TIMEOUT)
    return Group(dist.get_rank(), dist.get_world_size())


def leave_group() -> None:
    """End the connection to the other processes."""
    if dist.is_initialized():
        dist.destroy_process_group()


def own_device(name: str) -> str:
    """Return the device of this process: with several GPUs, each process has its own."""
    count = torch.cuda.device_count() if name in ("auto", "cuda") else 0
    return f"cuda:{int(os.environ.get('LOCAL_RANK', 0)) % count}" if count > 1 else name


def gather(value: Value, group: Group) -> list[Value]:
    """Return the values of all processes, by rank. This waits until all processes have called it."""
    if group.size == 1:
        return [value]
    values: list[Value | None] = [None] * group.size
    dist.all_gather_object(values, value)
    return [value for value in values if value is not None]
