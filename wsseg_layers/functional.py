"""The layers as functions, and the two operators that PAMR and PAR consist of."""

from .gci import global_cue_injection
from .kernels import pamr_affinity, pamr_propagate
from .ngwp import ngwp_pool
from .pamr import pamr
from .par import par
from .size_penalty import focal_size_penalty
from .stochastic_gate import stochastic_gate

__all__ = [
    "focal_size_penalty",
    "global_cue_injection",
    "ngwp_pool",
    "pamr",
    "pamr_affinity",
    "pamr_propagate",
    "par",
    "stochastic_gate",
]
