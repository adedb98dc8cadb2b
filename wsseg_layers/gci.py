"""Global cue injection (GCI): scales and shifts shallow features by cues from the deep features of the whole image.

Araslanov and Roth, "Single-Stage Semantic Segmentation from Image Labels", CVPR 2020, section 3.4.
https://arxiv.org/abs/2005.08104
"""

from typing import Literal, cast

import torch
from torch import Tensor, nn

from ._checks import (
    check_choice,
    check_count,
    check_maps,
    check_not_negative,
    check_pixels,
    check_same_batch,
    check_same_device,
)
from ._dtypes import autocasts, working_dtype

Norm = Literal["batch", "instance"]


def global_cue_injection(shallow: Tensor, cues: Tensor, eps: float = 1e-5) -> Tensor:
    r"""Normalise shallow features per image and channel, then scale and shift them by global cues (eq. 11).

    .. math:: x^{(s)*} = \mathrm{ReLU}\left( z \, \frac{x^{(s)} - \mu(x^{(s)})}{\sigma(x^{(s)})} + b \right)

    z and b are the two halves of the maximum of the cues over space. Mean and (biased) variance are computed per image
    and channel, at least in float32; `eps` is added to the variance, as in `torch.nn.InstanceNorm2d`.

    Args:
        shallow: shallow features, [B, C, h, w].
        cues: deep features after the convolution that doubles their channels, [B, 2C, h', w'].
        eps: keeps the division finite where a channel is constant; at least 0.

    Returns:
        Augmented shallow features, [B, C, h, w], in the dtype of `shallow`.

    Raises:
        TypeError: `shallow` or `cues` is no floating-point tensor.
        ValueError: their batch sizes or devices differ, `cues` does not have twice the channels of `shallow`, a
            dimension is empty, or `eps` is negative.

    Source:
        Araslanov and Roth, CVPR 2020, eq. 11.

    Example:
        >>> import torch
        >>> shallow, cues = torch.randn(2, 8, 12, 12), torch.randn(2, 16, 6, 6)
        >>> global_cue_injection(shallow, cues).shape
        torch.Size([2, 8, 12, 12])
    """
    for name, maps in (("shallow", shallow), ("cues", cues)):
        check_maps(name, maps)
        check_pixels(name, maps)
    check_not_negative("eps", eps)
    check_same_batch(("shallow", shallow), ("cues", cues))
    check_same_device(("shallow", shallow), ("cues", cues))
    if cues.shape[1] != 2 * shallow.shape[1]:
        raise ValueError(
            f"cues must have twice the channels of shallow {list(shallow.shape)}, got shape {list(cues.shape)}"
        )
    dtype = working_dtype(shallow)
    scale, shift = _pool_cues(cues.to(dtype))
    # One group per channel is instance_norm, which refuses maps of a single pixel.
    normalised = torch.group_norm(shallow.to(dtype), shallow.shape[1], eps=float(eps))
    return torch.relu(scale * normalised + shift).to(shallow.dtype)  # eq. 11


