"""The code that PAMR, PAR and what calls them share: checks, the choice of channels, views, resizing, a base class."""

from collections.abc import Sequence
from typing import Any, ClassVar, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._checks import (
    DTYPES,
    check_choice,
    check_count,
    check_dense,
    check_dilations,
    check_maps,
    check_multiple_batch,
    check_pixels,
    check_same_device,
)
from .kernels.operators import check_backend, hides_values, is_mapped, is_traced

DILATIONS = (1, 2, 4, 8, 12, 24)
Resize = Literal["mask", "image", "none"]
Absent = Literal["zero", "keep"]
RESIZES, ABSENTS = get_args(Resize), get_args(Absent)  # not in the functions: old torch.compile cannot trace get_args


def check_settings(
    num_iter: int, dilations: Sequence[int], resize: str, backend: str, affinity_dtype: torch.dtype
) -> tuple[int, ...]:
    """Check the constructor arguments of both modules; return the dilations as a tuple."""
    check_count("num_iter", num_iter, minimum=0)
    check_choice("resize", resize, RESIZES)
    check_backend(backend)
    check_affinity_dtype(affinity_dtype)
    return check_dilations(dilations)


def check_affinity_dtype(affinity_dtype: torch.dtype) -> None:
    """Refuse anything but a floating-point dtype that the operators read."""
    if affinity_dtype not in DTYPES:
        raise ValueError(f"affinity_dtype must be one of {', '.join(map(str, DTYPES))}, got {affinity_dtype!r}")


def match_image(named_image: tuple[str, Tensor], named_mask: tuple[str, Tensor], resize: Resize) -> Tensor:
    """Check an image [B, K, H, W] and masks [B * V, C, h, w], given as pairs (name, tensor).

    Returns:
        The image; resized to the masks if `resize` is "image".
    """
    check_choice("resize", resize, RESIZES)
    for name, maps in (named_image, named_mask):
        check_maps(name, maps)
        check_pixels(name, maps)
    check_same_device(named_image, named_mask)
    check_multiple_batch(named_mask, named_image)
    (image_name, image), (mask_name, mask) = named_image, named_mask
    if resize == "none" and image.shape[2:] != mask.shape[2:]:
        raise ValueError(
            f"{mask_name} must have the height and width of {image_name} {list(image.shape)} when resize='none',"
            f" got shape {list(mask.shape)}"
        )
    return resize_maps(image, mask.shape[2:], align_corners=True) if resize == "image" else image


class Packed(NamedTuple):
    """The channels of masks that are refined.

    Attributes:
        masks: [B, M, H, W], the chosen channels of every image first, or all masks if no classes are given.
        counts: int64 [B], the number of chosen channels per image, or None.
        channels: int64 [B, M], the channel of the masks that each packed channel comes from, or None.
    """

    masks: Tensor
    counts: Tensor | None
    channels: Tensor | None


def pack_classes(named_mask: tuple[str, Tensor], classes: Tensor | None, image: Tensor, absent: Absent) -> Packed:
    """Choose channels of masks [B * V, C, h, w], given as a pair (name, tensor), and resize them to the image.

    Args:
        named_mask: the name of the masks, and the masks.
        classes: bool [B * V, C], the channels to refine; None for all.
        image: image, [B, K, H, W].
        absent: "zero" or "keep"; checked here, used by `unpack_classes`.
    """
    check_choice("absent", absent, ABSENTS)
    _, mask = named_mask
    if classes is None:
        return Packed(resize_maps(mask, image.shape[2:], align_corners=True), None, None)
    check_classes(classes, named_mask)
    joined = join_views(mask, image)
    index, counts = present_first(classes.reshape(joined.shape[:2]))
    chosen = take_channels(joined, index)
    return Packed(resize_maps(chosen, image.shape[2:], align_corners=True), counts, index)


def unpack_classes(refined: Tensor, packed: Packed, mask: Tensor, classes: Tensor | None, absent: Absent) -> Tensor:
    """Return refined masks [B * V, C, H, W] from packed ones [B, M, H, W]; other channels are 0 or those of `mask`."""
    if packed.channels is None or classes is None:
        return refined
    size = refined.shape[2:]
    result = put_channels(refined, packed.channels, join_views(mask, refined).shape[1])
    result = result.reshape(*mask.shape[:2], *size)  # [B, V * C, H, W] -> [B * V, C, H, W]
    if absent == "keep":
        return torch.where(classes[:, :, None, None], result, resize_maps(mask, size, align_corners=True))
    return result


