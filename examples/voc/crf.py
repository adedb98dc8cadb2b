"""Dense CRF (Krähenbühl & Koltun, NIPS 2011) as a last step of inference, through pydensecrf2.

No PyTorch here: worker processes import this file, and start faster without it.
"""

import multiprocessing
import signal
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor

import numpy as np
from numpy.typing import NDArray

# What the paper's authors used.
ITERATIONS = 10
GAUSSIAN_SXY, GAUSSIAN_COMPAT = 3, 3
BILATERAL_SXY, BILATERAL_SRGB, BILATERAL_COMPAT = 80, 13, 10

FLOOR = 1e-5  # no class is impossible: less probable ones count as this


def check_crf() -> None:
    """Raise a ValueError that says what to install if pydensecrf2 is not there."""
    try:
        import pydensecrf.densecrf  # noqa: F401
    except ImportError as error:
        raise ValueError(f"--crf needs pydensecrf2, this project's extra `crf`: {error}") from error


def dense_crf(image: NDArray[np.uint8], probabilities: NDArray[np.float32]) -> NDArray[np.float32]:
    """Refine class probabilities so that pixels close to each other, and alike in colour, have the same class.

    Args:
        image: RGB [H, W, 3].
        probabilities: [K, H, W], at least two classes, sum 1 over them.

    Returns:
        The mean-field marginals [K, H, W] after `ITERATIONS` steps.
    """
    from pydensecrf.densecrf import DenseCRF2D

    num_classes, height, width = probabilities.shape
    unary = -np.log(probabilities.reshape(num_classes, -1).clip(FLOOR, 1))
    crf = DenseCRF2D(width, height, num_classes)
    crf.setUnaryEnergy(np.ascontiguousarray(unary, dtype=np.float32))
    crf.addPairwiseGaussian(sxy=GAUSSIAN_SXY, compat=GAUSSIAN_COMPAT)
    # A copy, for pydensecrf asks for memory that it could write to.
    crf.addPairwiseBilateral(
        sxy=BILATERAL_SXY, srgb=BILATERAL_SRGB, rgbim=np.array(image, order="C"), compat=BILATERAL_COMPAT
    )
    return np.asarray(crf.inference(ITERATIONS), dtype=np.float32).reshape(probabilities.shape)


def crf_segment(image: NDArray[np.uint8], masks: NDArray[np.float32], kept: Sequence[int]) -> NDArray[np.uint8]:
    """Choose a class for every pixel after the CRF, among the classes that are kept.

    The others are unknown to the CRF: the masks of those that are kept are brought to a sum of 1 first.

    Args:
        image: RGB [H, W, 3].
        masks: [K, H, W], of the kept classes.
        kept: their indices in the result, K of them, background (0) among them.

    Returns:
        Class indices [H, W].
    """
    if len(kept) == 1:
        return np.full(masks.shape[1:], kept[0], dtype=np.uint8)
    total = masks.sum(axis=0)
    # Where all masks are 0 (the background's may underflow in its power), nothing is known: FLOOR for every class.
    marginals = dense_crf(image, masks / np.where(total > 0, total, np.float32(1)))
    classes: NDArray[np.uint8] = np.array(kept, dtype=np.uint8)
    return classes[marginals.argmax(axis=0)]


def start_workers(count: int) -> ProcessPoolExecutor:
    """Return processes for `crf_segment`. They are spawned: a fork of a process that runs PyTorch's threads may hang.

    Ctrl-C reaches them too; it is left to their parent.
    """
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(count, context, signal.signal, (signal.SIGINT, signal.SIG_IGN))
