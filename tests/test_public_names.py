"""What users write against. A change here is a change of the library's version: additions minor, all else major."""

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import wsseg_layers
from wsseg_layers import functional, kernels

REQUIRED = inspect.Parameter.empty
DILATIONS = (1, 2, 4, 8, 12, 24)

LAYERS: dict[str, dict[str, Any]] = {
    "DenseCRF": {
        "num_iter": 10,
        "gaussian_sigma_xy": 3.0,
        "gaussian_weight": 3.0,
        "bilateral_sigma_xy": 80.0,
        "bilateral_sigma_rgb": 13.0,
        "bilateral_weight": 10.0,
        "inputs": "probabilities",
        "floor": 1e-5,
        "backend": "auto",
    },
    "DenseEnergyLoss": {
        "weight": 1e-7,
        "sigma_rgb": 15.0,
        "sigma_xy": 100.0,
        "scale_factor": 0.5,
        "backend": "auto",
        "ignore_index": 255,
    },
    "FocalSizePenalty": {"p": 3.0, "lam": 0.01},
    "GCI": {"in_channels": 256, "shallow_channels": None, "out_channels": None, "norm": "batch"},
    "PAMR": {
        "num_iter": 10,
        "dilations": DILATIONS,
        "variant": "pamr",
        "resize": "mask",
        "backend": "auto",
        "affinity_dtype": torch.float32,
    },
    "PAR": {
        "dilations": DILATIONS,
        "num_iter": 10,
        "renormalise": False,
        "resize": "mask",
        "backend": "auto",
        "w1": 0.3,
        "w2": 0.01,
        "guard": 1e-8,
        "affinity_dtype": torch.float32,
    },
    "PseudoLabels": {
        "refine": REQUIRED,
        "background": (0.7, 0.25),
        "softmax": True,
        "down_scale": 2,
        "crop": False,
        "align_corners": False,
        "ignore_index": 255,
        "max_classes": None,
    },
    "StochasticGate": {"mixing_rate": 0.3, "mode": "stochastic"},
    "nGWPPool": {"eps": 1.0},
}
PRESENT = {"classes": None, "absent": "zero"}
CALLS: dict[str, dict[str, Any]] = {
    "DenseCRF.forward": {"image": REQUIRED, "scores": REQUIRED},
    "DenseEnergyLoss.forward": dict.fromkeys(["images", "segmentations", "ROIs", "seg_label"], REQUIRED),
    "FocalSizePenalty.forward": {"masks": REQUIRED},
    "GCI.forward": {"shallow": REQUIRED, "deep": REQUIRED},
    "PAMR.forward": {"image": REQUIRED, "mask": REQUIRED, **PRESENT},
    "PAMR.affinity": {"image": REQUIRED},
    "PAMR.propagate": {"mask": REQUIRED, "affinity": REQUIRED, "counts": None},
    "PAR.forward": {"imgs": REQUIRED, "masks": REQUIRED, **PRESENT},
    "PAR.affinity": {"imgs": REQUIRED},
    "PAR.propagate": {"masks": REQUIRED, "affinity": REQUIRED, "counts": None},
    "PseudoLabels.forward": {**dict.fromkeys(["images", "cams", "labels"], REQUIRED), "boxes": None},
    "PseudoLabels.labels_and_maps": {**dict.fromkeys(["images", "cams", "labels"], REQUIRED), "boxes": None},
    "StochasticGate.forward": {"deep": REQUIRED, "shallow": REQUIRED},
    "nGWPPool.forward": {"scores": REQUIRED, "masks": REQUIRED},
}
FUNCTIONS: dict[str, dict[str, Any]] = {
    "cam_to_label": {
        "cams": REQUIRED,
        "labels": REQUIRED,
        "background": (0.7, 0.25),
        "boxes": None,
        "ignore_index": 255,
        "max_classes": None,
    },
    "dense_crf": {"image": REQUIRED, "scores": REQUIRED, **LAYERS["DenseCRF"]},
    "dense_energy_loss": {
        **dict.fromkeys(["images", "segmentations", "rois", "unlabelled", "sigma_rgb", "sigma_xy"], REQUIRED),
        "backend": "auto",
    },
    "focal_size_penalty": {"masks": REQUIRED, **LAYERS["FocalSizePenalty"]},
    "global_cue_injection": {"shallow": REQUIRED, "cues": REQUIRED, "eps": 1e-5},
    "merge_labels": {"high": REQUIRED, "low": REQUIRED, "ignore_index": 255},
    "multi_scale_cam": {"model": REQUIRED, "images": REQUIRED, "scales": (1.0, 0.5, 1.5), "flip": True},
    "ngwp_pool": {"scores": REQUIRED, "masks": REQUIRED, **LAYERS["nGWPPool"]},
    "normalise_cam": {"cams": REQUIRED, "eps": 1e-5},
    "pamr": {"image": REQUIRED, "mask": REQUIRED, **LAYERS["PAMR"], **PRESENT},
    "par": {"imgs": REQUIRED, "masks": REQUIRED, **LAYERS["PAR"], **PRESENT},
    "refine_pseudo_labels": {
        "images": REQUIRED,
        "cams": REQUIRED,
        "labels": REQUIRED,
        "refine": REQUIRED,
        "background": (0.7, 0.25),
        "softmax": True,
        "down_scale": 2,
        "boxes": None,
        "crop": False,
        "align_corners": False,
        "ignore_index": 255,
        "max_classes": None,
    },
    "stochastic_gate": {"deep": REQUIRED, "shallow": REQUIRED, "mixing_rate": 0.3, "training": True},
    "threshold_pseudo_labels": {
        "masks": REQUIRED,
        "labels": REQUIRED,
        "foreground": 0.6,
        "background": 0.7,
        "floor": 0.2,
        "discard": "classes",
        "ignore_index": 255,
        "max_classes": None,
    },
}
OPERATORS: dict[str, dict[str, Any]] = {
    "bilateral_filter": {
        "values": REQUIRED,
        "image": REQUIRED,
        "sigma_xy": REQUIRED,
        "sigma_rgb": 13.0,
        "normalise": False,
        "backend": "auto",
    },
    "pamr_affinity": {"image": REQUIRED, "dilations": REQUIRED, "variant": "pamr", "backend": "auto"},
    "pamr_propagate": {
        "mask": REQUIRED,
        "affinity": REQUIRED,
        "dilations": REQUIRED,
        "num_iter": REQUIRED,
        "backend": "auto",
        "counts": None,
    },
}
# Only in wsseg_layers.kernels.
KERNELS: dict[str, dict[str, Any]] = {
    "Variant": {
        "weight": 0.1,
        "sigma_power": 1,
        "power": 1,
        "guard": 1e-8,
        "with_centre": True,
        "position_weight": 0.0,
    },
    "available_backends": {"device": "cpu"},
}


