"""Dense CRF (Krähenbühl & Koltun, NIPS 2011) as the last step of inference, with pydensecrf2.

This file does not import PyTorch, so that worker processes, which import it, start faster.
"""

import multiprocessing
import signal
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor

import numpy as np
from numpy.typing import NDArray

# The values of the paper's authors.
ITERATIONS = 10
GAUSSIAN_SXY, GAUSSIAN_COMPAT = 3, 3
BILATERAL_SXY, BILATERAL_SRGB, BILATERAL_COMPAT = 80, 13, 10

FLOOR = 1e-5  # lower probabilities count as this one: the logarithm of 0 is infinite


def check_crf() -> None:
    """Raise a ValueError that says what to install if pydensecrf2 is missing."""
    try:
        import pydensecrf.densecrf  # noqa: F401
    except ImportError as error:
        raise ValueError(f"--crf needs pydensecrf2, this project's extra `crf`: {error}") from error


def dense_crf(image: NDArray[np.uint8], probabilities: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return class probabilities in which pixels that are close together and similar in colour agree.

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
    # A copy, because pydensecrf accepts only writable memory.
    crf.addPairwiseBilateral(
        sxy=BILATERAL_SXY, srgb=BILATERAL_SRGB, rgbim=np.array(image, order="C"), compat=BILATERAL_COMPAT
    )
    return np.asarray(crf.inference(ITERATIONS), dtype=np.float32).reshape(probabilities.shape)


def crf_segment(image: NDArray[np.uint8], masks: NDArray[np.float32], kept: Sequence[int]) -> NDArray[np.uint8]:
    """Choose for every pixel one of the kept classes, after the CRF.

    The CRF sees only the kept classes: their masks are first divided by their sum.

    Args:
        image: RGB [H, W, 3].
        masks: [K, H, W], one per kept class.
        kept: the K class indices of the masks; background (0) is one of them.

    Returns:
        Class indices [H, W].
    """
    if len(kept) == 1:
        return np.full(masks.shape[1:], kept[0], dtype=np.uint8)
    total = masks.sum(axis=0)
    # Where all masks are 0 (the power of the background's mask may underflow), every class has FLOOR.
    marginals = dense_crf(image, masks / np.where(total > 0, total, np.float32(1)))
    classes: NDArray[np.uint8] = np.array(kept, dtype=np.uint8)
    return classes[marginals.argmax(axis=0)]


def start_workers(count: int) -> ProcessPoolExecutor:
    """Return processes for `crf_segment`.

    They are spawned, because a fork of a process with PyTorch's threads may hang. They ignore Ctrl-C: their parent
    handles it.
    """
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(count, context, signal.signal, (signal.SIGINT, signal.SIG_IGN))
