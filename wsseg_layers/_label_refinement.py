"""The steps of `refine_pseudo_labels`, for the classes that are present: stack, refine, choose, within boxes or not."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ._background import Score, background_map, check_background, has_pixels
from ._checks import check_maps, check_pixels, check_same_batch, check_same_device
from ._dtypes import cast, working_dtype
from ._label_checks import Settings, check_boxes, check_cams, check_ignore_index, check_settings
from ._refinement import mark_present, present_first, put_channels, reads_values, resize_maps, take_channels
from .kernels.backends import LabelBackend, find_label_backend
from .kernels.operators import hides_values
from .pamr import PAMR
from .par import PAR

ROUNDING = 1e-6  # relative rounding error of the sum of float32 maps, per iteration of a refinement


class Batch(NamedTuple):
    """Images with the CAMs of their own classes.

    Attributes:
        images: [B, K, H, W].
        cams: [B, M, V, h, w], float32 at least. The first counts[b] classes are present in image b.
        classes: int64 [B, M], the class that each of them comes from, 0 to C - 1.
        counts: int64 [B], the number of classes that are present.
        scores: one background score, or a high and a low one; a tensor is [B, 1, V or 1, h, w].
        num_classes: C, the number of all classes.
    """

    images: Tensor
    cams: Tensor
    classes: Tensor
    counts: Tensor
    scores: tuple[Score, ...]
    num_classes: int


def make_labels(
    images: Tensor, cams: Tensor, labels: Tensor, boxes: Tensor | None, settings: Settings, with_maps: bool
) -> tuple[Tensor, Tensor | None]:
    """Return the labels and maps of `PseudoLabels.labels_and_maps`; the maps are None unless `with_maps`."""
    check_maps("images", images)
    check_pixels("images", images)
    background_first = settings.background is None
    views = check_cams(cams, labels, background_first)
    check_same_device(("images", images), ("cams", cams))
    check_same_batch(("images", images), ("cams", cams))
    check_settings(settings)
    check_ignore_index(settings.ignore_index, labels)
    views = views if with_maps else views.detach()
    scores: tuple[Score, ...]
    if settings.background is None:
        scores = (views[:, :, :1].transpose(1, 2),)  # [B, 1, V, h, w]
    else:
        scores = check_background(settings.background, cams)
    inside = check_boxes(boxes, ("images", images), settings.crop)
    classes, counts = present_first(labels != 0, settings.max_classes)
    packed = take_classes(views, classes + 1 if background_first else classes)
    batch = Batch(
        images=images, cams=packed, classes=classes, counts=counts, scores=scores, num_classes=labels.shape[1]
    )
    label_backend = _find_label_backend(settings.refine, counts, images, views)
    if boxes is not None and settings.crop and len(images) > 0:
        chosen, maps = _label_in_boxes(batch, boxes, settings, with_maps, label_backend)
    else:
        chosen, maps = _label(batch, settings, with_maps, label_backend)
    chosen = chosen if inside is None else chosen.masked_fill(~inside[:, None], settings.ignore_index)
    chosen = chosen if cams.ndim == 5 else chosen[:, 0]
    if maps is None:
        return chosen, None
    maps = cast(maps.unflatten(2, (-1, len(scores))).movedim(1, 3), cams.dtype)  # [B, V, S, 1 + C, H, W]
    maps = maps if len(scores) == 2 else maps[:, :, 0]
    return chosen, maps if cams.ndim == 5 else maps[:, 0]


def take_classes(views: Tensor, classes: Tensor) -> Tensor:
    """Return the channels [B, M] of CAMs [B, V, C, h, w] as [B, M, V, h, w], in float32 at least."""
    batch, count = views.shape[:2]
    chosen = take_channels(views.flatten(0, 1), classes.repeat_interleave(count, dim=0))  # [B * V, M, h, w]
    return cast(chosen.unflatten(0, (batch, count)).transpose(1, 2), working_dtype(views))


def merge(high: Tensor, low: Tensor, ignore_index: int) -> Tensor:
    """Return `merge_labels` of labels that need no checks."""
    return high.masked_fill((high == 0) & (low != 0), ignore_index)


def _find_label_backend(refine: PAMR | PAR | None, counts: Tensor, *maps: Tensor) -> LabelBackend | None:
    """Return the backend of the refinement if it has functions for labels that take these maps, else None.

    They take float32 maps, in eager mode and outside of torch.func, and record no gradient.
    """
    if refine is None or not reads_values(counts):
        return None
    if any(x.dtype != torch.float32 or hides_values(x) for x in maps):
        return None
    return find_label_backend(refine.backend, counts.device)


def _label_in_boxes(
    batch: Batch, boxes: Tensor, settings: Settings, with_maps: bool, label_backend: LabelBackend | None
) -> tuple[Tensor, Tensor | None]:
    """Apply `_label` to every image by itself, cropped to its box; labels outside are ignored, maps are 0."""
    outputs = [
        _label_in_box(_one_image(batch, b), box, settings, with_maps, label_backend)
        for b, box in enumerate(boxes.tolist())
    ]
    chosen = torch.cat([own for own, _ in outputs])
    return chosen, torch.cat([maps for _, maps in outputs if maps is not None]) if with_maps else None


def _one_image(batch: Batch, b: int) -> Batch:
    """Return image b alone, with its own classes only."""
    one = slice(b, b + 1)
    count = max(1, int(batch.counts[b])) if reads_values(batch.counts) else batch.classes.shape[1]
    return Batch(
        images=batch.images[one],
        cams=batch.cams[one, :count],
        classes=batch.classes[one, :count],
        counts=batch.counts[one],
        scores=tuple(score[one] if isinstance(score, Tensor) else score for score in batch.scores),
        num_classes=batch.num_classes,
    )


def _label_in_box(
    one: Batch, box: Sequence[int], settings: Settings, with_maps: bool, label_backend: LabelBackend | None
) -> tuple[Tensor, Tensor | None]:
    """Apply `_label` to one image, cropped to a box (top, bottom, left, right)."""
    top, bottom, left, right = box
    size = one.images.shape[2:]
    if top == bottom or left == right:  # nothing is valid
        views, channels = one.cams.shape[2], 1 + one.num_classes
        maps = one.cams.new_zeros(1, channels, views * len(one.scores), *size) if with_maps else None
        return one.classes.new_full((1, views, *size), settings.ignore_index), maps

    def crop(maps: Tensor) -> Tensor:
        return resize_maps(maps, size, align_corners=False)[..., top:bottom, left:right]

    scores = tuple(crop(score) if isinstance(score, Tensor) and has_pixels(score) else score for score in one.scores)
    cropped = one._replace(images=crop(one.images), cams=crop(one.cams), scores=scores)
    labels, maps = _label(cropped, settings, with_maps, label_backend)
    padding = (left, size[1] - right, top, size[0] - bottom)
    return F.pad(labels, padding, value=settings.ignore_index), None if maps is None else F.pad(maps, padding)


def _label(
    batch: Batch, settings: Settings, with_maps: bool, label_backend: LabelBackend | None
) -> tuple[Tensor, Tensor | None]:
    """Return labels [B, V, H, W], and maps [B, 1 + C, V * S, H, W] for S background scores if `with_maps`."""
    refined = _refine(batch, settings, with_maps, label_backend)
    maps = _unpack(refined, batch) if with_maps else None
    return _choose(refined, batch, settings.ignore_index, label_backend), maps


def _refine(batch: Batch, settings: Settings, exact: bool, label_backend: LabelBackend | None) -> Tensor:
    """Return refined maps [B, 1 + M, V * S, h, w] of background and classes, with S background scores.

    With `exact`, the maps are differentiable. Without it, the background may differ by 1e-6 per iteration from what
    refining it would give.
    """
    images, refine = batch.images, settings.refine
    height, width = images.shape[2:]
    if min(height, width) < settings.down_scale:
        raise ValueError(
            "down_scale must be at most the height and width that are refined,"
            f" got {settings.down_scale} for {height} x {width}"
        )
    size = (height // settings.down_scale, width // settings.down_scale)
    maps = _stack(batch, settings, size, None if exact else label_backend)
    if refine is None:
        return maps
    images = images if images.shape[2:] == size else _resize(images.detach(), size, False, label_backend)
    affinity = refine.affinity(images)
    if exact or not settings.softmax or affinity.dtype != torch.float32:
        counts = (1 + batch.counts) * maps.shape[2]
        return refine.propagate(maps.flatten(1, 2), affinity, counts).view(maps.shape)
    # The channels of a pixel sum to 1, and every iteration multiplies this sum by the sum of the weights. The
    # background is therefore the total minus the classes. It is raised by more than the rounding error, so that it
    # still wins where all channels are equal.
    total = (1 + ROUNDING * (1 + refine.num_iter)) * refine._sum_of_weights() ** refine.num_iter
    classes = maps[:, 1:]
    refined = refine.propagate(classes.flatten(1, 2), affinity, batch.counts * maps.shape[2]).view(classes.shape)
    return torch.cat([total - refined.sum(dim=1, keepdim=True), refined], dim=1)


def _stack(batch: Batch, settings: Settings, size: tuple[int, int], label_backend: LabelBackend | None) -> Tensor:
    """Return background and classes [B, 1 + M, V * S, h, w] before the refinement, in the size that is refined."""
    cams = _resize(batch.cams, size, settings.align_corners, label_backend)
    present = mark_present(batch.classes, batch.counts)[:, :, None, None, None]
    shape = (cams.shape[0], 1, cams.shape[2], *size)
    backgrounds = [background_map(score, cams, present, settings.align_corners).expand(shape) for score in batch.scores]
    if settings.softmax:
        cams = cams.masked_fill(~present, -torch.inf)
    # Classes come before views and scores: the present channels of an image are its first (1 + count) * V * S ones.
    cams = cams[:, :, :, None].expand(-1, -1, -1, len(batch.scores), -1, -1)
    maps = torch.cat([torch.stack(backgrounds, dim=3), cams], dim=1)  # [B, 1 + M, V, S, h, w]
    return (maps.softmax(dim=1) if settings.softmax else maps).flatten(2, 3)


def _resize(maps: Tensor, size: tuple[int, int], align_corners: bool, label_backend: LabelBackend | None) -> Tensor:
    """Resize maps [B, ..., h, w] bilinearly, by the backend where it can."""
    if label_backend is None or align_corners or maps.shape[-2:] == size:
        return resize_maps(maps, size, align_corners)
    return label_backend.resize(maps, size)


def _unpack(maps: Tensor, batch: Batch) -> Tensor:
    """Return maps [B, 1 + C, G, H, W] of all classes from those of the present ones, [B, 1 + M, G, h, w]."""
    present = F.pad(mark_present(batch.classes, batch.counts), (1, 0), value=True)[:, :, None, None, None]
    resized = resize_maps(maps, batch.images.shape[2:], align_corners=False).masked_fill(~present, 0)
    return put_channels(resized, F.pad(batch.classes + 1, (1, 0)), 1 + batch.num_classes)


def _choose(maps: Tensor, batch: Batch, ignore_index: int, label_backend: LabelBackend | None) -> Tensor:
    """Return labels [B, V, H, W]: the highest channels of maps [B, 1 + M, V * S, h, w], resized to H x W, merged."""
    maps, size, num_scores = maps.detach(), batch.images.shape[2:], len(batch.scores)
    numbers, counts = batch.classes + 1, batch.counts
    if label_backend is not None:
        return label_backend.choose_labels(maps, numbers, counts, num_scores, size, ignore_index)
    if reads_values(counts):
        images = enumerate(counts.tolist())
        chosen = torch.cat([_argmax(maps[b : b + 1, : 1 + n], numbers[b : b + 1], None, size) for b, n in images])
    else:
        chosen = _argmax(maps, numbers, mark_present(numbers, counts), size)
    return chosen if num_scores == 1 else merge(chosen[:, ::2], chosen[:, 1::2], ignore_index)


def _argmax(maps: Tensor, numbers: Tensor, present: Tensor | None, size: Sequence[int]) -> Tensor:
    """Take the argmax over the channels of maps [B, 1 + M, G, h, w], resizing one channel at a time.

    Args:
        maps: background and classes.
        numbers: [B, M], the label of every class; that of the background is 0.
        present: bool [B, M], the classes that may be chosen; None for all.
        size: height and width of the result.
    """
    best = resize_maps(maps[:, 0], size, align_corners=False)
    result = torch.zeros_like(best, dtype=torch.int64)
    for k in range(maps.shape[1] - 1):
        score = resize_maps(maps[:, k + 1], size, align_corners=False)
        better = score > best
        if present is not None:
            better = better & present[:, k, None, None, None]
        # Numbers increase with k, so the maximum is the latest one. `torch.where` would take ten times as long.
        result = torch.maximum(result, better * numbers[:, k, None, None, None])
        best = torch.maximum(best, score)
    return result