class GCI(nn.Module):
    """Global cue injection: modulates shallow features by a global summary of the deep features.

    `norm="batch"`, the default, is the form in the authors' published network:
        deep -> 1x1 convolution to 2C channels -> BatchNorm -> ReLU -> maximum over space -> (gamma, beta);
        shallow -> 1x1 convolution to C channels -> BatchNorm without affine parameters -> x (gamma + 1) + beta
        -> ReLU -> 1x1 convolution -> BatchNorm -> ReLU.
    `norm="instance"` is eq. 11 as printed:
        deep -> 1x1 convolution to 2C channels -> maximum over space -> (z, b);
        shallow -> 1x1 convolution to C channels (none if it has C channels) -> eq. 11 -> 1x1 convolution.

    Only the maximum of the deep features over space is used, so they may have any height and width.

    Args:
        in_channels: channels C of the deep features.
        shallow_channels: channels of the shallow features; C if None.
        out_channels: channels of the result; C if None, as the stochastic gate expects.
        norm: "batch" or "instance", see above.

    Source:
        Araslanov and Roth, CVPR 2020, section 3.4, eq. 11 and Figure 7.

    Example:
        >>> import torch
        >>> shallow, deep = torch.randn(2, 48, 81, 81), torch.randn(2, 256, 41, 41)
        >>> GCI(256, shallow_channels=48)(shallow, deep).shape
        torch.Size([2, 256, 81, 81])
    """

    def __init__(
        self,
        in_channels: int = 256,
        shallow_channels: int | None = None,
        out_channels: int | None = None,
        norm: Norm = "batch",
    ) -> None:
        super().__init__()
        shallow_channels = in_channels if shallow_channels is None else shallow_channels
        out_channels = in_channels if out_channels is None else out_channels
        check_count("in_channels", in_channels, minimum=1)
        check_count("shallow_channels", shallow_channels, minimum=1)
        check_count("out_channels", out_channels, minimum=1)
        check_choice("norm", norm, ("batch", "instance"))
        self.in_channels = in_channels
        self.shallow_channels = shallow_channels
        self.out_channels = out_channels
        self.norm = norm

        self.deep: nn.Module
        self.shallow: nn.Module
        self.project: nn.Module
        if norm == "batch":
            self.deep = nn.Sequential(
                nn.Conv2d(in_channels, 2 * in_channels, 1, bias=False), nn.BatchNorm2d(2 * in_channels), nn.ReLU()
            )
            self.shallow = nn.Sequential(
                nn.Conv2d(shallow_channels, in_channels, 1, bias=False), nn.BatchNorm2d(in_channels, affine=False)
            )
            self.project = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, bias=False), nn.BatchNorm2d(out_channels), nn.ReLU()
            )
        else:
            self.deep = nn.Conv2d(in_channels, 2 * in_channels, 1)
            self.shallow = nn.Identity()
            if shallow_channels != in_channels:
                # No bias: the normalisation that follows removes it.
                self.shallow = nn.Conv2d(shallow_channels, in_channels, 1, bias=False)
            self.project = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, shallow: Tensor, deep: Tensor) -> Tensor:
        """Return augmented shallow features.

        Args:
            shallow: shallow features, [B, shallow_channels, h, w].
            deep: deep features, [B, in_channels, h', w'].

        Returns:
            Features [B, out_channels, h, w], in the dtype of the last convolution.

        Raises:
            TypeError: `shallow` or `deep` is no floating-point tensor, or, without autocast, not of the weights' dtype.
            ValueError: their channels are not those of the module, or their batch sizes or devices differ.
        """
        self._check_features("shallow", shallow, self.shallow_channels)
        self._check_features("deep", deep, self.in_channels)
        check_same_batch(("shallow", shallow), ("deep", deep))
        cues = self.deep(deep)
        features = self.shallow(shallow)
        if self.norm == "instance":
            return self.project(global_cue_injection(features, cues))
        gamma, beta = _pool_cues(cues)
        return self.project(torch.relu(features * (gamma + 1) + beta))  # eq. 11, z = gamma + 1 and batch statistics

    def extra_repr(self) -> str:
        """Return the arguments for `print(module)`."""
        return (
            f"in_channels={self.in_channels}, shallow_channels={self.shallow_channels},"
            f" out_channels={self.out_channels}, norm={self.norm!r}"
        )

    def _check_features(self, name: str, features: Tensor, channels: int) -> None:
        check_maps(name, features)
        check_pixels(name, features)
        if features.shape[1] != channels:
            raise ValueError(f"{name} must have {channels} channels, got shape {list(features.shape)}")
        # Not next(self.parameters()): a replica of nn.DataParallel has none.
        convolution = self.project[0] if isinstance(self.project, nn.Sequential) else self.project
        weight = cast(Tensor, convolution.weight)
        check_same_device((name, features), ("the module's weights", weight))
        if features.dtype != weight.dtype and not autocasts(features.device):
            raise TypeError(f"{name} must have the dtype of the module's weights, {weight.dtype}, got {features.dtype}")


def _pool_cues(cues: Tensor) -> tuple[Tensor, Tensor]:
    """Return z and b of eq. 11, [B, C, 1, 1] each: the two halves of the maximum of the cues over space."""
    # max sends the gradient to one pixel, as max pooling does; amax spreads it over ties and takes twice the time.
    scale, shift = cues.flatten(2).max(dim=2).values[:, :, None, None].chunk(2, dim=1)
    return scale, shift
