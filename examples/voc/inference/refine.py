"""Refinement of soft masks at test time: by PAMR, by PAR, or by a dense CRF."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from wsseg_layers import PAMR, PAR

from .crf import crf_marginals, crf_segment, start_workers
from .pictures import Picture
from .segmenter import SoftMasks

Refinement = Literal["none", "pamr", "par", "crf"]

# Returns the class indices [H, W] of a picture after the refinement, None for no refinement.
Refine = Callable[[Picture, SoftMasks], NDArray[np.uint8] | None]

ITERATIONS = 20  # of PAMR and PAR; 10, the value in training, gives a lower IoU at test time


@torch.no_grad()
def refine_masks(image: Tensor, masks: Tensor, kept: Tensor, method: Refinement, num_iter: int = ITERATIONS) -> Tensor:
    """Align the masks of the background and of the kept classes with the edges of the image.

    Args:
        image: [3, H, W] in [0, 1].
        masks: [C + 1, H, W], background first, after the power of the background.
        kept: bool [C], the classes that are refined.
        method: "pamr", "par", "crf" (extra `crf`; on the CPU), or "none", which only removes the other classes.
        num_iter: iterations of PAMR and PAR.

    Returns:
        Masks [C + 1, H, W]; those of classes that are not kept are 0. The highest mask is the class of a pixel.
    """
    classes = torch.cat([kept.new_ones(1), kept])  # [C + 1]
    if method == "none":
        return masks * classes[:, None, None]
    if method == "crf":
        pixels = (255 * image).round().byte().permute(1, 2, 0).cpu().numpy()  # [H, W, 3]
        marginals = crf_marginals(np.ascontiguousarray(pixels), masks[classes].float().cpu().numpy())
        refined = torch.zeros_like(masks)
        refined[classes] = torch.from_numpy(marginals).to(masks)
        return refined
    layer = PAMR(num_iter) if method == "pamr" else PAR(num_iter=num_iter)
    return layer(image[None], masks[None], classes=classes[None])[0]


@contextmanager
def start_refinement(method: Refinement, workers: int) -> Iterator[Refine]:
    """Return a function that several threads may call; it computes the CRF in processes, which end with the block."""

    def by_none(_picture: Picture, _soft: SoftMasks) -> None:
        return None

    def by_layer(picture: Picture, soft: SoftMasks) -> NDArray[np.uint8]:
        image = picture.tensor().to(soft.masks.device)
        refined = refine_masks(image, soft.masks, soft.kept, method)
        return refined.argmax(dim=0).to(torch.uint8).cpu().numpy()

    def by_crf(picture: Picture, soft: SoftMasks) -> NDArray[np.uint8]:
        indices = [0, *(1 + soft.kept.nonzero().flatten()).tolist()]
        chosen = soft.masks[indices].cpu().numpy()
        return pool.submit(crf_segment, picture.pixels, chosen, indices).result()

    if method != "crf":
        yield by_none if method == "none" else by_layer
        return
    pool = start_workers(workers)
    try:
        yield by_crf
    finally:
        pool.shutdown(cancel_futures=True)
