"""From class activation maps (CAMs) and image-level labels to pseudo labels, a class index per pixel.

The rules of AFA (Ru et al., CVPR 2022), ToCo (Ru et al., CVPR 2023) and their successors, and the rule of Araslanov and
Roth, "Single-Stage Semantic Segmentation from Image Labels", CVPR 2020. https://arxiv.org/abs/2005.08104
"""

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._background import Background, PowerBackground, Score, background_map, check_background
from ._checks import check_choice, check_integers, check_maps, check_not_negative, check_pixels, check_same_device
from ._dtypes import cast, working_dtype
from ._label_checks import (
    IGNORE_INDEX,
    Settings,
    check_boxes,
    check_cams,
    check_ignore_index,
    check_labels,
    check_max_classes,
    check_range,
    check_settings,
)
from ._label_refinement import make_labels, merge, take_classes
from ._refinement import mark_present, present_first, take_channels
from .pamr import PAMR
from .par import PAR

__all__ = [
    "IGNORE_INDEX",
    "Background",
    "Discard",
    "PowerBackground",
    "PseudoLabels",
    "Score",
    "cam_to_label",
    "merge_labels",
    "refine_pseudo_labels",
    "threshold_pseudo_labels",
]

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
    views = check_cams(cams, labels, background_first=False)
    scores = check_background(background, cams)
    check_ignore_index(ignore_index, labels)
    inside = check_boxes(boxes, ("cams", cams))
    check_max_classes(max_classes)
    classes, counts = present_first(labels != 0, max_classes)
    packed = take_classes(views.detach(), classes)  # [B, M, V, h, w]
    present = mark_present(classes, counts)[:, :, None, None, None]
    value, channel = packed.masked_fill(~present, -torch.inf).max(dim=1)  # [B, V, h, w]
    number = (classes + 1).gather(1, channel.flatten(1)).view(channel.shape)
    thresholds = [background_map(score, packed, present, align_corners=False)[:, 0] for score in scores]
    chosen = [number.masked_fill(~(value > threshold), 0) for threshold in thresholds]
    result = chosen[0] if len(chosen) == 1 else merge(chosen[0], chosen[1], ignore_index)
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

    Classes that are absent never appear. On a CPU in eager mode they cost nothing; elsewhere, see `max_classes`. All
    resizing is bilinear. Where two channels are equal, the background wins over the classes, and the first class over
    the others.

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
    settings = Settings(
        refine=refine,
        background=background,
        softmax=softmax,
        down_scale=down_scale,
        crop=crop,
        align_corners=align_corners,
        ignore_index=ignore_index,
        max_classes=max_classes,
    )
    result, _ = make_labels(images, cams, labels, boxes, settings, with_maps=False)
    return result


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
        self.refine = refine
        self.background = background
        self.softmax = softmax
        self.down_scale = down_scale
        self.crop = crop
        self.align_corners = align_corners
        self.ignore_index = ignore_index
        self.max_classes = max_classes
        check_settings(self._settings())

    def forward(self, images: Tensor, cams: Tensor, labels: Tensor, boxes: Tensor | None = None) -> Tensor:
        """Return labels [B, H, W] of images [B, K, H, W], given CAMs [B, C, h, w] and image-level labels [B, C].

        With V views, [B, V, C, h, w], they are [B, V, H, W]. `boxes` are integers [B, 4]; see `refine_pseudo_labels`.
        """
        result, _ = make_labels(images, cams, labels, boxes, self._settings(), with_maps=False)
        return result

    def labels_and_maps(
        self, images: Tensor, cams: Tensor, labels: Tensor, boxes: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the labels, and the refined maps that they are the argmax of.

        The maps are [B, C + 1, H, W], background first, in the dtype of `cams`; [B, V, C + 1, H, W] for V views, and
        with a dimension of 2 (high, low) before C + 1 for a pair of background scores. They are 0 for absent classes
        and, with `crop`, outside of the boxes. They are differentiable with respect to `cams`.
        """
        result, maps = make_labels(images, cams, labels, boxes, self._settings(), with_maps=True)
        assert maps is not None
        return result, maps

    def _settings(self) -> Settings:
        return Settings(
            refine=self.refine,
            background=self.background,
            softmax=self.softmax,
            down_scale=self.down_scale,
            crop=self.crop,
            align_corners=self.align_corners,
            ignore_index=self.ignore_index,
            max_classes=self.max_classes,
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
    check_labels(labels, ("masks", masks), masks.shape[1] - 1)
    for name, number in (("foreground", foreground), ("background", background), ("floor", floor)):
        check_not_negative(name, number)
    check_choice("discard", discard, DISCARDS)
    check_ignore_index(ignore_index, labels)
    check_max_classes(max_classes)
    classes, counts = present_first(labels != 0, max_classes)
    channels = F.pad(classes + 1, (1, 0))  # [B, 1 + M], background first
    present = F.pad(mark_present(classes, counts), (1, 0), value=True)
    packed = cast(take_channels(masks.detach(), channels), working_dtype(masks))
    fractions = torch.cat(
        [packed.new_full((1,), float(background)), packed.new_full(classes.shape[1:], float(foreground))]
    )
    threshold = (packed.amax(dim=(2, 3)) * fractions).clamp(min=float(floor))
    claimed = (packed > threshold[:, :, None, None]) & present[:, :, None, None]
    single = claimed.sum(dim=1) == 1
    first = claimed.to(torch.uint8).argmax(dim=1)  # [B, h, w]
    result = channels.gather(1, first.flatten(1)).view(first.shape).masked_fill(~single, ignore_index)
    if discard != "none":
        claims = (claimed & single[:, None]).any(dim=3).any(dim=2) | ~present  # [B, 1 + M]
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
        check_integers(name, tensor)
    check_same_device(("high", high), ("low", low))
    if high.shape != low.shape:
        raise ValueError(f"high and low must have the same shape, got high {list(high.shape)}, low {list(low.shape)}")
    check_range(ignore_index, high.dtype)
    if ignore_index == 0:
        raise ValueError("ignore_index must not be 0, the label of the background, got 0")
    return merge(high, low, ignore_index)
