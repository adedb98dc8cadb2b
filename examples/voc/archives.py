"""Files of tensors as `torch.save` writes them: read without executing anything, and without trusting their bits."""

import zipfile
from pathlib import Path
from typing import Any

import torch


def load_tensors(path: Path) -> Any:
    """Return what a file holds, on the CPU.

    Raises:
        ValueError: the file is damaged, or holds something else than tensors and plain values; with the reason.
    """
    try:
        if zipfile.is_zipfile(path):  # which old files of PyTorch are not
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()  # torch.load takes a flipped bit for a weight
            if damaged is not None:
                raise ValueError(f"it is damaged: the checksum of {damaged} is wrong")
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what zip, pickle and PyTorch's own reader raise has no common type
        reason = str(error).strip() or type(error).__name__
        raise ValueError(reason.splitlines()[0]) from error
