"""From class activation maps (CAMs) and image-level labels to pseudo labels, a class index per pixel.

The rules of AFA (Ru et al., CVPR 2022), ToCo (Ru et al., CVPR 2023) and their successors, and the rule of Araslanov and
Roth, "Single-Stage Semantic Segmentation from Image Labels", CVPR 2020. https://arxiv.org/abs/2005.08104
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from numbers import Real
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._checks import (
    check_choice,
    check_count,
    check_flag,
    check_floating,
    check_integer,
    check_maps,
    check_not_negative,
    check_pixels,
    check_positive,
    check_real,
    check_same_batch,
    check_same_device,
)
from ._dtypes import cast, working_dtype
from ._refinement import present_first, put_channels, reads_values, take_channels
from .kernels.backends import LabelBackend, find_label_backend
from .pamr import PAMR
from .par import PAR

IGNORE_INDEX = 255
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
ROUNDING = 1e-6  # relative rounding error of the sum of float32 maps, per iteration of a refinement


@dataclass(frozen=True)
class PowerBackground:
    """A background score computed from the CAMs: (1 - m)^power, where m is the highest CAM of the image's classes.

    The CAMs must be in [0, 1]. The larger the power, the lower the score.

    Args:
        power: positive.

    Example:
        >>> import torch
        >>> cams, labels = torch.tensor([[[[0.2, 0.8]]]]), torch.ones(1, 1)
        >>> cam_to_label(cams, labels, PowerBackground(1.0)).tolist()
        [[[0, 1]]]
    """

    power: float = 1.0

    def __post_init__(self) -> None:
        check_positive("power", self.power)


Score = float | Tensor | PowerBackground
Background = Score | tuple[Score, Score]
Discard = Literal["classes", "all", "none"]
DISCARDS = get_args(Discard)  # not in the function: old torch.compile cannot trace get_args


def cam_to_label(
    cams: Tensor,
    labels: Tensor,
    background: Background = (0.7, 0.25),
    boxes: Tensor | None = None,
    ignore_index: int = IGNORE_INDEX,
    max_classes: int | None = None,
) -> Tensor:
    """Choose the class with the highest CAM among the classes of the image, by thresholds and without refinement.

    With one background score, a pixel is background (0) where no CAM is above the score. With a pair (high, low), it is
    background where no CAM is above the low score, and ignored where the highest CAM is above the low score only.

    Args:
        cams: CAMs, [B, C, h, w], or several views of them, [B, V, C, h, w].
        labels: image-level labels, [B, C]; a class is present where its value is not 0.
        background: score or pair (high, low). A score is a number, a tensor [B] (one per image) or [B, 1, h, w] (one
            per pixel), or a `PowerBackground`.
        boxes: integers, [B, 4]: top, bottom, left and right of the valid pixels, in pixels of the CAMs. All pixels
            outside are ignored.
        ignore_index: label of ignored pixels.
        max_classes: upper bound on the classes of an image; see `refine_pseudo_labels`.

    Returns:
        Labels, int64, [B, h, w] or [B, V, h, w]: 0 for background, 1 + c for class c, or `ignore_index`.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: sizes or devices differ, a dimension is empty, or a number is out of range.

    Source:
        `cam_to_label` of Ru et al., CVPR 2022.

    Example:
        >>> import torch
        >>> cams = torch.tensor([[[[0.9, 0.1, 0.4]], [[0.2, 0.8, 0.3]]]])
        >>> cam_to_label(cams, torch.tensor([[1, 0]])).tolist()  # the second class is not in the image
        [[[1, 0, 255]]]
    """
    views = _check_cams(cams, labels, background_first=False)
    scores = _check_background(background, cams)
    _check_ignore_index(ignore_index, labels)
    inside = _check_boxes(boxes, ("cams", cams))
    index, counts = _present(labels, max_classes)
    classes = _take(views.detach(), index)  # [B, M, V, h, w]
    valid = _valid(index, counts)[:, :, None, None, None]
    value, channel = classes.masked_fill(~valid, -torch.inf).max(dim=1)  # [B, V, h, w]
    number = (index + 1).gather(1, channel.flatten(1)).view(channel.shape)
    thresholds = [_background_map(score, classes, valid, align_corners=False)[:, 0] for score in scores]
    chosen = [number.masked_fill(~(value > threshold), 0) for threshold in thresholds]
    result = chosen[0] if len(chosen) == 1 else merge_labels(chosen[0], chosen[1], ignore_index)
    result = result if inside is None else result.masked_fill(~inside[:, None], ignore_index)
    return result if cams.ndim == 5 else result[:, 0]


def refine_pseudo_labels(
    images: Tensor,
    cams: Tensor,
    labels: Tensor,
    refine: PAMR | PAR | None,
    background: Background | None = (0.7, 0.25),
    softmax: bool = True,
    down_scale: int = 2,
    boxes: Tensor | None = None,
    crop: bool = False,
    align_corners: bool = False,
    ignore_index: int = IGNORE_INDEX,
    max_classes: int | None = None,
) -> Tensor:
    """Turn CAMs into pseudo labels: background score, softmax, refinement, argmax, and a merge of two results.

    1. Images and CAMs are resized to the size of the images divided by `down_scale`.
    2. The background score is put before the CAMs of the classes that are present in the image.
    3. With `softmax`, the softmax over these few channels is taken.
    4. `refine` refines them. One affinity per image serves all views and both background scores.
    5. The result is resized to the images, and the highest channel gives the label.
    6. With two background scores, (high, low), steps 2 to 5 are done for both. A pixel that has a class with the high
       score keeps this class. A pixel that is background with both scores is background. All others are ignored.

    Classes that are absent cost nothing and never appear. All resizing is bilinear. Where two channels are equal, the
    background wins over the classes, and the first class over the others.

    Args:
        images: images as `refine` takes them, [B, K, H, W].
        cams: CAMs or masks, [B, C, h, w], or several views of them, [B, V, C, h, w], of any size.
        labels: image-level labels, [B, C]; a class is present where its value is not 0. The background has no label.
        refine: a `PAMR` or `PAR`, or None for no refinement. Its argument `resize` has no effect.
        background: score or pair (high, low). A score is a number, a tensor [B] (one per image) or [B, 1, h, w] (one
            per pixel, of any size), or a `PowerBackground`. With None, `cams` has C + 1 channels, and the first one is
            the background.
        softmax: take the softmax over background and present classes before the refinement.
        down_scale: divisor of the height and width in which maps are refined, rounded down.
        boxes: integers, [B, 4]: top, bottom, left and right of the valid pixels of an image. All pixels outside are
            ignored.
        crop: crop images and CAMs to `boxes` before they are refined, so that pixels outside have no effect. Images are
            then refined one by one, `boxes` must be on the CPU, and the call does not compile with `fullgraph=True`.
        align_corners: `align_corners` of the resizing in step 1 of the CAMs and of a background score per pixel. It is
            False in all other resizing.
        ignore_index: label of ignored pixels.
        max_classes: upper bound on the number of classes of an image; an image with more is an error. On a GPU and
            under `torch.compile`, the default is C, and time and memory grow with it. A CPU in eager mode does not need
            it.

    Returns:
        Labels, int64, [B, H, W], or [B, V, H, W] for V views: 0 for background, 1 + c for class c, or `ignore_index`.
        For the refined maps themselves, see `PseudoLabels.labels_and_maps`.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: sizes or devices differ, a dimension is empty, or a number is out of range.

    Source:
        `refine_cams_with_bkg_v2` and `refine_cams_with_cls_label` of Ru et al., CVPR 2022, and their successors.

    Example:
        >>> import torch
        >>> images, cams = torch.rand(2, 3, 64, 48), torch.rand(2, 20, 16, 12)
        >>> labels = torch.zeros(2, 20).index_fill(1, torch.tensor([3, 7]), 1)
        >>> pseudo = refine_pseudo_labels(images, cams, labels, PAR(num_iter=2))
        >>> pseudo.shape, set(pseudo.unique().tolist()) <= {0, 4, 8, 255}
        (torch.Size([2, 64, 48]), True)
    """
    result, _ = _labels_and_maps(
        images,
        cams,
        labels,
        boxes,
        False,
        refine,
        background,
        softmax,
        down_scale,
        crop,
        align_corners,
        ignore_index,
        max_classes,
    )
    return result


def _labels_and_maps(
    images: Tensor,
    cams: Tensor,
    labels: Tensor,
    boxes: Tensor | None,
    with_maps: bool,
    refine: PAMR | PAR | None,
    background: Background | None,
    softmax: bool,
    down_scale: int,
    crop: bool,
    align_corners: bool,
    ignore_index: int,
    max_classes: int | None,
) -> tuple[Tensor, Tensor | None]:
    """Return the labels and maps of `PseudoLabels.labels_and_maps`; the maps are None unless `with_maps`."""
    check_maps("images", images)
    check_pixels("images", images)
    views = _check_cams(cams, labels, background_first=background is None)
    check_same_device(("images", images), ("cams", cams))
    check_same_batch(("images", images), ("cams", cams))
    _check_settings(refine, background, softmax, down_scale, crop, align_corners, ignore_index, max_classes)
    _check_ignore_index(ignore_index, labels)
    views = views if with_maps else views.detach()
    if background is None:
        scores: Sequence[Score] = (views[:, :, :1].transpose(1, 2),)  # [B, 1, V, h, w]
    else:
        scores = _check_background(background, cams)
    inside = _check_boxes(boxes, ("images", images), crop)
    index, counts = _present(labels, max_classes)
    classes = _take(views, index + 1 if background is None else index)  # [B, M, V, h, w]
    label_backend = _label_backend(refine, counts, images, views)
    steps = partial(
        _refine,
        refine=refine,
        softmax=softmax,
        down_scale=down_scale,
        align_corners=align_corners,
        resize_images=_resize if label_backend is None else label_backend.resize,
        resize_cams=_resize if label_backend is None or align_corners or with_maps else label_backend.resize,
        exact=with_maps,
    )
    choose = partial(_choose, num_scores=len(scores), ignore_index=ignore_index, label_backend=label_backend)
    num_classes = labels.shape[1] if with_maps else None
    if boxes is None or not crop or len(images) == 0:
        chosen, soft = _refine_and_choose(images, classes, scores, index, counts, steps, choose, num_classes)
    else:
        outputs = []
        for b, box in enumerate(boxes.tolist()):
            one, count = slice(b, b + 1), max(1, int(counts[b])) if reads_values(counts) else index.shape[1]
            own_scores = [score[one] if isinstance(score, Tensor) else score for score in scores]
            own = (images[one], classes[one, :count], own_scores, index[one, :count], counts[one])
            outputs.append(_in_box(*own, steps, choose, num_classes, box, ignore_index))
        chosen = torch.cat([own_labels for own_labels, _ in outputs])
        soft = torch.cat([maps for _, maps in outputs if maps is not None]) if with_maps else None
    result = chosen if inside is None else chosen.masked_fill(~inside[:, None], ignore_index)
    result = result if cams.ndim == 5 else result[:, 0]
    if soft is None:
        return result, None
    soft = cast(soft.unflatten(2, (-1, len(scores))).movedim(1, 3), cams.dtype)  # [B, V, S, C + 1, H, W]
    soft = soft if len(scores) == 2 else soft[:, :, 0]
    return result, soft if cams.ndim == 5 else soft[:, 0]


class PseudoLabels(nn.Module):
    """From CAMs and image-level labels to pseudo labels: the module of `refine_pseudo_labels`.

    It has no parameters and no buffers. The arguments are those of `refine_pseudo_labels`.

    Args:
        refine: a `PAMR` or `PAR`, or None for no refinement.
        background: background score or pair (high, low) of scores.
        softmax: take the softmax over background and present classes before the refinement.
        down_scale: divisor of the height and width in which maps are refined.
        crop: crop images and CAMs to the boxes before they are refined.
        align_corners: `align_corners` of the resizing of CAMs and background scores to the size that is refined.
        ignore_index: label of ignored pixels.
        max_classes: upper bound on the classes of an image.

    Example:
        >>> import torch
        >>> images, cams, labels = torch.rand(2, 3, 64, 48), torch.rand(2, 20, 16, 12), torch.ones(2, 20)
        >>> to_labels = PseudoLabels(PAR(dilations=[1, 2, 4], num_iter=2), background=(0.7, 0.25))
        >>> to_labels(images, cams, labels).shape
        torch.Size([2, 64, 48])
    """

    def __init__(
        self,
        refine: PAMR | PAR | None,
        background: Background | None = (0.7, 0.25),
        softmax: bool = True,
        down_scale: int = 2,
        crop: bool = False,
        align_corners: bool = False,
        ignore_index: int = IGNORE_INDEX,
        max_classes: int | None = None,
    ) -> None:
        super().__init__()
        _check_settings(refine, background, softmax, down_scale, crop, align_corners, ignore_index, max_classes)
        self.refine = refine
        self.background = background
        self.softmax = softmax
        self.down_scale = down_scale
        self.crop = crop
        self.align_corners = align_corners
        self.ignore_index = ignore_index
        self.max_classes = max_classes

    def forward(self, images: Tensor, cams: Tensor, labels: Tensor, boxes: Tensor | None = None) -> Tensor:
        """Return labels [B, H, W] of images [B, K, H, W], given CAMs [B, C, h, w] and image-level labels [B, C].

        With V views, [B, V, C, h, w], they are [B, V, H, W]. `boxes` are integers [B, 4]; see `refine_pseudo_labels`.
        """
        result, _ = _labels_and_maps(images, cams, labels, boxes, False, *self._settings())
        return result

    def labels_and_maps(
        self, images: Tensor, cams: Tensor, labels: Tensor, boxes: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the labels, and the refined maps that they are the argmax of.

        The maps are [B, C + 1, H, W], background first, in the dtype of `cams`; [B, V, C + 1, H, W] for V views, and
        with a dimension of 2 (high, low) before C + 1 for a pair of background scores. They are 0 for absent classes
        and, with `crop`, outside of the boxes. They are differentiable with respect to `cams`.
        """
        result, maps = _labels_and_maps(images, cams, labels, boxes, True, *self._settings())
        assert maps is not None
        return result, maps

    def _settings(
        self,
    ) -> tuple[PAMR | PAR | None, Background | None, bool, int, bool, bool, int, int | None]:
        return (
            self.refine,
            self.background,
            self.softmax,
            self.down_scale,
            self.crop,
            self.align_corners,
            self.ignore_index,
            self.max_classes,
        )

    def extra_repr(self) -> str:
        """Return the arguments for `print(module)`."""
        return (
            f"background={self.background}, softmax={self.softmax}, down_scale={self.down_scale}, crop={self.crop},"
            f" align_corners={self.align_corners}, ignore_index={self.ignore_index}, max_classes={self.max_classes}"
        )


