"""What the two mask refinements, PAMR and PAR, have in common."""

from collections.abc import Sequence
from typing import Literal, get_args

import torch.nn.functional as F
from torch import Tensor

from ._checks import check_choice, check_count, check_dilations, check_maps, check_same_batch, check_same_device

DILATIONS = (1, 2, 4, 8, 12, 24)
Resize = Literal["mask", "image", "none"]
Backend = Literal["auto", "triton", "torch"]


def check_settings(num_iter: int, dilations: Sequence[int], resize: str, backend: str) -> tuple[int, ...]:
    """Check what both layers are set up with; return the dilations as a tuple."""
    check_count("num_iter", num_iter, minimum=0)
    check_choice("resize", resize, get_args(Resize))
    check_choice("backend", backend, get_args(Backend))
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
        if 0 in tensor.shape[1:]:
            raise ValueError(f"{name} must have at least one channel and one pixel, got shape {list(tensor.shape)}")
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
    resized = F.interpolate(tensor, size=other.shape[2:], mode="bilinear", align_corners=True)
    return resized.to(tensor.dtype)  # autocast may have widened it


def drop_expected(unexpected_keys: list[str], prefix: str, names: tuple[str, ...]) -> None:
    """Take the buffers `names` of a module at `prefix` out of the keys that strict loading complains of."""
    ignored = {prefix + name for name in names}
    unexpected_keys[:] = [key for key in unexpected_keys if key not in ignored]
