"""The device to compute on."""

import torch


def choose_device(name: str) -> torch.device:
    """Return the device of this name, or for `auto` the best one; an error says why it cannot be used."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device: cannot use {name!r}: {str(error).splitlines()[0]}") from error
