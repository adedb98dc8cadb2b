"""Memory after many steps, and calls from several threads and processes at once."""

import gc
import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from wsseg_layers import GCI, PAMR, PAR, DenseCRF, FocalSizePenalty, StochasticGate, nGWPPool

MAPS = (2, 8, 32, 32)

STEPS: dict[str, tuple[Callable[..., Tensor], int]] = {
    "DenseCRF": (lambda image, scores: DenseCRF(2)(image[:, :3], scores), 2),
    "PAMR": (PAMR(2, [1, 2]), 2),
    "PAR": (PAR([1, 2], 2), 2),
    "nGWPPool": (nGWPPool(), 2),
    "FocalSizePenalty": (FocalSizePenalty(), 1),
    "StochasticGate": (StochasticGate(), 2),
    "GCI, batch": (GCI(8), 2),
    "GCI, instance": (GCI(8, norm="instance"), 2),
}


def resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


@pytest.mark.skipif(sys.platform != "linux", reason="reads the memory as Linux reports it")
@pytest.mark.parametrize("layer", STEPS)
def test_memory_is_flat(layer: str) -> None:
    module, count = STEPS[layer]

    def step() -> None:
        first, *last = (torch.rand(MAPS) for _ in range(count))
        *others, maps = first, *last
        maps.requires_grad_()
        module(*others, maps).square().mean().backward()

    def tensors() -> int:
        gc.collect()
        return sum(isinstance(thing, Tensor) for thing in gc.get_objects())

    for _ in range(50):
        step()
    tensors_before, growths = tensors(), []
    for _ in range(2):  # a leak grows every time, the heap of the C library now and then
        before = resident_mib()
        for _ in range(500):
            step()
        growths.append(resident_mib() - before)
    assert tensors() <= tensors_before  # fewer if what an earlier test left is freed meanwhile
    # One map of 64 KiB kept per step would be 31 MiB.
    assert min(growths) < 8


def refine(seed: int) -> Tensor:
    """What a data set's transform might do: every call of another size."""
    generator = torch.Generator().manual_seed(seed)
    side = 20 + seed % 7
    image, mask = torch.rand(1, 3, side, 30, generator=generator), torch.rand(1, 6, side, 30, generator=generator)
    return PAMR(3, [1, 2, 4])(image, mask.requires_grad_()).detach()


def test_two_threads_do_not_disturb_each_other() -> None:
    alone = [refine(seed) for seed in range(40)]
    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(refine, range(40)))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(alone, together, strict=True))


class Refined(Dataset[Tensor]):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, seed: int) -> Tensor:
        return refine(seed)


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_in_workers_of_a_data_loader(context: str) -> None:
    if sys.platform == "win32" and context == "fork":
        pytest.skip("Windows has no fork")
    refine(0)  # a parent that has used its thread pool is what breaks a careless fork
    loader = DataLoader(Refined(), batch_size=None, num_workers=2, multiprocessing_context=context)
    for seed, result in enumerate(loader):
        assert torch.equal(result, refine(seed))


def marginals(seed: int) -> Tensor:
    """A dense CRF in a data set's transform, on images large enough for several threads."""
    generator = torch.Generator().manual_seed(seed)
    side = 80 + seed % 3
    image, scores = (torch.rand(1, 3, side, 70, generator=generator) for _ in range(2))
    return DenseCRF(2)(255 * image, scores)


class Marginals(Refined):
    def __getitem__(self, seed: int) -> Tensor:
        return marginals(seed)


def test_two_threads_of_the_dense_crf_do_not_disturb_each_other() -> None:
    alone = [marginals(seed) for seed in range(12)]
    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(marginals, range(12)))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(alone, together, strict=True))


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_the_dense_crf_in_workers_of_a_data_loader(context: str) -> None:
    if sys.platform == "win32" and context == "fork":
        pytest.skip("Windows has no fork")
    marginals(0)
    loader = DataLoader(Marginals(), batch_size=None, num_workers=2, multiprocessing_context=context)
    for seed, result in enumerate(loader):
        assert torch.equal(result, marginals(seed))