def threshold_pseudo_labels(
    masks: Tensor,
    labels: Tensor,
    foreground: float = 0.6,
    background: float = 0.7,
    floor: float = 0.2,
    discard: Discard = "classes",
    ignore_index: int = IGNORE_INDEX,
    max_classes: int | None = None,
) -> Tensor:
    """Keep the confident pixels of the background and of the classes that are present in the image.

    A class claims the pixels above `foreground` times its maximum over the image, the background those above
    `background` times its maximum. No threshold is below `floor`. Pixels that are claimed by none or by several are
    ignored.

    Args:
        masks: refined masks in [0, 1], background first, [B, C + 1, h, w].
        labels: image-level labels, [B, C]; a class is present where its value is not 0.
        foreground: fraction of the maximum of a class, at least 0.
        background: fraction of the maximum of the background, at least 0.
        floor: lower bound of all thresholds, at least 0.
        discard: when to ignore a whole image: "classes", if a class of its labels has no pixel (the paper); "all", if a
            class or the background has no pixel (the published code); "none", never.
        ignore_index: label of ignored pixels.
        max_classes: upper bound on the classes of an image; see `refine_pseudo_labels`.

    Returns:
        Labels, int64, [B, h, w]: 0 for background, 1 + c for class c, or `ignore_index`.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: sizes or devices differ, a dimension is empty, or a number is out of range.

    Source:
        Araslanov and Roth, CVPR 2020, section 3.3, "Self-supervised segmentation loss".

    Example:
        >>> import torch
        >>> masks = torch.tensor([[[[0.8, 0.5, 0.1]], [[0.2, 0.4, 0.9]]]])
        >>> threshold_pseudo_labels(masks, torch.ones(1, 1)).tolist()
        [[[0, 255, 1]]]
    """
    check_maps("masks", masks)
    check_pixels("masks", masks)
    _check_labels(labels, ("masks", masks), masks.shape[1] - 1)
    for name, number in (("foreground", foreground), ("background", background), ("floor", floor)):
        check_not_negative(name, number)
    check_choice("discard", discard, DISCARDS)
    _check_ignore_index(ignore_index, labels)
    index, counts = _present(labels, max_classes)
    channels = F.pad(index + 1, (1, 0))  # [B, 1 + M], background first
    valid = F.pad(_valid(index, counts), (1, 0), value=True)
    packed = cast(take_channels(masks.detach(), channels), working_dtype(masks))
    fractions = torch.cat([packed.new_full((1,), background), packed.new_full(index.shape[1:], foreground)])
    threshold = (packed.amax(dim=(2, 3)) * fractions).clamp(min=floor)
    claimed = (packed > threshold[:, :, None, None]) & valid[:, :, None, None]
    single = claimed.sum(dim=1) == 1
    first = claimed.to(torch.uint8).argmax(dim=1)  # [B, h, w]
    result = channels.gather(1, first.flatten(1)).view(first.shape).masked_fill(~single, ignore_index)
    if discard != "none":
        claims = (claimed & single[:, None]).any(dim=3).any(dim=2) | ~valid  # [B, 1 + M]
        complete = (claims if discard == "all" else claims[:, 1:]).all(dim=1)
        result = result.masked_fill(~complete[:, None, None], ignore_index)
    return result


