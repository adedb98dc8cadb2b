"""PAMR and PAR beside the published formulation, and beside the best that `torch.compile` makes of it."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks import published
from benchmarks.measure import Bench
from wsseg_layers.functional import pamr, par
from wsseg_layers.kernels.backends.cpp import library

DILATIONS = (1, 2, 4, 8, 12, 24)
NUM_ITER = 10

# What the shapes stand for: a training batch, a training crop, a crop with a foreground and a background.
FULL = {"training": (16, 21, 81, 81), "crop": (1, 21, 321, 321), "two classes": (1, 2, 321, 321)}
QUICK = {"training": (2, 21, 81, 81), "crop": (1, 21, 96, 96), "two classes": (1, 2, 96, 96)}
SMOKE = {"training": (2, 5, 9, 7), "crop": (1, 4, 20, 30), "two classes": (1, 2, 8, 8)}


def inputs(shape: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return an image and a mask."""
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(shape[0], 3, *shape[2:], generator=generator)
    mask = torch.rand(shape, generator=generator).softmax(dim=1)
    return image.to(device), mask.to(device)


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
        compiled = bench.compiled(
            {"published, compiled": published.pamr, "shifted views, compiled": published.shifted_pamr}
        )
        competitors |= {
            name: partial(function, image, mask, DILATIONS, NUM_ITER) for name, function in compiled.items()
        }
    # PAR's exponents reach thousands, of which float32 leaves two or three digits in the published form.
    bench.compare(layer, "x".join(map(str, shape)), competitors, tolerance=1e-4 if layer == "PAMR" else 2e-2)


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
        if mask.numel() * len(dilations) * values["iterations"] <= 2.1e7:  # a second or two
            competitors["published"] = partial(published.pamr, image, mask, **settings)
        bench.compare(f"PAMR over {axis}", f"{axis} = {step}", competitors, **{axis: float(step)})


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak memory as Linux reports it")
def test_peak_memory(bench: Bench) -> None:
    shape = bench.size(smoke=(1, 150, 64, 96), quick=(1, 150, 128, 128), full=(1, 150, 512, 683))
    ours = peak_memory(f"pamr(image, mask, 1, {DILATIONS})", shape)
    # The published formulation's stack of 150 channels is larger than most memories: 10 channels are measured.
    peer = 15 * peak_memory(f"published.pamr(image, mask, {DILATIONS}, 1)", (1, 10, *shape[2:]))
    size = "x".join(map(str, shape))
    bench.note(
        f"Peak memory of PAMR at {size}, in a process of its own: ours {ours:.0f} MiB, published {peer:.0f} MiB"
        f" (15 times that of 10 classes), 1/{peer / ours:.0f}."
    )
    assert ours < peer / (20 if bench.mode == "full" else 2)


def peak_memory(statement: str, shape: tuple[int, ...]) -> float:
    """Return by how many MiB `statement` raises a fresh process's peak over its inputs."""
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
