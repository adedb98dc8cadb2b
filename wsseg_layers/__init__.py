"""Layers of weakly supervised semantic segmentation.

The layers of Araslanov and Roth, "Single-Stage Semantic Segmentation from Image Labels", CVPR 2020; PAR, the mask
refinement of Ru et al., CVPR 2022, which uses the propagation of PAMR with another affinity; and the dense CRF of
Krähenbühl and Koltun, NIPS 2011, with the dense energy loss of Tang et al., ECCV 2018.
"""

from . import functional
from .dense_crf import DenseCRF
from .dense_energy_loss import DenseEnergyLoss
from .gci import GCI
from .ngwp import nGWPPool
from .pamr import PAMR
from .par import PAR
from .size_penalty import FocalSizePenalty
from .stochastic_gate import StochasticGate

__version__ = "0.1.0"

__all__ = [
    "GCI",
    "PAMR",
    "PAR",
    "DenseCRF",
    "DenseEnergyLoss",
    "FocalSizePenalty",
    "StochasticGate",
    "functional",
    "nGWPPool",
]
