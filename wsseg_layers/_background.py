"""Background scores of pseudo labels: what a score may be, its checks, and the map that it stands for."""

from dataclasses import dataclass
from numbers import Real

import torch
from torch import Tensor

from ._checks import check_floating, check_pixels, check_positive, check_real, check_same_device
from ._dtypes import cast
from ._refinement import resize_maps


@dataclass(frozen=True)
class PowerBackground:
    """A background score computed from the CAMs: (1 - m)^power, where m is the highest CAM of the image's classes.

    The CAMs must be in [0, 1]. The larger the power, the lower the score.

    Args:
        power: positive.

    Example:
        >>> import torch
        >>> from wsseg_layers.functional import cam_to_label
        >>> cams, labels = torch.tensor([[[[0.2, 0.8]]]]), torch.ones(1, 1)
        >>> cam_to_label(cams, labels, PowerBackground(1.0)).tolist()
        [[[0, 1]]]
    """

    __module__ = "wsseg_layers.pseudo_labels"  # where users import it; pickles name this module

    power: float = 1.0

    def __post_init__(self) -> None:
        check_positive("power", self.power)


Score = float | Tensor | PowerBackground
Background = Score | tuple[Score, Score]


def split_background(background: Background) -> tuple[Score, ...]:
    """Check what can be checked without a batch; return one score, or a high and a low one."""
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
    powers = [score.power for score in scores if isinstance(score, PowerBackground)]
    if len(powers) == 2 and powers[0] > powers[1]:  # the larger the power, the lower the score
        raise ValueError(f"background must be a pair (high, low) of scores, whose powers are (low, high), got {powers}")
    return scores


def check_background(background: Background, cams: Tensor) -> tuple[Score, ...]:
    """Return one score, or a high and a low one, for CAMs [B, ..., h, w]; a tensor as [B, 1, 1, h, w]."""
    return tuple(_check_score(score, cams) for score in split_background(background))


def _check_score(score: Score, cams: Tensor) -> Score:
    if not isinstance(score, Tensor):
        return score
    check_floating("background", score)
    check_same_device(("cams", cams), ("background", score))
    if score.shape[:1] != cams.shape[:1] or score.ndim not in (1, 4) or (score.ndim == 4 and score.shape[1] != 1):
        raise ValueError(f"background must be [B] or [B, 1, h, w] for cams {list(cams.shape)}, got {list(score.shape)}")
    if score.ndim == 4:
        check_pixels("background", score)
    return score.detach().reshape(score.shape[0], 1, 1, *(score.shape[2:] if score.ndim == 4 else (1, 1)))


def has_pixels(score: Score) -> bool:
    """Return whether a checked score has one value per pixel."""
    return isinstance(score, Tensor) and score.shape[-2:] != (1, 1)


def background_map(score: Score, cams: Tensor, present: Tensor, align_corners: bool) -> Tensor:
    """Return a checked score as a tensor that broadcasts against [B, 1, V, h, w].

    Args:
        score: score, from `check_background`.
        cams: CAMs of an image's classes, [B, M, V, h, w].
        present: bool [B, M, 1, 1, 1], the classes that are present.
        align_corners: `align_corners` of the resizing of a score per pixel.
    """
    if isinstance(score, PowerBackground):
        highest = cams.masked_fill(~present, -torch.inf).amax(dim=1, keepdim=True)
        highest = torch.where(present.any(dim=1, keepdim=True), highest, 0)  # an image without classes
        # Resizing may take a CAM of 1 beyond it, and a negative number has no power 1.5.
        return (1 - highest).clamp(min=0) ** score.power
    if isinstance(score, Tensor):
        score = cast(score, cams.dtype)
        return resize_maps(score, cams.shape[-2:], align_corners) if has_pixels(score) else score
    return cams.new_full((1, 1, 1, 1, 1), float(score))
