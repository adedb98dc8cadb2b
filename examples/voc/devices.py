"""The device to compute on, and its memory."""

import torch


def choose_device(name: str) -> torch.device:
    """Return the device of this name, or for `auto` the best one; an error says why it cannot be used."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device: cannot use {name!r}: {str(error).splitlines()[0]}") from error
    if device.type == "meta":
        raise ValueError("--device: cannot use 'meta': its tensors have no values")
    return device


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that the memory of the device or of the computer is too small."""
    if isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)  # it has no class of its own