def merge_labels(high: Tensor, low: Tensor, ignore_index: int = IGNORE_INDEX) -> Tensor:
    """Merge labels that were made with a high and with a low background score.

    A pixel that has a class in `high` keeps this class. A pixel that is background in both is background. All others
    are ignored, also those that are ignored in `high`. `refine_pseudo_labels` merges its two results in this way; call
    this function to merge the labels of two calls or of two views.

    Args:
        high: labels made with the high background score, [B, H, W] or of any other shape.
        low: labels made with the low background score, in the shape of `high`.
        ignore_index: label of ignored pixels.

    Returns:
        Labels in the shape and dtype of `high`.

    Raises:
        TypeError: an argument is no integer tensor.
        ValueError: shapes or devices differ, or `ignore_index` is 0 or no value of the dtype of `high`.

    Source:
        `refine_cams_with_bkg_v2` of Ru et al., CVPR 2022.

    Example:
        >>> import torch
        >>> merge_labels(torch.tensor([3, 0, 0, 255]), torch.tensor([3, 3, 0, 255])).tolist()
        [3, 255, 0, 255]
    """
    for name, tensor in (("high", high), ("low", low)):
        _check_integers(name, tensor)
    check_same_device(("high", high), ("low", low))
    if high.shape != low.shape:
        raise ValueError(f"high and low must have the same shape, got high {list(high.shape)}, low {list(low.shape)}")
    _check_range(ignore_index, high.dtype)
    if ignore_index == 0:
        raise ValueError("ignore_index must not be 0, the label of the background, got 0")
    return high.masked_fill((high == 0) & (low != 0), ignore_index)


