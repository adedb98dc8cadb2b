"""The layers as functions, and the operators that they consist of."""

from .dense_crf import dense_crf
from .dense_energy_loss import dense_energy_loss
from .gci import global_cue_injection
from .kernels import bilateral_filter, pamr_affinity, pamr_propagate
from .ngwp import ngwp_pool
from .pamr import pamr
from .par import par
from .size_penalty import focal_size_penalty
from .stochastic_gate import stochastic_gate

__all__ = [
    "bilateral_filter",
    "dense_crf",
    "dense_energy_loss",
    "focal_size_penalty",
    "global_cue_injection",
    "ngwp_pool",
    "pamr",
    "pamr_affinity",
    "pamr_propagate",
    "par",
    "stochastic_gate",
]
