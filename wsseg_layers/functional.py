"""The layers as functions, and the two operators that PAMR and PAR consist of."""

from .cams import multi_scale_cam, normalise_cam
from .gci import global_cue_injection
from .kernels import pamr_affinity, pamr_propagate
from .ngwp import ngwp_pool
from .pamr import pamr
from .par import par
from .pseudo_labels import cam_to_label, merge_labels, refine_pseudo_labels, threshold_pseudo_labels
from .size_penalty import focal_size_penalty
from .stochastic_gate import stochastic_gate

__all__ = [
    "cam_to_label",
    "focal_size_penalty",
    "global_cue_injection",
    "merge_labels",
    "multi_scale_cam",
    "ngwp_pool",
    "normalise_cam",
    "pamr",
    "pamr_affinity",
    "pamr_propagate",
    "par",
    "refine_pseudo_labels",
    "stochastic_gate",
    "threshold_pseudo_labels",
]
