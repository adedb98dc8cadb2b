"""The operators: the dilated affinity and its propagation for PAMR and PAR, Gaussian filters for the dense CRF."""

from .backends import BackendName, BackendStatus, available_backends
from .filters import bilateral_filter
from .operators import pamr_affinity, pamr_propagate
from .variants import VARIANTS, Variant, VariantName

__all__ = [
    "VARIANTS",
    "BackendName",
    "BackendStatus",
    "Variant",
    "VariantName",
    "available_backends",
    "bilateral_filter",
    "pamr_affinity",
    "pamr_propagate",
]
