"""The forms of the affinity. To add one is to add it to this table: operators, both backends and PAMR read it."""

import math
from typing import NamedTuple

import torch


class Variant(NamedTuple):
    r"""An affinity of the family that PAMR and PAR belong to.

    .. math:: \alpha_{i,n} = \mathrm{softmax}_n \left( -\frac{1}{K} \sum_k \left(
        \frac{|I_{k,i} - I_{k,n}|}{\mathrm{guard} + \mathrm{weight} \cdot \sigma_{k,i}^{\mathrm{sigma\_power}}}
        \right)^{\mathrm{power}} \right) + \mathrm{position\_weight} \cdot \mathrm{position}_n

    sigma is the unbiased standard deviation over the neighbours and, if `with_centre`, over the pixel itself, once for
    every dilation. The position is a softmax of the same form over the neighbours' distances from the pixel.

    Attributes:
        weight: the larger, the flatter the weights.
        sigma_power: 1 or 2. With 1, the affinity does not change when a channel of the image is scaled.
        power: 1 or 2.
        guard: keeps the division finite where the image is flat.
        with_centre: whether sigma counts the pixel itself.
        position_weight: share of the position term, by which the rows' sum exceeds 1.
    """

    weight: float
    sigma_power: int = 1
    power: int = 1
    guard: float = 1e-8
    with_centre: bool = True
    position_weight: float = 0.0

    @property
    def in_double(self) -> bool:
        """Whether exponents grow beyond some tens (an outlier among equal neighbours), where float32 errs by units."""
        return self.sigma_power == 2 or self.power == 2

    def samples(self, dilations: int) -> int:
        """Return over how many values sigma is taken."""
        return (9 if self.with_centre else 8) * dilations


VARIANTS = {
    "pamr": Variant(weight=0.1),
    "paper": Variant(weight=1.0, sigma_power=2),
    "par": Variant(weight=0.3, power=2, guard=0.3e-8, with_centre=False, position_weight=0.01),
}


def position_affinity(offsets: list[tuple[int, int]], variant: Variant) -> torch.Tensor:
    """Return the position term of every neighbour, [N] in float64: it is the same for every pixel."""
    distance = torch.tensor([math.hypot(dy, dx) for dy, dx in offsets], dtype=torch.float64)
    scale = variant.guard + variant.weight * distance.std() ** variant.sigma_power
    return variant.position_weight * (-((distance / scale) ** variant.power)).softmax(dim=0)
