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
from .kernels.operators import check_backend

DILATIONS = (1, 2, 4, 8, 12, 24)
Resize = Literal["mask", "image", "none"]


def check_settings(num_iter: int, dilations: Sequence[int], resize: str, backend: str) -> tuple[int, ...]:
    """Check the arguments that both modules are constructed with; return the dilations as a tuple."""
    check_count("num_iter", num_iter, minimum=0)
    check_choice("resize", resize, get_args(Resize))
    check_backend(backend)
    return check_dilations(dilations)


def match_sizes(
    named_image: tuple[str, Tensor], named_mask: tuple[str, Tensor], resize: Resize
) -> tuple[Tensor, Tensor]:
    """Resize image or masks where their sizes differ.

    Args:
        named_image: the caller's name of the image, and the image [B, K, H, W].
        named_mask: the caller's name of the masks, and the masks [B, C, h, w].
        resize: what is resized: "mask", "image", or "none" where different sizes are an error.

    Returns:
        Image and masks, of the same height and width.
    """
    check_choice("resize", resize, get_args(Resize))
    for name, maps in (named_image, named_mask):
        check_maps(name, maps)
        check_pixels(name, maps)
    check_same_batch(named_image, named_mask)
    check_same_device(named_image, named_mask)
    (image_name, image), (mask_name, mask) = named_image, named_mask
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


def _resize_as(maps: Tensor, other: Tensor) -> Tensor:
    return F.interpolate(maps, size=other.shape[2:], mode="bilinear", align_corners=True)


class StatelessRefinement(nn.Module):
    """A module without state that accepts the checkpoints of the published classes.

    Attributes:
        old_buffers: buffers of the published class; strict loading of a state_dict ignores them.
        old_attributes: attributes of the published class that have no meaning here; setting one raises an error.
    """

    old_buffers: ClassVar[tuple[str, ...]]
    old_attributes: ClassVar[tuple[str, ...]]

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.old_attributes:
            raise AttributeError(
                f"{type(self).__name__} has no attribute {name!r}: setting it would change nothing. Arguments of the"
                " constructor are the attributes of the same names."
            )
        super().__setattr__(name, value)

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
