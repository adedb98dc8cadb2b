"""Helpers for launching kernels: a probe, small tables of numbers on the device, and the width of a warp."""

# mypy: allow-untyped-defs
# Arguments of a jit function have the types that its launch gives them.

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import interpreted


@triton.jit
def probe_kernel(out_ptr):
    """Store 1."""
    tl.store(out_ptr, 1)


def probe(device: torch.device) -> None:
    """Compile and run a small kernel; raise an error if that fails."""
    out = torch.zeros(1, dtype=torch.int32, device=device)
    with torch.cuda.device_of(out):
        probe_kernel[(1,)](out)
    if out.item() != 1:
        raise RuntimeError("a kernel that stores a number did not store it")


def on_device(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a tensor of numbers on the device, without waiting for it.

    A copy from pinned memory does not wait and can be captured in a CUDA graph. The copy on the device is not kept from
    call to call, because a copy made during a capture belongs to the memory of that graph.
    """
    if device.type == "cpu":  # the interpreter
        return torch.tensor(values, dtype=dtype)
    return _pinned(values, dtype).to(device, non_blocking=True)


@functools.cache  # never freed: a captured graph reads it at every replay
def _pinned(values: tuple[float, ...], dtype: torch.dtype) -> Tensor:
    return torch.tensor(values, dtype=dtype, device="cpu").pin_memory()


@functools.cache
def warp_size(device: torch.device) -> int:
    """Return the number of threads that run together on a device: 32 on NVIDIA GPUs, 64 on most of AMD's."""
    if interpreted():
        return 32
    with torch.cuda.device(device):
        return triton.runtime.driver.active.get_current_target().warp_size
