"""Class activation maps (CAMs) before they become labels: their normalisation, and their fusion over scales and flips.

The forms of AFA (Ru et al., CVPR 2022) and its successors.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ._checks import check_flag, check_maps, check_pixels, check_positive
from ._dtypes import cast, working_dtype


def normalise_cam(cams: Tensor, eps: float = 1e-5) -> Tensor:
    """Bring every CAM to [0, 1]: subtract its minimum over the image, and divide by its maximum.

    Args:
        cams: CAMs, [B, C, h, w].
        eps: added to the maximum, positive.

    Returns:
        CAMs, [B, C, h, w], in the dtype of `cams`, computed in at least float32. A constant CAM becomes 0.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: a dimension is missing or empty, or `eps` is not positive.

    Source:
        `multi_scale_cam` of Ru et al., CVPR 2022.

    Example:
        >>> import torch
        >>> normalise_cam(torch.tensor([[[[1.0, 2.0, 3.0]]]])).round(decimals=3).tolist()
        [[[[0.0, 0.5, 1.0]]]]
    """
    check_maps("cams", cams)
    check_pixels("cams", cams)
    check_positive("eps", eps)
    values = cast(cams, working_dtype(cams))
    shifted = values - values.amin(dim=(2, 3), keepdim=True)
    return cast(shifted / (shifted.amax(dim=(2, 3), keepdim=True) + float(eps)), cams.dtype)


@torch.no_grad()
def multi_scale_cam(
    model: Callable[[Tensor], Tensor],
    images: Tensor,
    scales: Sequence[float] = (1.0, 0.5, 1.5),
    flip: bool = True,
) -> Tensor:
    """Return the CAMs of images, fused over several scales and over mirrored images.

    At every scale, the higher of the CAM and of the CAM of the mirrored image is taken, and negative values become 0.
    The sum over the scales is normalised by `normalise_cam`.

    Args:
        model: returns CAMs [2 * B, C, h, w] of images [2 * B, K, H, W], the mirrored images last, or [B, C, h, w]
            without `flip`. Two kinds of CAMs may be concatenated as channels.
        images: images, [B, K, H, W].
        scales: factors of the height and width of the images, positive.
        flip: also use mirrored images.

    Returns:
        CAMs, [B, C, H, W], in [0, 1], without a gradient.

    Raises:
        TypeError: an argument or the result of `model` has the wrong type.
        ValueError: a dimension is missing or empty, `scales` is empty, a scale is not positive, or `model` returns the
            wrong number of CAMs, CAMs without a pixel, or another number of channels at another scale.

    Source:
        `multi_scale_cam` of Ru et al., CVPR 2022.

    Example:
        >>> import torch
        >>> model = torch.nn.Conv2d(3, 20, 16, stride=16)
        >>> multi_scale_cam(model, torch.rand(2, 3, 64, 48)).shape
        torch.Size([2, 20, 64, 48])
    """
    check_maps("images", images)
    check_pixels("images", images)
    check_flag("flip", flip)
    if not isinstance(scales, Sequence):
        raise TypeError(f"scales must be a sequence of numbers, got {type(scales).__name__}")
    if len(scales) == 0:
        raise ValueError("scales must hold at least one scale, got none")
    for number, scale in enumerate(scales):
        check_positive(f"scales[{number}]", scale)
    size = images.shape[2:]
    total: Tensor | None = None
    for scale in scales:
        scaled = _resize(images, [max(1, int(scale * side)) for side in size])
        inputs = torch.cat([scaled, scaled.flip(-1)]) if flip else scaled
        cams = model(inputs)
        check_maps("the result of model", cams)
        check_pixels("the result of model", cams)
        if cams.shape[0] != inputs.shape[0]:
            raise ValueError(
                f"model must return CAMs for {len(inputs)} images{', half of them mirrored' if flip else ''},"
                f" got shape {list(cams.shape)}"
            )
        if total is not None and cams.shape[1] != total.shape[1]:
            raise ValueError(
                f"model must return as many channels at every scale, got {total.shape[1]} and {cams.shape[1]}"
            )
        cams = _resize(cams, size)
        if flip:
            straight, mirrored = cams.chunk(2)
            cams = torch.maximum(straight, mirrored.flip(-1))
        total = cams.relu() if total is None else total + cams.relu()
    assert total is not None
    return normalise_cam(total)


def _resize(maps: Tensor, size: Sequence[int]) -> Tensor:
    return F.interpolate(maps, size=tuple(size), mode="bilinear", align_corners=False)
