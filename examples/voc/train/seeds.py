"""Seeds of the random number generators."""

import random

import numpy as np
import torch


def mix_seed(*parts: int) -> int:
    """Return one seed that depends on all the parts."""
    return int(np.random.SeedSequence(parts).generate_state(1)[0])


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and PyTorch."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
