"""The variants of the affinity. To add one, add it to `VARIANTS`: operators look names up there."""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch

VariantName = Literal["pamr", "paper", "par"]

GUARD = 1e-8  # of the published PAMR and PAR
PAR_W1, PAR_W2 = 0.3, 0.01  # of the published PAR: the factor of sigma, and the factor of the position term


class Variant(NamedTuple):
    r"""An affinity of the family that PAMR and PAR belong to. The defaults are the published PAMR.

    .. math:: \alpha_{i,n} = \mathrm{softmax}_n \left( -\frac{1}{K} \sum_k \left(
        \frac{|I_{k,i} - I_{k,n}|}{\mathrm{guard} + \mathrm{weight} \cdot \sigma_{k,i}^{\mathrm{sigma\_power}}}
        \right)^{\mathrm{power}} \right) + \mathrm{position\_weight} \cdot \mathrm{position}_n

    sigma is the unbiased standard deviation over the neighbours and, with `with_centre`, over the pixel itself, counted
    once per dilation. The position term is a softmax of the same form over the neighbours' distances from the pixel.

    Attributes:
        weight: factor of sigma, positive. The larger it is, the flatter the weights are.
        sigma_power: 0, 1 or 2. With 0, differences are divided by the constant guard + weight. With 1, the affinity
            does not change when a channel of the image is scaled.
        power: 1 or 2.
        guard: keeps the division finite where the image is flat; at least 0. With 0, the weights are NaN there, unless
            `sigma_power` is 0.
        with_centre: whether sigma counts the pixel itself.
        position_weight: factor of the position term, at least 0. The weights of a pixel sum to 1 + position_weight.

    Example:
        >>> Variant(weight=0.2)  # the published PAMR with 0.2 instead of 0.1
        Variant(weight=0.2, sigma_power=1, power=1, guard=1e-08, with_centre=True, position_weight=0.0)
    """

    weight: float = 0.1
    sigma_power: int = 1
    power: int = 1
    guard: float = GUARD
    with_centre: bool = True
    position_weight: float = 0.0

    @property
    def is_steep(self) -> bool:
        """Whether exponents have no bound, as at an outlier among equal neighbours: plain float32 is too inexact."""
        return self.sigma_power != 1 or self.power == 2 or not self.with_centre

    def samples(self, dilations: int) -> int:
        """Return the number of values that sigma is taken over."""
        return (9 if self.with_centre else 8) * dilations


def par_variant(w1: float = PAR_W1, w2: float = PAR_W2, guard: float = GUARD) -> Variant:
    """Return the published PAR: -(|I_i - I_n| / (sigma + guard) / w1)^2, and the position term with the factor w2."""
    return Variant(weight=w1, power=2, guard=w1 * guard, with_centre=False, position_weight=w2)


VARIANTS: dict[str, Variant] = {
    # The published PAMR: -|I_i - I_n| / (1e-8 + 0.1 sigma).
    "pamr": Variant(),
    # Eq. 8 as printed: -|I_i - I_n| / sigma^2, with the guard of the published PAMR.
    "paper": Variant(weight=1.0, sigma_power=2),
    "par": par_variant(),
}


def position_affinity(offsets: Sequence[tuple[int, int]], variant: Variant) -> torch.Tensor:
    """Return the position term of every neighbour, [N] in float64: it is the same for every pixel."""
    distance = torch.tensor([math.hypot(dy, dx) for dy, dx in offsets], dtype=torch.float64)
    scale = variant.guard + variant.weight * distance.std() ** variant.sigma_power
    return variant.position_weight * (-((distance / scale) ** variant.power)).softmax(dim=0)
