"""Files of tensors as `torch.save` writes them, read without executing code and with their checksums verified."""

import zipfile
from pathlib import Path
from typing import Any

import torch


def load_tensors(path: Path) -> Any:
    """Return the content of a file, on the CPU.

    Raises:
        ValueError: the file is damaged, or holds something else than tensors and plain values; with the reason.
    """
    try:
        if zipfile.is_zipfile(path):  # files of PyTorch before 1.6 are not
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()  # torch.load itself does not verify checksums
            if damaged is not None:
                raise ValueError(f"it is damaged: the checksum of {damaged} is wrong")
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # zip, pickle and PyTorch raise errors of no common type
        reason = str(error).strip() or type(error).__name__
        raise ValueError(reason.splitlines()[0]) from error
