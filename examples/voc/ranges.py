"""The ranges of the settings that are numbers."""

import sys
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
    "penalty_lambda": 0,
    "penalty_power": 0,
    "pamr_iterations": 0,
    "pamr_dilations": 1,
    "scales": 0.1,
    "min_probability": 0,
    "background_power": 0,
    "curve_images": 1,
    "workers": 0,
    "seed": 0,
}
MAXIMA = {"seed": 2**32 - 1, "min_probability": 1}


def check_ranges(settings: Mapping[str, Any]) -> None:
    """Raise a ValueError if a setting, or a number in a tuple, is out of its range.

    None is allowed, an empty tuple is not.
    """
    for name, minimum in MINIMA.items():
        option, values = f"--{name.replace('_', '-')}", settings[name]
        if values == ():
            raise ValueError(f"{option} needs at least one value")
        for value in values if isinstance(values, tuple) else (values,):
            if value is None:
                continue
            if not value >= minimum:
                raise ValueError(f"{option} must be at least {minimum}, got {value}")
            if not value <= MAXIMA.get(name, sys.float_info.max):
                limit = f"at most {MAXIMA[name]}" if name in MAXIMA else "finite"
                raise ValueError(f"{option} must be {limit}, got {value}")
    for name in ("mixing_rate", "ema_decay"):
        if not 0 <= settings[name] < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be in [0, 1), got {settings[name]}")
    if not settings["penalty_lambda"] > 0:
        hint = "--no-size-penalty trains without the penalty"
        raise ValueError(f"--penalty-lambda must be greater than 0, got {settings['penalty_lambda']}; {hint}")
