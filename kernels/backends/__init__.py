"""The backends: one folder each. The table lists them from the fastest to the one that runs everywhere.

A backend is a module or an object with the functions of `Backend`. To add one, add its folder and its line in
`BACKENDS`.
"""

import functools
import sys
import warnings
from collections.abc import Sequence
from types import ModuleType
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from ..gaussians import Gaussian
from ..variants import Variant
from . import cpp, eager, triton
from .eager import decomposition
from .eager.filters import Filter

BackendName = Literal["auto", "triton", "cpp", "eager"]


class Backend(Protocol):
    """The functions that every backend has. B, K, C, H, W and `num_iter` are at least 1."""

    def unavailable(self, device: torch.device) -> str | None:
        """Return why the backend does not run on a device, or None if it does."""

    def empty_affinity(self, image: Tensor, neighbours: int) -> Tensor:
        """Return uninitialised weights [B, N, H, W], float32, for an image [B, K, H, W], in the backend's layout."""

    def affinity(self, image: Tensor, dilations: Sequence[int], variant: Variant, out: Tensor) -> None:
        """Fill `out`, from `empty_affinity`, with the affinity of an image [B, K, H, W] (eq. 8)."""

    def propagate(
        self,
        mask: Tensor,
        affinity: Tensor,
        dilations: Sequence[int],
        num_iter: int,
        counts: Tensor | None = None,
    ) -> Tensor:
        """Return the masks [B, C, H, W] after `num_iter` iterations of eq. 7, contiguous, in the dtype of `mask`.

        With `counts` [B], only the first counts[b] channels of image b are propagated; the others are 0.
        """

    def propagate_transposed(
        self,
        grad: Tensor,
        affinity: Tensor,
        dilations: Sequence[int],
        num_iter: int,
        counts: Tensor | None = None,
    ) -> Tensor:
        """Return the transpose of `propagate`, applied to `grad` [B, C, H, W]: the gradient of the masks."""


class FilterBackend(Protocol):
    """Optional functions of a backend: Gaussian filters and the mean field of a dense CRF.

    For a backend without `make_filter`, those of the eager backend are used. `like` and `logits` are float32 or
    float64.
    """

    def make_filter(self, image: Tensor | None, like: Tensor, gaussian: Gaussian, normalise: bool) -> Filter:
        """Return the filter of a Gaussian for values [B, C, H, W] like `like`, used for any number of calls.

        `image` is [B, 3, H, W], or None for weights of position alone. With `normalise`, weights are divided by
        sqrt(n_i n_j), where n_i is the sum of the weights of pixel i.
        """

    def mean_field(self, logits: Tensor, filters: Sequence[tuple[float, Filter]], num_iter: int) -> Tensor:
        """Return the marginals [B, C, H, W] after `num_iter` steps; `filters` are pairs of a weight and a filter."""

    def mean_field_gradient(
        self, grad: Tensor, logits: Tensor, filters: Sequence[tuple[float, Filter]], num_iter: int
    ) -> Tensor:
        """Return the gradient of the logits, given that of the marginals."""


class LabelBackend(Protocol):
    """Optional functions of a backend: the steps around a refinement of pseudo labels."""

    def resize(self, maps: Tensor, size: Sequence[int]) -> Tensor:
        """Resize float32 maps [..., h, w] bilinearly, with `align_corners=False`."""

    def choose_labels(
        self, maps: Tensor, numbers: Tensor, counts: Tensor, num_scores: int, size: Sequence[int], ignore_index: int
    ) -> Tensor:
        """Return the labels [B, V, H, W] of the highest channels of float32 maps [B, 1 + M, V * S, h, w], resized.

        `numbers` [B, M] are the labels of the classes, `counts` [B] the number of classes of every image. With S = 2
        background scores, (high, low), a pixel that is background with the high one only gets `ignore_index`.
        """


# backend="auto" takes the first one that runs on the device.
BACKENDS: dict[str, Backend] = {"triton": triton, "cpp": cpp, "eager": eager}


class BackendStatus(NamedTuple):
    """One row of `available_backends`."""

    name: str
    usable: bool
    reason: str | None


def available_backends(device: torch.device | str = "cpu") -> list[BackendStatus]:
    """List the backends in the order in which `backend="auto"` tries them.

    Args:
        device: the device of the tensors.

    Returns:
        One row per backend: its name, whether it is usable on `device`, and the reason if it is not (else None).

    Example:
        >>> available_backends("cpu")[-1]
        BackendStatus(name='eager', usable=True, reason=None)
    """
    device = torch.device(device)
    reasons = {name: backend.unavailable(device) for name, backend in BACKENDS.items()}
    return [BackendStatus(name, reason is None, reason) for name, reason in reasons.items()]


def find_backend(name: str, device: torch.device) -> Backend:
    """Return the backend that `backend=name` means on a device.

    Raises:
        ValueError: the backend does not run on the device; the message says why.
    """
    if name != "auto":
        reason = BACKENDS[name].unavailable(device)
        if reason is not None:
            raise ValueError(f"backend={name!r} is not usable on device {str(device)!r}: {reason}")
        return BACKENDS[name]
    skipped: list[str] = []
    for candidate, backend in BACKENDS.items():
        reason = backend.unavailable(device)
        if reason is None:
            if candidate == "eager" and device.type in ("cpu", "cuda"):
                _warn_once(device.type, "; ".join(skipped))
            return backend
        skipped.append(f"{candidate!r} {reason}")
    raise ValueError(f"backend='auto' finds no backend for device {str(device)!r}: {'; '.join(skipped)}")


def find_filters(name: str, device: torch.device) -> FilterBackend:
    """Return the filters of the backend that `backend=name` means on a device, or those of the eager backend."""
    backend = find_backend(name, device)
    return backend if hasattr(backend, "make_filter") else eager  # type: ignore[return-value]


def find_label_backend(name: str, device: torch.device) -> LabelBackend | None:
    """Return the backend that `backend=name` means on a device, or None if it has no functions for labels."""
    backend = find_backend(name, device)
    return backend if hasattr(backend, "choose_labels") else None  # type: ignore[return-value]


def find_decomposition(name: str) -> ModuleType | None:
    """Return the functions that an exporter traces in place of the operators, or None if it uses the operators.

    ONNX has no registered operators, and gets plain PyTorch operations. `torch.export` gets them on demand.
    """
    # An export to ONNX has imported torch.onnx already. All other callers would wait for that import in the first call.
    to_onnx = "torch.onnx" in sys.modules and torch.onnx.is_in_onnx_export()
    if name == "auto" and to_onnx:
        return decomposition
    is_exporting = getattr(torch.compiler, "is_exporting", None)  # since PyTorch 2.7
    if name == "eager" and (to_onnx or (is_exporting is not None and is_exporting())):
        return decomposition
    return None


@functools.cache
def _warn_once(device_type: str, reasons: str) -> None:
    warnings.warn(
        f"PAMR, PAR and the dense CRF run in plain PyTorch on device type {device_type!r}, which is slower: {reasons}",
        stacklevel=2,
    )
