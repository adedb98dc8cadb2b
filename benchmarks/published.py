"""PAMR, PAR and the other layers in the form in which repositories use them: the peers of the benchmarks.

PAMR and PAR: replicate padding, a convolution with fixed one-hot filters per dilation, a [B, C, N, H, W] stack,
standard deviation, softmax, product and sum. Written from the definition.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def one_hot_filters(positions: Sequence[int]) -> Tensor:
    """Return 3x3 filters [len(positions), 1, 3, 3]; each copies one position of the window (row-major)."""
    filters = torch.zeros(len(positions), 9)
    filters[torch.arange(len(positions)), torch.tensor(positions)] = 1
    return filters.view(-1, 1, 3, 3)


CENTRE = 4
WINDOW = one_hot_filters(range(9))
NEIGHBOURS = one_hot_filters([position for position in range(9) if position != CENTRE])


def stack(x: Tensor, filters: Tensor, dilations: Sequence[int]) -> Tensor:
    """Return the outputs of the filters for each dilation, [B, C, len(filters) * len(dilations), H, W]."""
    batch, channels, height, width = x.shape
    maps = x.reshape(batch * channels, 1, height, width)
    filters = filters.to(x)
    shifted = [F.conv2d(F.pad(maps, [d] * 4, mode="replicate"), filters, dilation=d) for d in dilations]
    return torch.cat([s.view(batch, channels, -1, height, width) for s in shifted], dim=2)


def affinity(image: Tensor, dilations: Sequence[int]) -> Tensor:
    """Return PAMR's affinity [B, N, H, W] in its published form."""
    difference = (image[:, :, None] - stack(image, NEIGHBOURS, dilations)).abs()
    sigma = stack(image, WINDOW, dilations).std(dim=2, keepdim=True)
    similarity = -difference / (1e-8 + 0.1 * sigma)
    return similarity.mean(dim=1).softmax(dim=1)


def propagate(mask: Tensor, weights: Tensor, dilations: Sequence[int], num_iter: int) -> Tensor:
    """Return the mask after `num_iter` weighted means over the neighbours."""
    for _ in range(num_iter):
        mask = (stack(mask, NEIGHBOURS, dilations) * weights[:, None]).sum(dim=2)
    return mask


def pamr(image: Tensor, mask: Tensor, dilations: Sequence[int], num_iter: int) -> Tensor:
    """Return the refined mask [B, C, H, W]."""
    return propagate(mask, affinity(image, dilations), dilations, num_iter)


def par_affinity(imgs: Tensor, dilations: Sequence[int], w1: float = 0.3, w2: float = 0.01) -> Tensor:
    """Return PAR's affinity [B, N, H, W] in its published form."""
    neighbours = stack(imgs, NEIGHBOURS, dilations)
    difference = (neighbours - imgs[:, :, None]).abs()
    colour = -(((difference / (neighbours.std(dim=2, keepdim=True) + 1e-8)) / w1) ** 2)
    distance = torch.tensor([2**0.5, 1, 2**0.5, 1, 1, 2**0.5, 1, 2**0.5], device=imgs.device)
    distance = torch.cat([distance * d for d in dilations])[None, :, None, None]
    position = -(((distance / (distance.std(dim=1, keepdim=True) + 1e-8)) / w1) ** 2)
    return colour.mean(dim=1).softmax(dim=1) + w2 * position.softmax(dim=1)


def par(imgs: Tensor, masks: Tensor, dilations: Sequence[int], num_iter: int) -> Tensor:
    """Return the masks [B, C, H, W] refined by PAR."""
    return propagate(masks, par_affinity(imgs, dilations), dilations, num_iter)


def pseudo_labels(
    refine: Callable[[Tensor, Tensor], Tensor],
    images: Tensor,
    cams: Tensor,
    labels: Tensor,
    high: float = 0.7,
    low: float = 0.25,
    ignore_index: int = 255,
) -> Tensor:
    """Return the pseudo labels [B, H, W] of CAMs [B, C, H, W] as AFA, ToCo and their successors make them.

    Two background scores are put before all CAMs and resized with them; then every image is refined twice, by itself.
    """
    size = images.shape[2:]
    half = (size[0] // 2, size[1] // 2)
    small = F.interpolate(images, half, mode="bilinear", align_corners=False)
    result = torch.full((len(images), *size), ignore_index, device=images.device)
    resized = []
    for score in (high, low):
        background = torch.full_like(cams[:, :1], score)
        with_background = torch.cat([background, cams], dim=1)
        resized.append(F.interpolate(with_background, half, mode="bilinear", align_corners=False))
    for b, row in enumerate(labels):
        channels = torch.cat([row.new_ones(1), row]).nonzero()[:, 0]
        candidates = []
        for maps in resized:
            refined = refine(small[b : b + 1], maps[b, channels][None].softmax(dim=1))
            refined = F.interpolate(refined, size, mode="bilinear", align_corners=False)
            candidates.append(channels[refined.argmax(dim=1)[0]])
        with_high, with_low = candidates
        result[b] = with_high
        result[b, with_high == 0] = ignore_index
        result[b, (with_high == 0) & (with_low == 0)] = 0
    return result


def shifted_pamr(image: Tensor, mask: Tensor, dilations: Sequence[int], num_iter: int) -> Tensor:
    """Return PAMR's result as a sum over shifted views of the padded mask, which compilers fuse."""
    weights = affinity(image, dilations)
    height, width = mask.shape[-2:]
    reach = max(dilations)
    offsets = [(dy, dx) for d in dilations for dy in (-d, 0, d) for dx in (-d, 0, d) if (dy, dx) != (0, 0)]
    for _ in range(num_iter):
        padded = F.pad(mask, [reach] * 4, mode="replicate")
        mask = torch.zeros_like(mask)
        for n, (dy, dx) in enumerate(offsets):
            shifted = padded[:, :, reach + dy : reach + dy + height, reach + dx : reach + dx + width]
            mask = mask + weights[:, n : n + 1] * shifted
    return mask


def ngwp(scores: Tensor, masks: Tensor) -> Tensor:
    """Return normalised global weighted pooling, eq. 3."""
    return (masks * scores).sum(dim=(2, 3)) / (1 + masks.sum(dim=(2, 3)))


def size_penalty(masks: Tensor, p: float = 3, lam: float = 0.01) -> Tensor:
    """Return the focal size penalty, eq. 5."""
    size = masks.mean(dim=(2, 3))
    return (1 - size) ** p * torch.log(lam + size)


def stochastic_gate(deep: Tensor, shallow: Tensor, mixing_rate: float = 0.3) -> Tensor:
    """Return the stochastic gate's result, eq. 9, with a binary r that is drawn here."""
    r = (torch.rand_like(deep) < mixing_rate).to(deep.dtype)
    return (1 - r) * (deep - mixing_rate * shallow) / (1 - mixing_rate) + r * shallow


def gci(shallow: Tensor, cues: Tensor) -> Tensor:
    """Return global cue injection, eq. 11 without its convolutions."""
    scale, shift = F.adaptive_max_pool2d(cues, 1).chunk(2, dim=1)
    return F.relu(scale * F.instance_norm(shallow) + shift)