def assert_accepts(function: Callable[..., Any], expected: dict[str, Any]) -> None:
    """Require the expected parameters, with their defaults and in their order; more may follow them."""
    parameters = inspect.signature(function).parameters
    assert [(name, p.default) for name, p in parameters.items()][: len(expected)] == list(expected.items())
    assert all(p.default is not REQUIRED for p in list(parameters.values())[len(expected) :])


def test_names() -> None:
    assert set(wsseg_layers.__all__) == {*LAYERS, "PowerBackground", "functional"}
    assert set(functional.__all__) == {*FUNCTIONS, *OPERATORS}
    assert set(kernels.__all__) == {*OPERATORS, *KERNELS, "VARIANTS", "BackendName", "BackendStatus", "VariantName"}
    assert set(kernels.VARIANTS) == {"pamr", "paper", "par"}
    assert isinstance(wsseg_layers.__version__, str)
    for module in (wsseg_layers, functional, kernels):
        for name in module.__all__:
            assert hasattr(module, name)


@pytest.mark.parametrize("name", LAYERS)
def test_layers(name: str) -> None:
    layer = getattr(wsseg_layers, name)
    assert issubclass(layer, nn.Module)
    assert_accepts(layer, LAYERS[name])


@pytest.mark.parametrize("name", CALLS)
def test_calls(name: str) -> None:
    layer, method = name.split(".")
    assert_accepts(getattr(getattr(wsseg_layers, layer), method), {"self": REQUIRED, **CALLS[name]})


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions(name: str) -> None:
    assert_accepts(getattr(functional, name), FUNCTIONS[name])


@pytest.mark.parametrize("name", [*OPERATORS, *KERNELS])
def test_operators(name: str) -> None:
    assert_accepts(getattr(kernels, name), {**OPERATORS, **KERNELS}[name])


@pytest.mark.parametrize("name", [*LAYERS, *FUNCTIONS])
def test_documented(name: str) -> None:
    public = getattr(wsseg_layers if name in LAYERS else functional, name)
    docstring = inspect.getdoc(public) or ""
    assert ">>>" in docstring
    for parameter in LAYERS.get(name) or FUNCTIONS[name]:
        assert f"{parameter}: " in docstring
