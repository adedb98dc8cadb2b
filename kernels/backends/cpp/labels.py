"""Resizing and the labels of the highest maps (labels.cpp), for float32 on CPUs."""

from collections.abc import Sequence

import torch
from torch import Tensor

from . import interface, library


def resize(maps: Tensor, size: Sequence[int]) -> Tensor:
    """Resize float32 maps [..., h, w] bilinearly, with `align_corners=False`."""
    planes = maps.flatten(0, -3)
    result = maps.new_empty(*maps.shape[:-2], *size)
    threads = torch.get_num_threads()
    task = interface.Resize(planes.data_ptr(), planes.stride(), *planes.shape, result.data_ptr(), *size, threads)
    library.run("resize", task)
    return result


def choose_labels(
    maps: Tensor, numbers: Tensor, counts: Tensor, num_scores: int, size: Sequence[int], ignore_index: int
) -> Tensor:
    """Return the labels [B, V, H, W] of the highest channels of float32 maps, resized to H x W as by `resize`.

    Args:
        maps: [B, 1 + M, V * S, h, w], the background and M classes, for V views and S background scores.
        numbers: int64, [B, M], the label of every class; that of the background is 0.
        counts: int64, [B]: image b has the first `counts[b]` of the classes.
        num_scores: S, 1 or 2. With 2, (high, low), a pixel keeps its class with the high score. One that is background
            with the high score and a class with the low score is ignored.
        size: H and W.
        ignore_index: label of ignored pixels.
    """
    batch, channels, groups, height, width = maps.shape
    maps, numbers, counts = maps.contiguous(), numbers.contiguous(), counts.contiguous()
    result = numbers.new_empty(batch, groups // num_scores, *size)
    pointers = (tensor.data_ptr() for tensor in (maps, result, counts, numbers))
    sizes = (batch, channels, groups // num_scores, num_scores, height, width, *size)
    library.run("choose_labels", interface.Labels(*pointers, *sizes, ignore_index, torch.get_num_threads()))
    return result
