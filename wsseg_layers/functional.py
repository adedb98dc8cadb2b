"""All layers as functions, and the operators that they call."""

from .cams import multi_scale_cam, normalise_cam
from .dense_crf import dense_crf
from .dense_energy_loss import dense_energy_loss
from .gci import global_cue_injection
from .kernels import bilateral_filter, pamr_affinity, pamr_propagate
from .ngwp import ngwp_pool
from .pamr import pamr
from .par import par
from .pseudo_labels import cam_to_label, merge_labels, refine_pseudo_labels, threshold_pseudo_labels
from .size_penalty import focal_size_penalty
from .stochastic_gate import stochastic_gate

__all__ = [
    "bilateral_filter",
    "cam_to_label",
    "dense_crf",
    "dense_energy_loss",
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
