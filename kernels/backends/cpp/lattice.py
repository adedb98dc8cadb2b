"""Filters on the permutohedral lattice (lattice.cpp), for CPUs."""

import ctypes
import weakref
from collections.abc import Sequence

import torch
from torch import Tensor

from ...gaussians import Gaussian
from ..eager import filters as eager
from ..eager.filters import Filter
from . import library

# The widest row of values in lattice.cpp.
MAX_CHANNELS = 24
ERRORS = {
    1: (MemoryError, "not enough memory for the lattice of {}"),
    2: (ValueError, "{} spans too many sigmas for the lattice: its features exceed 2^20; use backend='eager'"),
    3: (ValueError, "{} has too many pixels for the lattice, which counts corners in 32 bits; use backend='eager'"),
}


class Lattices:
    """The lattices of a batch of images, or one lattice of the positions. Calling them filters values [B, C, H, W]."""

    def __init__(self, image: Tensor | None, size: tuple[int, int], gaussian: Gaussian, normalise: bool) -> None:
        compiled = library.load()
        assert compiled is not None  # `unavailable` has said so
        self.library = compiled
        pointer = ctypes.c_void_p()
        image = None if image is None else image.to(torch.float32).contiguous()
        batch = 1 if image is None else len(image)
        status = self.library.lattices_new(
            ctypes.byref(pointer),
            None if image is None else image.data_ptr(),
            batch,
            *size,
            gaussian.sigma_xy,
            gaussian.sigma_rgb,
            normalise,
            torch.get_num_threads(),
        )
        check_status(status, *(("an image of size", size) if image is None else ("an image of shape", image.shape)))
        self.pointer = pointer
        weakref.finalize(self, self.library.lattices_free, pointer)

    def __call__(self, values: Tensor, transposed: bool = False) -> Tensor:
        """Return the weighted sums of values [B, C, H, W], float32 or float64, or apply the transpose."""
        values = values.contiguous()
        out = torch.empty_like(values)
        is_double = values.dtype == torch.float64
        compute = self.library.lattices_filter_double if is_double else self.library.lattices_filter_float
        sizes = (*values.shape[:2], transposed, torch.get_num_threads())
        status = compute(self.pointer, values.data_ptr(), out.data_ptr(), *sizes)
        check_status(status, "maps of shape", values.shape)
        return out

    def count_vertices(self) -> int:
        """Return the number of vertices of all lattices."""
        return int(self.library.lattices_vertices(self.pointer))


def check_status(status: int, what: str, sizes: Sequence[int]) -> None:
    """Raise the error that a function of lattice.cpp reports: `what` has these sizes."""
    if status != 0:
        error, message = ERRORS[status]
        raise error(message.format(f"{what} {list(sizes)}"))


def make_filter(image: Tensor | None, like: Tensor, gaussian: Gaussian, normalise: bool) -> Filter:
    """Return the filter of a Gaussian for values [B, C, H, W] like `like`."""
    return Lattices(image, (like.shape[2], like.shape[3]), gaussian, normalise)


def mean_field(logits: Tensor, filters: Sequence[tuple[float, Filter]], num_iter: int) -> Tensor:
    """Return the marginals [B, C, H, W] after `num_iter` steps, in C++ if the number of channels allows it."""
    if not filters or logits.dtype != torch.float32 or logits.shape[1] > MAX_CHANNELS:
        return eager.mean_field(logits, filters, num_iter)
    strengths, lattices = zip(*filters, strict=True)
    logits = logits.contiguous()
    out = torch.empty_like(logits)
    count = len(filters)
    status = lattices[0].library.lattices_mean_field(
        (ctypes.c_void_p * count)(*(lattice.pointer for lattice in lattices)),
        (ctypes.c_double * count)(*strengths),
        count,
        logits.data_ptr(),
        out.data_ptr(),
        *logits.shape[:2],
        num_iter,
        torch.get_num_threads(),
    )
    check_status(status, "logits of shape", logits.shape)
    return out