def check_classes(classes: Tensor, named_mask: tuple[str, Tensor]) -> None:
    """Refuse anything but a bool tensor [B, C], given masks [B, C, h, w] as a pair (name, tensor)."""
    name, mask = named_mask
    if not isinstance(classes, Tensor) or classes.dtype != torch.bool:
        given = classes.dtype if isinstance(classes, Tensor) else type(classes).__name__
        raise TypeError(f"classes must be a torch.bool tensor, got {given}")
    check_dense("classes", classes)
    if classes.shape != mask.shape[:2]:
        raise ValueError(f"classes must be [B, C] for {name} {list(mask.shape)}, got shape {list(classes.shape)}")
    check_same_device((name, mask), ("classes", classes))


def present_first(classes: Tensor, max_classes: int | None = None) -> tuple[Tensor, Tensor]:
    """Return, for a bool [B, C], the channels of every image with the present ones first, and how many are present.

    Args:
        classes: bool, [B, C].
        max_classes: upper bound on the present channels of an image, or None. A row with more of them is an error. It
            has no effect under `torch.vmap`, which has no rule for the assertion.

    Returns:
        Indices [B, M] and counts [B], int64. M is the largest count on a CPU. It is `max_classes` or C on other
        devices, where reading the counts would wait for the device, and in compiled code, where shapes do not depend
        on data.
    """
    counts = classes.sum(dim=1)
    index = classes.to(torch.uint8).argsort(dim=1, descending=True, stable=True)
    if reads_values(counts):
        largest = int(counts.max())
        if max_classes is not None and largest > max_classes:
            raise ValueError(
                f"max_classes must be at least {largest}, the number of classes of an image, got {max_classes}"
            )
        return index[:, : max(1, largest)], counts
    if max_classes is not None and max_classes < classes.shape[1] and (is_traced() or not is_mapped(counts)):
        torch._assert_async((counts <= max_classes).all(), "max_classes is exceeded by the classes of an image")
        index = index[:, :max_classes]
    return index, counts


def mark_present(index: Tensor, counts: Tensor) -> Tensor:
    """Return which of the channels [B, M] of `present_first` are present, bool [B, M]."""
    return torch.arange(index.shape[1], device=index.device) < counts[:, None]


def reads_values(tensor: Tensor) -> bool:
    """Return whether Python may read the values of a tensor: it is on a CPU, not empty, and the call is not traced."""
    return tensor.device.type == "cpu" and tensor.numel() > 0 and not hides_values(tensor)


def join_views(mask: Tensor, image: Tensor) -> Tensor:
    """Return masks [B * V, C, h, w] as [B, V * C, h, w], all masks of an image in one row, for B images."""
    views = mask.shape[0] // image.shape[0] if image.shape[0] else 1
    return mask.reshape(image.shape[0], views * mask.shape[1], *mask.shape[2:])


def take_channels(maps: Tensor, index: Tensor) -> Tensor:
    """Return the channels [B, M] of maps [B, C, ...] as [B, M, ...]; `gather` takes eight times as long on a CPU."""
    planes = _planes(index, maps.shape[1])
    return maps.flatten(0, 1).index_select(0, planes).unflatten(0, index.shape)


def put_channels(maps: Tensor, index: Tensor, channels: int) -> Tensor:
    """Return maps [B, M, ...] as the channels [B, M] of otherwise zero maps [B, C, ...], C = `channels`."""
    result = maps.new_zeros(index.shape[0] * channels, *maps.shape[2:])
    result = result.index_copy(0, _planes(index, channels), maps.flatten(0, 1))
    return result.unflatten(0, (index.shape[0], channels))


def _planes(index: Tensor, channels: int) -> Tensor:
    """Return the planes [B * M] of maps [B * C, ...] that are channels [B, M] of maps [B, C, ...]."""
    first = channels * torch.arange(index.shape[0], device=index.device)
    return (first[:, None] + index).flatten()


def resize_maps(maps: Tensor, size: Sequence[int], align_corners: bool) -> Tensor:
    """Resize maps [B, ..., h, w] bilinearly, unless they have the size already."""
    if list(maps.shape[-2:]) == list(size):
        return maps
    if maps.ndim == 4:
        return F.interpolate(maps, size=tuple(size), mode="bilinear", align_corners=align_corners)
    resized = F.interpolate(maps.flatten(1, -3), size=tuple(size), mode="bilinear", align_corners=align_corners)
    return resized.unflatten(1, maps.shape[1:-2])


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
