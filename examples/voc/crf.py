"""Dense CRF (Krähenbühl & Koltun, NIPS 2011) on soft masks, with the parameters of the paper's authors."""

import torch
from torch import Tensor

from wsseg_layers import DenseCRF


@torch.no_grad()
def crf_marginals(image: Tensor, masks: Tensor, classes: Tensor) -> Tensor:
    """Refine class probabilities so that they agree for pixels that are close together and similar in colour.

    The CRF sees the masks of the given classes, divided by their sum. It runs on the CPU, whose time is linear in the
    number of pixels; exact sums on a GPU would take minutes for a large photograph.

    Args:
        image: [B, 3, H, W] in [0, 1].
        masks: [B, K, H, W], at least 0; they need not sum to 1.
        classes: bool [B, K], at least one per image.

    Returns:
        Marginals [B, K, H, W], on the device of the masks; 0 for the other classes.
    """
    kept = masks.float().cpu() * classes.cpu()[:, :, None, None]
    total = kept.sum(dim=1, keepdim=True)
    # Where all masks are 0 (the power of the background's mask may underflow), the classes are equally probable.
    probabilities = kept / total.where(total > 0, 1)
    return DenseCRF()(255 * image.float().cpu(), probabilities, classes.cpu()).to(masks)
