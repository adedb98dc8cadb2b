"""PAMR and PAR beside the published formulation, and beside the forms that `torch.compile` makes faster."""

import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks import published
from benchmarks.alternatives import interleaved_pamr
from benchmarks.measure import Bench, forward_backward
from wsseg_layers.functional import pamr, par
from wsseg_layers.kernels import BackendName, pamr_affinity, pamr_propagate
from wsseg_layers.kernels.backends.cpp import library

DILATIONS = (1, 2, 4, 8, 12, 24)
NUM_ITER = 10

NEIGHBOURS = 8 * len(DILATIONS)
Shape = tuple[int, int, int, int]

# A training batch, a training crop, and the classes in the label of one image at two sizes.
FULL: dict[str, Shape] = {
    "training": (16, 21, 81, 81),
    "crop": (1, 21, 321, 321),
    "two classes": (1, 2, 224, 224),
    "three classes": (1, 3, 321, 321),
}
QUICK: dict[str, Shape] = {
    "training": (2, 21, 81, 81),
    "crop": (1, 21, 96, 96),
    "two classes": (1, 2, 64, 64),
    "three classes": (1, 3, 96, 96),
}
SMOKE: dict[str, Shape] = {
    "training": (2, 5, 9, 7),
    "crop": (1, 4, 20, 30),
    "two classes": (1, 2, 8, 8),
    "three classes": (1, 3, 9, 8),
}
# The stacks of all iterations are kept for the backward pass: a training batch of the published form would need 8 GB.
BACKWARD: dict[str, Shape] = {"training": (2, 21, 81, 81), "two classes": (1, 2, 224, 224)}


