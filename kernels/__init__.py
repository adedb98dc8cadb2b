"""The dilated affinity and its propagation: the two operators that PAMR and PAR consist of."""

from .backends import BackendName, available_backends
from .operators import pamr_affinity, pamr_propagate
from .variants import VARIANTS, Variant, VariantName

__all__ = [
    "VARIANTS",
    "BackendName",
    "Variant",
    "VariantName",
    "available_backends",
    "pamr_affinity",
    "pamr_propagate",
]
