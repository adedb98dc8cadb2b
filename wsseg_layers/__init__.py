"""Layers of weakly supervised semantic segmentation.

The layers of Araslanov and Roth, "Single-Stage Semantic Segmentation from Image Labels", CVPR 2020; PAR, the mask
refinement of Ru et al., CVPR 2022, which uses the propagation of PAMR with another affinity; and the dense CRF of
Krähenbühl and Koltun, NIPS 2011, with the dense energy loss of Tang et al., ECCV 2018.
"""

from pathlib import Path

if not Path(__file__).with_name("kernels").is_dir():
    # Sources without symlinks (git on Windows, an unpacked source distribution): the folder lies beside the package.
    __path__.append(str(Path(__file__).parents[1]))

from . import functional
from .dense_crf import DenseCRF
from .dense_energy_loss import DenseEnergyLoss
from .gci import GCI
from .ngwp import nGWPPool
from .pamr import PAMR
from .par import PAR
from .pseudo_labels import PowerBackground, PseudoLabels
from .size_penalty import FocalSizePenalty
from .stochastic_gate import StochasticGate

__version__ = "0.2.0"

__all__ = [
    "GCI",
    "PAMR",
    "PAR",
    "DenseCRF",
    "DenseEnergyLoss",
    "FocalSizePenalty",
    "PowerBackground",
    "PseudoLabels",
    "StochasticGate",
    "functional",
    "nGWPPool",
]
