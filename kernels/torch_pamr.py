"""Affinity and propagation in plain PyTorch, for every device. No [B, C, N, H, W] tensor is ever built."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor


def offsets(dilations: tuple[int, ...]) -> list[tuple[int, int]]:
    """Return the neighbours' offsets (dy, dx): dilations in order, row-major, without the centre."""
    return [(dy, dx) for d in dilations for dy in (-d, 0, d) for dx in (-d, 0, d) if (dy, dx) != (0, 0)]


def shifted_views(x: Tensor, dilations: tuple[int, ...]) -> Iterator[Tensor]:
    """Yield one view of the padded map for every neighbour."""
    height, width = x.shape[2:]
    p = max(dilations)
    padded = F.pad(x, (p, p, p, p), mode="replicate")
    for dy, dx in offsets(dilations):
        yield padded[:, :, p + dy : p + dy + height, p + dx : p + dx + width]


def affinity(image: Tensor, dilations: tuple[int, ...], variant: str) -> Tensor:
    """Return the affinity [B, N, H, W], float32."""
    image = image.float()
    batch, channels, height, width = image.shape
    total, squares = torch.zeros_like(image), torch.zeros_like(image)
    for neighbour in shifted_views(image, dilations):
        # Moments of the difference to the centre: exact where the image is flat, however large its offset.
        difference = neighbour - image
        total += difference
        squares.addcmul_(difference, difference)
    count = (8 if variant == "par" else 9) * len(dilations)
    variance = ((squares - total * total / count) / (count - 1)).clamp_(min=0)
    if variant == "pamr":
        scale = -1 / (1e-8 + 0.1 * variance.sqrt())
    elif variant == "paper":
        scale = -1 / (1e-8 + variance)
    else:
        scale = 1 / (variance.sqrt() + 1e-8) / 0.3
    logits = image.new_empty(batch, 8 * len(dilations), height, width)
    for n, neighbour in enumerate(shifted_views(image, dilations)):
        scaled = (neighbour - image).abs_().mul_(scale)
        if variant == "par":
            scaled = -scaled * scaled
        torch.mean(scaled, dim=1, out=logits[:, n])
    weights = logits.softmax(dim=1)
    if variant == "par":
        position = torch.tensor([(dy * dy + dx * dx) ** 0.5 for dy, dx in offsets(dilations)], dtype=torch.float64)
        term = (-((position / (position.std() + 1e-8) / 0.3) ** 2)).softmax(dim=0)
        weights += 0.01 * term.to(weights)[:, None, None]
    return weights


def propagate(mask: Tensor, affinity: Tensor, dilations: tuple[int, ...], num_iter: int) -> Tensor:
    """Return the mask after `num_iter` weighted means over the neighbours."""
    dtype = torch.promote_types(mask.dtype, torch.float32)
    current, weights = mask.to(dtype), affinity.to(dtype)
    for _ in range(num_iter):
        result = torch.zeros_like(current)
        for n, neighbour in enumerate(shifted_views(current, dilations)):
            result = result.addcmul(weights[:, n : n + 1], neighbour)
        current = result
    return current.to(mask.dtype)
