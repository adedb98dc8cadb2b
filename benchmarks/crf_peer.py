"""The dense CRF of pydensecrf2, for comparison: `pip install pydensecrf2` compiles it."""

import numpy as np
import torch
from torch import Tensor

FLOOR = 1e-5  # the logarithm of 0 is infinite


def pydensecrf(image: Tensor, scores: Tensor, num_iter: int = 10) -> Tensor:
    """Return the marginals [1, C, H, W] of one image [1, 3, H, W] in 0 to 255 and probabilities [1, C, H, W].

    The parameters are those of Krähenbühl and Koltun, and the defaults of `DenseCRF`.
    """
    from pydensecrf.densecrf import DenseCRF2D

    _, channels, height, width = scores.shape
    crf = DenseCRF2D(width, height, channels)
    crf.setUnaryEnergy(np.ascontiguousarray(-scores[0].clamp(min=FLOOR).log().reshape(channels, -1).numpy()))
    crf.addPairwiseGaussian(sxy=3, compat=3)
    pixels = np.ascontiguousarray(image[0].permute(1, 2, 0).round().byte().numpy())
    crf.addPairwiseBilateral(sxy=80, srgb=13, rgbim=pixels, compat=10)
    return torch.from_numpy(np.array(crf.inference(num_iter))).view(1, channels, height, width)
