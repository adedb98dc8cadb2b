"""The small layers, forward and backward, beside their formulas written down in PyTorch."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from benchmarks import published
from benchmarks.measure import Bench, forward_backward
from wsseg_layers.functional import focal_size_penalty, global_cue_injection, ngwp_pool, stochastic_gate

Layer = Callable[..., Tensor]

# (ours, the formula, channels of its inputs, whether its result is random)
LAYERS: dict[str, tuple[Layer, Layer, tuple[int, ...], bool]] = {
    "nGWP": (ngwp_pool, published.ngwp, (20, 20), False),
    "focal size penalty": (focal_size_penalty, published.size_penalty, (20,), False),
    "stochastic gate": (stochastic_gate, published.stochastic_gate, (256, 256), True),
    "GCI": (global_cue_injection, published.gci, (256, 512), False),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layer(bench: Bench, name: str) -> None:
    ours, formula, channels, is_random = LAYERS[name]
    batch, side = bench.size(smoke=(2, 5), quick=(2, 41), full=(16, 81))
    torch.manual_seed(0)
    inputs = [torch.rand(batch, count, side, side, device=bench.device) for count in channels]
    compiled = bench.compiled({"ours, compiled": ours, "formula, compiled": formula})
    competitors = {"ours": ours, "formula": formula, **compiled}
    bench.compare(
        f"{name}, forward and backward",
        "x".join(map(str, inputs[0].shape)),
        {key: forward_backward(function, *inputs) for key, function in competitors.items()},
        tolerance=None if is_random else 1e-3,
    )