def inputs(shape: Shape, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return an image and a mask."""
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(shape[0], 3, *shape[2:], generator=generator)
    mask = torch.rand(shape, generator=generator).softmax(dim=1)
    return image.to(device), mask.to(device)


def name_of(shape: Shape) -> str:
    """Return the name of a size."""
    return "x".join(map(str, shape))


@torch.no_grad()
@pytest.mark.parametrize("case", FULL)
@pytest.mark.parametrize("layer", ["PAMR", "PAR"])
def test_refinement(bench: Bench, layer: str, case: str) -> None:
    shape = bench.size(smoke=SMOKE[case], quick=QUICK[case], full=FULL[case])
    image, mask = inputs(shape, bench.device)
    ours, peer = (pamr, published.pamr) if layer == "PAMR" else (par, published.par)
    competitors = {
        "ours": lambda: ours(image, mask, num_iter=NUM_ITER, dilations=DILATIONS),
        "ours, backend='eager'": lambda: ours(image, mask, num_iter=NUM_ITER, dilations=DILATIONS, backend="eager"),
        "published": lambda: peer(image, mask, DILATIONS, NUM_ITER),
    }
    if layer == "PAMR":
        # Compiling all ten iterations takes minutes: the slower forms are compiled for one size.
        forms = {"published, compiled": published.pamr, "shifted views, compiled": published.shifted_pamr}
        compiled = bench.compiled(forms if case == "crop" else {})
        if bench.compiles and bench.device.type == "cpu":
            compiled["interleaved rows, compiled"] = interleaved_pamr  # compiles one iteration by itself
        competitors |= {
            name: partial(function, image, mask, DILATIONS, NUM_ITER) for name, function in compiled.items()
        }
    # The exponents of PAR reach thousands; the published form computes them to two or three digits in float32.
    tolerance = 1e-4 if layer == "PAMR" else 2e-2
    bench.compare(layer, name_of(shape), competitors, tolerance, bench.bound(shape, NEIGHBOURS, NUM_ITER))


@pytest.mark.parametrize("case", BACKWARD)
def test_gradient_to_the_masks(bench: Bench, case: str) -> None:
    shape = bench.size(smoke=SMOKE[case], quick=QUICK[case], full=BACKWARD[case])
    image, mask = inputs(shape, bench.device)

    def ours(mask: Tensor, backend: BackendName = "auto") -> Tensor:
        return pamr(image, mask, NUM_ITER, DILATIONS, backend=backend)

    def peer(mask: Tensor) -> Tensor:
        return published.pamr(image, mask, DILATIONS, NUM_ITER)

    competitors: dict[str, Callable[[Tensor], Tensor]] = {
        "ours": ours,
        "ours, backend='eager'": partial(ours, backend="eager"),
        "published": peer,
    }
    bench.compare(
        "PAMR, forward and backward",
        name_of(shape),
        {name: forward_backward(function, mask) for name, function in competitors.items()},
    )


@torch.no_grad()
@pytest.mark.parametrize("case", ["training", "crop"])
def test_threads(bench: Bench, case: str) -> None:
    if bench.device.type != "cpu":
        pytest.skip("threads of the CPU")
    shape = bench.size(smoke=SMOKE[case], quick=QUICK[case], full=FULL[case])
    image, mask = inputs(shape, bench.device)
    before = torch.get_num_threads()

    def on(threads: int) -> Tensor:
        torch.set_num_threads(threads)
        try:
            return pamr(image, mask, NUM_ITER, DILATIONS)
        finally:
            torch.set_num_threads(before)

    counts = sorted({1, 2, before} if before > 1 else {1})
    competitors = {f"ours, {count} threads": partial(on, count) for count in counts}
    bench.compare("PAMR over threads", name_of(shape), competitors, tolerance=0)


@torch.no_grad()
@pytest.mark.parametrize("batch", [1, 16])
def test_fixed_cost(bench: Bench, batch: int) -> None:
    shape = (batch, 2, 8, 8)
    image, mask = inputs(shape, bench.device)
    affinity = pamr_affinity(image, DILATIONS)
    competitors = {
        "ours": partial(pamr, image, mask, NUM_ITER, DILATIONS),
        "published": partial(published.pamr, image, mask, DILATIONS, NUM_ITER),
    }
    parts = {
        "ours, affinity alone": partial(pamr_affinity, image, DILATIONS),
        "ours, propagation alone": partial(pamr_propagate, mask, affinity, DILATIONS, NUM_ITER),
    }
    bench.compare("PAMR, fixed cost", name_of(shape), {**competitors, **parts}, unchecked=parts)


@torch.no_grad()
@pytest.mark.parametrize("axis", ["side", "classes", "dilations", "iterations"])
def test_cost_over_size(bench: Bench, axis: str) -> None:
    side = bench.size(smoke=12, quick=64, full=128)
    base = {"side": side, "classes": 21, "dilations": 6, "iterations": 10}
    steps = {
        "side": bench.size(smoke=(8,), quick=(32, 64), full=(32, 64, 128, 256, 512)),
        "classes": bench.size(smoke=(3,), quick=(2, 21), full=(1, 2, 5, 21, 60, 150)),
        "dilations": bench.size(smoke=(1,), quick=(1, 6), full=(1, 2, 3, 6)),
        "iterations": bench.size(smoke=(2,), quick=(1, 10), full=(1, 2, 5, 10, 20)),
    }
    for step in steps[axis]:
        values = {**base, axis: step}
        image, mask = inputs((1, values["classes"], values["side"], values["side"]), bench.device)
        dilations = DILATIONS[: values["dilations"]]
        settings = {"num_iter": values["iterations"], "dilations": dilations}
        competitors = {"ours": partial(pamr, image, mask, **settings)}
        if mask.numel() * len(dilations) * values["iterations"] <= 2.1e7:  # it takes some seconds otherwise
            competitors["published"] = partial(published.pamr, image, mask, **settings)
        numbers = {name: float(value) for name, value in values.items()}
        bench.compare(f"PAMR over {axis}", f"{axis} = {step}", competitors, values=numbers)


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak memory as Linux reports it")
def test_peak_memory(bench: Bench) -> None:
    if bench.keeps_memory:
        pytest.skip("measured with the default allocator")
    shape = bench.size(smoke=(1, 150, 64, 96), quick=(1, 150, 128, 128), full=(1, 150, 512, 683))
    ours = peak_memory(f"pamr(image, mask, 1, {DILATIONS})", shape)
    # The stack of the published form with 150 channels is larger than most memories: 10 channels are measured.
    peer = 15 * peak_memory(f"published.pamr(image, mask, {DILATIONS}, 1)", (1, 10, *shape[2:]))
    size = "x".join(map(str, shape))
    bench.note(
        f"Peak memory of one iteration of PAMR at {size}, in a process of its own: ours {ours:.0f} MiB,"
        f" published {peer:.0f} MiB (15 times that of 10 classes), {peer / ours:.0f} times as much."
    )
    assert ours < peer / (20 if bench.mode == "full" else 2)


def peak_memory(statement: str, shape: tuple[int, ...]) -> float:
    """Return by how many MiB `statement` raises the peak memory of a fresh process over that of its inputs."""
    code = f"""
import sys, torch
sys.path.insert(0, {str(Path(__file__).parents[1])!r})
from benchmarks import published
from benchmarks.measure import resident_memory
from wsseg_layers.functional import pamr

image, mask = torch.rand({shape[0]}, 3, *{shape[2:]}), torch.rand({shape})
print(resident_memory(lambda: {statement}))
"""
    return float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(library.load() is None, reason="no C++ compiler")
def test_first_use(bench: Bench, tmp_path: Path) -> None:
    if bench.keeps_memory:
        pytest.skip("measured with the default allocator")
    code = """
import time
from wsseg_layers.kernels.backends.cpp import library

started = time.perf_counter()
library.load()
print(time.perf_counter() - started)
"""
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    compiling, loading = (
        float(subprocess.check_output([sys.executable, "-c", code], env=environment, text=True)) for _ in range(2)
    )
    bench.note(
        f"First use of PAMR and PAR on a CPU: {compiling:.2f} s to compile the C++;"
        f" {1e3 * loading:.1f} ms to load it in every later process."
    )
    assert len(list((tmp_path / "wsseg_layers").iterdir())) == 1