def _refine_and_choose(
    images: Tensor,
    classes: Tensor,
    scores: Sequence[Score],
    index: Tensor,
    counts: Tensor,
    steps: Callable[..., Tensor],
    choose: Callable[..., Tensor],
    num_classes: int | None,
) -> tuple[Tensor, Tensor | None]:
    """Return labels [B, V, H, W], and maps [B, 1 + C, V * S, H, W] for S background scores if C is given."""
    size = images.shape[2:]
    maps = steps(images, classes, scores, index, counts)
    soft = None if num_classes is None else _unpack(maps, index, counts, num_classes, size)
    return choose(maps, index, counts, size), soft


def _in_box(
    image: Tensor,
    classes: Tensor,
    scores: Sequence[Score],
    index: Tensor,
    counts: Tensor,
    steps: Callable[..., Tensor],
    choose: Callable[..., Tensor],
    num_classes: int | None,
    box: Sequence[int],
    ignore_index: int,
) -> tuple[Tensor, Tensor | None]:
    """Apply `_refine_and_choose` to one image, cropped to a box (top, bottom, left, right)."""
    top, bottom, left, right = box
    size = image.shape[2:]
    padding = (left, size[1] - right, top, size[0] - bottom)
    if top == bottom or left == right:  # nothing is valid
        views = classes.shape[2]
        soft = None if num_classes is None else classes.new_zeros(1, 1 + num_classes, views * len(scores), *size)
        return index.new_full((1, views, *size), ignore_index), soft

    def crop(maps: Tensor) -> Tensor:
        return _resize(maps, size)[..., top:bottom, left:right]

    cropped = [crop(s) if isinstance(s, Tensor) and s.shape[-2:] != (1, 1) else s for s in scores]
    labels, soft = _refine_and_choose(crop(image), crop(classes), cropped, index, counts, steps, choose, num_classes)
    return F.pad(labels, padding, value=ignore_index), None if soft is None else F.pad(soft, padding)


