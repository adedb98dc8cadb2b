"""The arguments of the functions for pseudo labels: their settings, and the checks that only these functions need."""

from typing import NamedTuple

import torch
from torch import Tensor

from ._background import Background, split_background
from ._checks import (
    check_count,
    check_dense,
    check_flag,
    check_floating,
    check_integer,
    check_integers,
    check_pixels,
    check_same_device,
)
from ._refinement import reads_values
from .pamr import PAMR
from .par import PAR

IGNORE_INDEX = 255  # the label of pixels without a class


class Settings(NamedTuple):
    """The arguments of `PseudoLabels`."""

    refine: PAMR | PAR | None
    background: Background | None
    softmax: bool
    down_scale: int
    crop: bool
    align_corners: bool
    ignore_index: int
    max_classes: int | None


def check_settings(settings: Settings) -> None:
    """Check what can be checked without a batch."""
    refine = settings.refine
    if refine is not None and not isinstance(refine, (PAMR, PAR)):
        raise TypeError(f"refine must be a PAMR, a PAR or None, got {type(refine).__name__}")
    check_flag("softmax", settings.softmax)
    check_flag("crop", settings.crop)
    check_flag("align_corners", settings.align_corners)
    check_count("down_scale", settings.down_scale, minimum=1)
    check_range(settings.ignore_index, torch.int64)
    check_max_classes(settings.max_classes)
    if settings.background is not None:
        split_background(settings.background)


def check_max_classes(max_classes: int | None) -> None:
    """Refuse anything but None and a positive integer."""
    if max_classes is not None:
        check_count("max_classes", max_classes, minimum=1)


def check_range(ignore_index: int, dtype: torch.dtype) -> None:
    """Refuse anything but an integer that a dtype holds."""
    check_integer("ignore_index", ignore_index)
    bits = 8 * dtype.itemsize
    lowest, highest = (0, 2**bits - 1) if dtype == torch.uint8 else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    if not lowest <= ignore_index <= highest:
        raise ValueError(f"ignore_index must be in {lowest} to {highest}, the range of {dtype}, got {ignore_index}")


def check_ignore_index(ignore_index: int, labels: Tensor) -> None:
    """Refuse an index that is not an integer of 64 bits, or is the label of a class or of the background."""
    check_range(ignore_index, torch.int64)
    if 0 <= ignore_index <= labels.shape[1]:
        raise ValueError(f"ignore_index must not be a label (0 to {labels.shape[1]}), got {ignore_index}")


def check_cams(cams: Tensor, labels: Tensor, background_first: bool) -> Tensor:
    """Check CAMs [B, C, h, w] or [B, V, C, h, w] and labels [B, C]; return the CAMs as [B, V, C, h, w]."""
    check_floating("cams", cams)
    if cams.ndim not in (4, 5):
        raise ValueError(f"cams must have 4 dimensions [B, C, h, w] or 5 [B, V, C, h, w], got shape {list(cams.shape)}")
    check_pixels("cams", cams)
    check_labels(labels, ("cams", cams), cams.shape[-3] - int(background_first))
    return cams if cams.ndim == 5 else cams[:, None]


def check_labels(labels: Tensor, named_maps: tuple[str, Tensor], num_classes: int) -> None:
    """Check image-level labels [B, C], given maps as a pair (name, tensor) and their number of classes."""
    name, maps = named_maps
    if not isinstance(labels, Tensor) or labels.is_complex():
        given = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
        raise TypeError(f"labels must be a tensor of numbers or torch.bool, got {given}")
    check_dense("labels", labels)
    if num_classes < 1:
        raise ValueError(
            f"{name} must have a channel for the background and at least one class, got {list(maps.shape)}"
        )
    if labels.shape != (maps.shape[0], num_classes):
        raise ValueError(
            f"labels must be [B, C] = {[maps.shape[0], num_classes]} for {name} {list(maps.shape)},"
            f" got shape {list(labels.shape)}"
        )
    check_same_device((name, maps), ("labels", labels))


def check_boxes(boxes: Tensor | None, named_maps: tuple[str, Tensor], crop: bool = False) -> Tensor | None:
    """Check boxes [B, 4] on maps, given as a pair (name, tensor); return the valid pixels, bool [B, H, W].

    Returns None without boxes, and with `crop`, where nothing outside is computed.
    """
    name, maps = named_maps
    if boxes is None:
        if crop:
            raise ValueError("boxes must be given with crop=True, got None")
        return None
    check_integers("boxes", boxes)
    if boxes.shape != (maps.shape[0], 4):
        raise ValueError(f"boxes must be [B, 4] for {name} {list(maps.shape)}, got shape {list(boxes.shape)}")
    if crop and boxes.device.type != "cpu":
        raise ValueError(f"boxes must be on the CPU with crop=True, got boxes on {boxes.device}")
    if not crop:
        check_same_device(named_maps, ("boxes", boxes))
    height, width = maps.shape[-2:]
    top, bottom, left, right = boxes[:, :, None].unbind(1)  # [B, 1] each
    if reads_values(boxes):
        wrong = (top < 0) | (top > bottom) | (bottom > height) | (left < 0) | (left > right) | (right > width)
        if wrong.any():
            raise ValueError(
                f"boxes must hold 0 <= top <= bottom <= {height} and 0 <= left <= right <= {width},"
                f" got {boxes[wrong[:, 0]][0].tolist()}"
            )
    if crop:
        return None
    row, column = torch.arange(height, device=maps.device), torch.arange(width, device=maps.device)
    return ((row >= top) & (row < bottom))[:, :, None] & ((column >= left) & (column < right))[:, None]
