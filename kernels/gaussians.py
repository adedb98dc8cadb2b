"""The Gaussians over position and colour that weight the sums of `bilateral_filter` and of the mean field."""

from typing import NamedTuple


class Gaussian(NamedTuple):
    """The weights exp(-|p_i - p_j|^2 / (2 sigma_xy^2) - |I_i - I_j|^2 / (2 sigma_rgb^2)).

    Without an image, the second term is left out.
    """

    sigma_xy: float
    sigma_rgb: float = 1.0
