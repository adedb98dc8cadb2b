"""Stochastic gate: exchanges deep and shallow features at random in training, mixes them in evaluation.

Araslanov and Roth, "Single-Stage Semantic Segmentation from Image Labels", CVPR 2020, section 3.4.
https://arxiv.org/abs/2005.08104
"""

from typing import Literal, get_args

import torch
from torch import Tensor, nn

from ._checks import check_choice, check_flag, check_floating, check_real, check_same_device
from ._dtypes import common_dtype

Mode = Literal["stochastic", "deterministic"]
MODES = get_args(Mode)


def stochastic_gate(deep: Tensor, shallow: Tensor, mixing_rate: float = 0.3, training: bool = True) -> Tensor:
    r"""Mix deep and shallow features, at random (eq. 9) or as a weighted sum (eq. 10).

    In training, with :math:`r \sim \mathrm{Bern}(\psi)` drawn per element,

    .. math:: x = (1 - r) \, \frac{x^{(d)} - \psi x^{(s)}}{1 - \psi} + r \, x^{(s)},

    whose mean over draws is :math:`x^{(d)}`; otherwise :math:`x = (1 - \psi) x^{(d)} + \psi x^{(s)}`. Random numbers
    come from the default generator of the device, so `torch.manual_seed` and activation checkpointing repeat them. They
    do not depend on the memory layout of the inputs.

    Args:
        deep: deep features, any shape.
        shallow: shallow features of the same shape.
        mixing_rate: psi, the share of shallow features, in [0, 1); in evaluation in [0, 1]. 0 returns `deep`.
        training: eq. 9 if True, eq. 10 if False.

    Returns:
        Mixed features of the inputs' shape and common dtype.

    Raises:
        TypeError: `deep` or `shallow` is no floating-point tensor.
        ValueError: their shapes or devices differ, or `mixing_rate` is out of range.

    Source:
        Araslanov and Roth, CVPR 2020, eq. 9 and 10.

    Example:
        >>> import torch
        >>> deep, shallow = torch.ones(1, 2, 3, 3), torch.zeros(1, 2, 3, 3)
        >>> stochastic_gate(deep, shallow, mixing_rate=0.25, training=False).unique()
        tensor([0.7500])
        >>> mixed = stochastic_gate(deep, shallow, mixing_rate=0.5)  # zeros (r = 1) and twos (r = 0)
    """
    check_flag("training", training)
    _check_mixing_rate(mixing_rate, training)
    check_floating("deep", deep)
    check_floating("shallow", shallow)
    if deep.shape != shallow.shape:
        raise ValueError(f"shallow must have the shape of deep {list(deep.shape)}, got {list(shallow.shape)}")
    check_same_device(("deep", deep), ("shallow", shallow))

    mixing_rate = float(mixing_rate)
    dtype = common_dtype(deep, shallow)
    if mixing_rate == 0:
        return deep.to(dtype)
    if not training:
        return (1 - mixing_rate) * deep + mixing_rate * shallow  # eq. 10
    # Drawn in float32: half precision has too few values below psi for an exact rate.
    kept = torch.rand(deep.shape, device=deep.device, dtype=torch.float32).ge_(mixing_rate).to(dtype)  # 1 - r
    # x_s + (1 - r) (x_d - x_s) / (1 - psi)
    return torch.addcmul(shallow.to(dtype), kept, deep - shallow, value=1 / (1 - mixing_rate))  # eq. 9, rearranged


class StochasticGate(nn.Module):
    """Stochastic gate: the module of `stochastic_gate` (eq. 9 in training, eq. 10 in evaluation).

    The module has no state.

    Args:
        mixing_rate: psi in [0, 1), the share of shallow features; 0.3 and 0.5 in the paper.
        mode: "stochastic", or "deterministic" for the ablation of Table 1c, which uses eq. 10 in training too. (The
            paper describes it as r = psi in eq. 9. That would cancel the shallow features and return `deep`, but the
            text calls it a sum of both.)

    Example:
        >>> import torch
        >>> gate = StochasticGate(mixing_rate=0.3)
        >>> deep, shallow = torch.randn(2, 256, 41, 41), torch.randn(2, 256, 41, 41)
        >>> gate(deep, shallow).shape
        torch.Size([2, 256, 41, 41])
        >>> torch.equal(gate.eval()(deep, shallow), 0.7 * deep + 0.3 * shallow)
        True
    """

    def __init__(self, mixing_rate: float = 0.3, mode: Mode = "stochastic") -> None:
        super().__init__()
        check_choice("mode", mode, MODES)
        _check_mixing_rate(mixing_rate, training=mode == "stochastic")
        self.mixing_rate = mixing_rate
        self.mode = mode

    def forward(self, deep: Tensor, shallow: Tensor) -> Tensor:
        """Return the mix of deep and shallow features, which have the same shape."""
        check_choice("mode", self.mode, MODES)
        return stochastic_gate(deep, shallow, self.mixing_rate, self.training and self.mode == "stochastic")

    def extra_repr(self) -> str:
        """Return the arguments for `print(module)`."""
        return f"mixing_rate={self.mixing_rate}, mode={self.mode!r}"


def _check_mixing_rate(mixing_rate: float, training: bool) -> None:
    check_real("mixing_rate", mixing_rate)
    if training and not 0 <= mixing_rate < 1:
        raise ValueError(f"mixing_rate must be in [0, 1), got {mixing_rate}")
    if not 0 <= mixing_rate <= 1:
        raise ValueError(f"mixing_rate must be in [0, 1], got {mixing_rate}")