def _refine(
    images: Tensor,
    classes: Tensor,
    scores: Sequence[Score],
    index: Tensor,
    counts: Tensor,
    refine: PAMR | PAR | None,
    softmax: bool,
    down_scale: int,
    align_corners: bool,
    resize_images: Callable[..., Tensor],
    resize_cams: Callable[..., Tensor],
    exact: bool,
) -> Tensor:
    """Return refined maps [B, 1 + M, V * S, h, w] of present classes [B, M, V, ., .] with S background scores.

    Without `exact`, the background may differ by 1e-6 per iteration from what refining it would give.
    """
    height, width = images.shape[2:]
    if min(height, width) < down_scale:
        raise ValueError(
            f"down_scale must be at most the height and width that are refined, got {down_scale} for {height} x {width}"
        )
    size = (height // down_scale, width // down_scale)
    if classes.shape[-2:] != size:
        classes = resize_cams(classes, size, **({"align_corners": True} if align_corners else {}))
    valid = _valid(index, counts)[:, :, None, None, None]
    batch, _, views, *_ = classes.shape
    backgrounds = [
        _background_map(score, classes, valid, align_corners).expand(batch, 1, views, *size) for score in scores
    ]
    if softmax:
        classes = classes.masked_fill(~valid, -torch.inf)
    # Classes come before views and scores: the present channels of an image are its first (1 + count) * V * S ones.
    classes = classes[:, :, :, None].expand(-1, -1, -1, len(scores), -1, -1)
    maps = torch.cat([torch.stack(backgrounds, dim=3), classes], dim=1)  # [B, 1 + M, V, S, h, w]
    maps = (maps.softmax(dim=1) if softmax else maps).flatten(2, 3)
    if refine is None:
        return maps
    affinity = refine.affinity(images if images.shape[2:] == size else resize_images(images.detach(), size))
    if exact or not softmax or affinity.dtype != torch.float32:
        return refine.propagate(maps.flatten(1, 2), affinity, (1 + counts) * maps.shape[2]).view(maps.shape)
    # The channels of a pixel sum to 1, and every iteration multiplies this sum by the sum of the weights. The
    # background is therefore the total minus the classes. It is raised by more than the rounding error, so that it
    # still wins where all channels are equal.
    total = (1 + ROUNDING * (1 + refine.num_iter)) * refine.sum_of_weights() ** refine.num_iter
    refined = refine.propagate(maps[:, 1:].flatten(1, 2), affinity, counts * maps.shape[2]).view(maps[:, 1:].shape)
    return torch.cat([total - refined.sum(dim=1, keepdim=True), refined], dim=1)


def _choose(
    maps: Tensor,
    index: Tensor,
    counts: Tensor,
    size: Sequence[int],
    num_scores: int,
    ignore_index: int,
    label_backend: LabelBackend | None,
) -> Tensor:
    """Return labels [B, V, H, W]: the highest channels of maps [B, 1 + M, V * S, h, w], resized to H x W, merged."""
    maps = maps.detach()
    if label_backend is not None:
        return label_backend.choose_labels(maps, index + 1, counts, num_scores, size, ignore_index)
    if reads_values(counts):
        images = enumerate(counts.tolist())
        parts = [_argmax(maps[b : b + 1, : 1 + n], index[b : b + 1] + 1, None, size) for b, n in images]
        chosen = torch.cat(parts)
    else:
        chosen = _argmax(maps, index + 1, _valid(index, counts), size)
    return chosen if num_scores == 1 else merge_labels(chosen[:, ::2], chosen[:, 1::2], ignore_index)


def _label_backend(refine: PAMR | PAR | None, counts: Tensor, *maps: Tensor) -> LabelBackend | None:
    """Return the backend of the refinement if it has functions for labels that take these maps, else None.

    They take float32 maps, in eager mode and outside of torch.func, and record no gradient.
    """
    if refine is None or not reads_values(counts):
        return None
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor  # by torch.func
    if any(x.dtype != torch.float32 or wrapped(x) for x in maps):
        return None
    return find_label_backend(refine.backend, counts.device)


def _argmax(maps: Tensor, numbers: Tensor, valid: Tensor | None, size: Sequence[int]) -> Tensor:
    """Take the argmax over the channels of maps [B, 1 + M, G, h, w], resizing one channel at a time.

    Args:
        maps: background and classes.
        numbers: [B, M], the label of every class; that of the background is 0.
        valid: bool [B, M], the classes that may be chosen; None for all.
        size: height and width of the result.
    """
    best = _resize(maps[:, 0], size)
    result = torch.zeros_like(best, dtype=torch.int64)
    for k in range(maps.shape[1] - 1):
        score = _resize(maps[:, k + 1], size)
        better = score > best
        if valid is not None:
            better = better & valid[:, k, None, None, None]
        # Numbers increase with k, so the maximum is the latest one. `torch.where` would take ten times as long.
        result = torch.maximum(result, better * numbers[:, k, None, None, None])
        best = torch.maximum(best, score)
    return result


def _unpack(maps: Tensor, index: Tensor, counts: Tensor, num_classes: int, size: Sequence[int]) -> Tensor:
    """Return maps [B, 1 + C, G, H, W] of all classes from those of the present ones, [B, 1 + M, G, h, w]."""
    valid = F.pad(_valid(index, counts), (1, 0), value=True)[:, :, None, None, None]
    resized = _resize(maps, size).masked_fill(~valid, 0)
    return put_channels(resized, F.pad(index + 1, (1, 0)), 1 + num_classes)


def _background_map(score: Score, classes: Tensor, valid: Tensor, align_corners: bool) -> Tensor:
    """Return a background score as a tensor that broadcasts against [B, 1, V, h, w], given classes [B, M, V, h, w]."""
    if isinstance(score, PowerBackground):
        highest = classes.masked_fill(~valid, -torch.inf).amax(dim=1, keepdim=True)
        highest = torch.where(valid.any(dim=1, keepdim=True), highest, 0)  # an image without classes
        # Resizing may take a CAM of 1 beyond it, and a negative number has no power 1.5.
        return (1 - highest).clamp(min=0) ** score.power
    if isinstance(score, Tensor):
        score = cast(score, classes.dtype)
        return score if score.shape[-2:] == (1, 1) else _resize(score, classes.shape[-2:], align_corners)
    return classes.new_full((1, 1, 1, 1, 1), float(score))


def _resize(maps: Tensor, size: Sequence[int], align_corners: bool = False) -> Tensor:
    """Resize maps [..., h, w] bilinearly, unless they have the size already."""
    if list(maps.shape[-2:]) == list(size):
        return maps
    resized = F.interpolate(maps.flatten(1, -3), size=tuple(size), mode="bilinear", align_corners=align_corners)
    return resized.unflatten(1, maps.shape[1:-2])


def _take(views: Tensor, index: Tensor) -> Tensor:
    """Return the channels [B, M] of CAMs [B, V, C, h, w] as [B, M, V, h, w], in float32 at least."""
    batch, count = views.shape[:2]
    chosen = take_channels(views.flatten(0, 1), index.repeat_interleave(count, dim=0))  # [B * V, M, h, w]
    return cast(chosen.unflatten(0, (batch, count)).transpose(1, 2), working_dtype(views))


def _present(labels: Tensor, max_classes: int | None) -> tuple[Tensor, Tensor]:
    """Return the classes of every image, the present ones first, and their number; see `present_first`."""
    if max_classes is not None:
        check_count("max_classes", max_classes, minimum=1)
    return present_first(labels != 0, max_classes)


def _valid(index: Tensor, counts: Tensor) -> Tensor:
    """Return which of the classes [B, M] are present."""
    return torch.arange(index.shape[1], device=index.device) < counts[:, None]


def _check_settings(
    refine: PAMR | PAR | None,
    background: Background | None,
    softmax: bool,
    down_scale: int,
    crop: bool,
    align_corners: bool,
    ignore_index: int,
    max_classes: int | None,
) -> None:
    """Check what can be checked without a batch."""
    if refine is not None and not isinstance(refine, (PAMR, PAR)):
        raise TypeError(f"refine must be a PAMR, a PAR or None, got {type(refine).__name__}")
    for name, flag in (("softmax", softmax), ("crop", crop), ("align_corners", align_corners)):
        check_flag(name, flag)
    check_count("down_scale", down_scale, minimum=1)
    _check_range(ignore_index, torch.int64)
    if max_classes is not None:
        check_count("max_classes", max_classes, minimum=1)
    if background is not None:
        _split_background(background)


def _check_cams(cams: Tensor, labels: Tensor, background_first: bool) -> Tensor:
    """Check CAMs [B, C, h, w] or [B, V, C, h, w] and labels [B, C]; return the CAMs as [B, V, C, h, w]."""
    check_floating("cams", cams)
    if cams.ndim not in (4, 5):
        raise ValueError(f"cams must have 4 dimensions [B, C, h, w] or 5 [B, V, C, h, w], got shape {list(cams.shape)}")
    check_pixels("cams", cams)
    _check_labels(labels, ("cams", cams), cams.shape[-3] - int(background_first))
    return cams if cams.ndim == 5 else cams[:, None]


def _check_labels(labels: Tensor, named_maps: tuple[str, Tensor], num_classes: int) -> None:
    """Check image-level labels [B, C], given maps as a pair (name, tensor) and their number of classes."""
    name, maps = named_maps
    if not isinstance(labels, Tensor) or labels.is_complex():
        given = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
        raise TypeError(f"labels must be a tensor of numbers or torch.bool, got {given}")
    if labels.layout is not torch.strided:
        raise TypeError(f"labels must be a dense tensor, got layout {labels.layout}")
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


def _check_background(background: Background, cams: Tensor) -> tuple[Score, ...]:
    """Return one score, or a high and a low one; a tensor as [B, 1, 1, h, w]."""
    return tuple(_check_score(score, cams) for score in _split_background(background))


def _split_background(background: Background) -> tuple[Score, ...]:
    """Return one score, or a high and a low one."""
    scores = background if isinstance(background, tuple) else (background,)
    if len(scores) not in (1, 2):
        raise ValueError(f"background must be a score or a pair (high, low), got {len(scores)} scores")
    numbers = [score for score in scores if not isinstance(score, (Tensor, PowerBackground))]
    for number in numbers:
        if not isinstance(number, Real):
            raise TypeError(
                "background must be a number, a tensor, a PowerBackground or a tuple (high, low) of two of them, got"
                f" {type(number).__name__}"
            )
        check_real("background", number)
    if len(numbers) == 2 and numbers[0] < numbers[1]:
        raise ValueError(f"background must be a pair (high, low), got {numbers}")
    return scores


def _check_score(score: Score, cams: Tensor) -> Score:
    if not isinstance(score, Tensor):
        return score
    check_floating("background", score)
    check_same_device(("cams", cams), ("background", score))
    if score.shape[:1] != cams.shape[:1] or score.ndim not in (1, 4) or (score.ndim == 4 and score.shape[1] != 1):
        raise ValueError(f"background must be [B] or [B, 1, h, w] for cams {list(cams.shape)}, got {list(score.shape)}")
    if score.ndim == 4:
        check_pixels("background", score)
    return score.detach().reshape(len(score), 1, 1, *(score.shape[2:] if score.ndim == 4 else (1, 1)))


def _check_boxes(boxes: Tensor | None, named_maps: tuple[str, Tensor], crop: bool = False) -> Tensor | None:
    """Check boxes [B, 4] on maps, given as a pair (name, tensor); return the valid pixels, bool [B, H, W].

    Returns None without boxes, and with `crop`, where nothing outside is computed.
    """
    name, maps = named_maps
    if boxes is None:
        if crop:
            raise ValueError("boxes must be given with crop=True, got None")
        return None
    _check_integers("boxes", boxes)
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


def _check_integers(name: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor) or tensor.dtype not in INTEGERS:
        given = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
        raise TypeError(f"{name} must be an integer tensor ({', '.join(map(str, INTEGERS))}), got {given}")


def _check_range(ignore_index: int, dtype: torch.dtype) -> None:
    """Refuse anything but an integer that a dtype holds."""
    check_integer("ignore_index", ignore_index)
    bits = 8 * dtype.itemsize
    lowest, highest = (0, 2**bits - 1) if dtype == torch.uint8 else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    if not lowest <= ignore_index <= highest:
        raise ValueError(f"ignore_index must be in {lowest} to {highest}, the range of {dtype}, got {ignore_index}")


def _check_ignore_index(ignore_index: int, labels: Tensor) -> None:
    """Refuse an index that is not an integer of 64 bits, or is the label of a class or of the background."""
    _check_range(ignore_index, torch.int64)
    if 0 <= ignore_index <= labels.shape[1]:
        raise ValueError(
            f"ignore_index must be no label, of which there are 0 to {labels.shape[1]}, got {ignore_index}"
        )
