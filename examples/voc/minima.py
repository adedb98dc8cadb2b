"""The lowest values of the settings that are numbers."""

from collections.abc import Mapping
from typing import Any

MINIMA = {
    "channels": 1,
    "epochs": 1,
    "classification_epochs": 0,
    "batch_size": 1,
    "crop_size": 32,
    "classification_crop_size": 32,
    "aspp_dilations": 1,
    "lr": 0,
    "baseline_lr": 0,
    "lr_decay": 0,
    "ema_decay": 0,
    "weight_decay": 0,
    "energy_loss": 0,
    "accumulate": 1,
    "penalty_power": 0,
    "pamr_iterations": 0,
    "pamr_dilations": 1,
    "scales": 0.1,
    "min_probability": 0,
    "background_power": 0,
    "curve_images": 1,
    "workers": 0,
}


def check_minima(settings: Mapping[str, Any]) -> None:
    """Raise a ValueError if a setting, or a number in a tuple, is lower than its minimum. None passes."""
    for name, minimum in MINIMA.items():
        values = settings[name]
        for value in values if isinstance(values, tuple) else (values,):
            if value is not None and not value >= minimum:
                raise ValueError(f"--{name.replace('_', '-')} must be at least {minimum}, got {value}")
