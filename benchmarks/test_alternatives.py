"""Propagation on a CPU: the backends of the library, and the other ways that were tried."""

from functools import partial

import pytest
import torch

from benchmarks.alternatives import interleaved_rows, shifted_views, sparse_matrix
from benchmarks.measure import Bench
from wsseg_layers.kernels import pamr_affinity, pamr_propagate

DILATIONS = (1, 2, 4, 8, 12, 24)


@pytest.mark.skipif(torch.cuda.is_available(), reason="alternatives for a CPU")
@torch.no_grad()
@pytest.mark.parametrize("classes", [2, 21])
def test_propagation(bench: Bench, classes: int) -> None:
    side, num_iter = bench.size(smoke=(9, 2), quick=(64, 10), full=(321, 10))
    torch.manual_seed(0)
    mask = torch.rand(1, classes, side, side).softmax(dim=1)
    image = torch.rand(1, 3, side, side)
    # Each backend reads the weights in the memory layout of its own affinity.
    affinity, eager = (pamr_affinity(image, DILATIONS, backend=backend) for backend in ("auto", "eager"))
    ways = {"shifted views": shifted_views, "sparse matrix": sparse_matrix}
    if bench.compiles:
        ways["interleaved rows, compiled"] = interleaved_rows
    competitors = {
        "ours": partial(pamr_propagate, mask, affinity, DILATIONS, num_iter),
        "ours, backend='eager'": partial(pamr_propagate, mask, eager, DILATIONS, num_iter, backend="eager"),
        **{name: partial(way, mask, eager, DILATIONS, num_iter) for name, way in ways.items()},
    }
    bound = bench.bound(mask.shape, 8 * len(DILATIONS), num_iter)
    bench.compare("PAMR, propagation alone", "x".join(map(str, mask.shape)), competitors, bound=bound)
