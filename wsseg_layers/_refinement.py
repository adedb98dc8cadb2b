"""What the two mask refinements, PAMR and PAR, have in common."""

from collections.abc import Sequence
from typing import Any, ClassVar, Literal, get_args

import torch.nn.functional as F
from torch import Tensor, nn

from ._checks import (
    check_choice,
    check_count,
    check_dilations,
    check_maps,
    check_pixels,
    check_same_batch,
    check_same_device,
)
from .kernels import BACKENDS

DILATIONS = (1, 2, 4, 8, 12, 24)
Resize = Literal["mask", "image", "none"]


def check_settings(num_iter: int, dilations: Sequence[int], resize: str, backend: str) -> tuple[int, ...]:
    """Check what both layers are set up with; return the dilations as a tuple."""
    check_count("num_iter", num_iter, minimum=0)
    check_choice("resize", resize, get_args(Resize))
    check_choice("backend", backend, BACKENDS)
    return check_dilations(dilations)


def match_sizes(resize: Resize, **image_and_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Check an image [B, K, H, W] and masks [B, C, h, w], given under their callers' names, and make their sizes agree.

    Args:
        resize: which of the two is resized: "mask", "image", or "none" where different sizes are an error.
        **image_and_mask: the image, then the masks.

    Returns:
        Image and masks, of the same height and width.
    """
    for name, tensor in image_and_mask.items():
        check_maps(name, tensor)
        check_pixels(name, tensor)
    check_same_batch(**image_and_mask)
    check_same_device(**image_and_mask)
    image_name, mask_name = image_and_mask
    image, mask = image_and_mask.values()
    if image.shape[2:] == mask.shape[2:]:
        return image, mask
    if resize == "mask":
        return image, _resize_as(mask, image)
    if resize == "image":
        return _resize_as(image, mask), mask
    raise ValueError(
        f"{mask_name} must have the height and width of {image_name} {list(image.shape)} when resize='none',"
        f" got shape {list(mask.shape)}"
    )


def _resize_as(tensor: Tensor, other: Tensor) -> Tensor:
    return F.interpolate(tensor, size=other.shape[2:], mode="bilinear", align_corners=True)


class StatelessRefinement(nn.Module):
    """A module without state that lets strict loading pass over the buffers of older implementations."""

    old_buffers: ClassVar[tuple[str, ...]]

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        old = {prefix + name for name in self.old_buffers}
        unexpected_keys[:] = [key for key in unexpected_keys if key not in old]
