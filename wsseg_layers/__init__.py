"""Layers of weakly supervised semantic segmentation.

The layers of Araslanov and Roth, "Single-Stage Semantic Segmentation from Image Labels", CVPR 2020, and PAR, the
refinement of Ru et al., CVPR 2022, that follows from them.
"""

from . import functional
from .gci import GCI
from .ngwp import nGWPPool
from .pamr import PAMR
from .par import PAR
from .size_penalty import FocalSizePenalty
from .stochastic_gate import StochasticGate

__version__ = "0.2.0"

__all__ = ["GCI", "PAMR", "PAR", "FocalSizePenalty", "StochasticGate", "functional", "nGWPPool"]
