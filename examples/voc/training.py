"""What a training needs beside networks and losses: processes, parameter groups, seeds, batches, a way to stop."""

import random
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, Dataset, Sampler

from .checkpoints import Network
from .data import DataError
from .devices import choose_device
from .settings import Settings
from .splits import Sample, VOCDataset
from .transforms import TrainTransform

MOMENTUM = 0.9
NEW_MULTIPLE = 10  # of the backbone's learning rate, for weights that start at random


class TrainingError(RuntimeError):
    """Training cannot go on; the message says why."""


class Interrupted(Exception):  # noqa: N818  # no error
    """Someone asked for an end, and the state is saved."""


def start_accelerator(settings: Settings) -> Accelerator:
    """Join the other processes, if `torchrun` started several, and choose device and precision."""
    device = choose_device(settings.device)
    if settings.device.startswith("cuda:"):
        torch.cuda.set_device(device)
    if settings.precision == "fp16" and device.type != "cuda":
        raise ValueError("--precision fp16 needs a CUDA device; bf16 works everywhere")
    precision = "no" if settings.precision == "fp32" else settings.precision
    accelerator = Accelerator(cpu=device.type == "cpu", mixed_precision=precision)
    shares = accelerator.num_processes * settings.accumulate
    if settings.batch_size % shares:
        raise ValueError(
            f"--batch-size must be divisible by processes x --accumulate = {accelerator.num_processes} x "
            f"{settings.accumulate}, got {settings.batch_size}"
        )
    return accelerator


def mix_seed(*parts: int) -> int:
    """Return one seed that depends on all the parts."""
    return int(np.random.SeedSequence(parts).generate_state(1)[0])


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and PyTorch."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def freeze(model: Network) -> None:
    """Stop the gradient of the backbone's first layers and of all its BatchNorms."""
    backbone = model.backbone
    for module in backbone.frozen_modules():
        module.requires_grad_(False)
    for module in backbone.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.requires_grad_(False)


def build_optimizer(model: Network, lr: float, weight_decay: float) -> torch.optim.SGD:
    """Return SGD with the learning-rate multiples of the paper's implementation; biases are not decayed."""
    new = {id(p) for module in model.new_modules() for p in module.parameters()}
    groups: dict[tuple[int, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        is_bias = name.endswith(".bias")
        multiple = NEW_MULTIPLE if id(parameter) in new else 1
        if is_bias:
            multiple *= model.backbone.bias_lr_multiple
        groups.setdefault((multiple, 0.0 if is_bias else weight_decay), []).append(parameter)
    return torch.optim.SGD(
        [
            {"params": params, "lr": lr * multiple, "weight_decay": decay}
            for (multiple, decay), params in groups.items()
        ],
        lr=lr,
        momentum=MOMENTUM,
    )


class AugmentedDataset(Dataset[Sample]):
    """Augmented images; an item's key is its index and the seed of its augmentation."""

    def __init__(self, dataset: VOCDataset, transform: TrainTransform) -> None:
        self.dataset = dataset
        self.transform = transform

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.dataset)

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        """Read and augment one image."""
        index, seed = key
        sample = self.dataset[index]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            image, mask = self.transform(sample.image, sample.mask)
        return sample._replace(image=image, mask=mask)


class GlobalBatches(Sampler[list[tuple[int, int]]]):
    """One epoch's batches, of which each process gets its share; they do not depend on the number of processes.

    The order follows from `seed` and `epoch`, an image's augmentation from `seed`, `epoch` and its index. The last
    images of an epoch, fewer than a batch, are left out: BatchNorm of a lone image would be noise.
    """

    def __init__(
        self, length: int, batch_size: int, seed: int, epoch: int, first: int = 0, rank: int = 0, world_size: int = 1
    ) -> None:
        self.indices = range(length)
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = epoch
        self.steps = range(first, max(1, length // batch_size))
        self.rank = rank
        self.world_size = world_size

    def __len__(self) -> int:
        """Return the number of batches."""
        return len(self.steps)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        """Yield this process's keys of every batch."""
        order = np.random.default_rng(mix_seed(self.seed, self.epoch)).permutation(self.indices).tolist()
        for step in self.steps:
            batch = order[step * self.batch_size : (step + 1) * self.batch_size]
            share = len(batch) // self.world_size
            for_us = batch[self.rank * share : (self.rank + 1) * share]
            yield [(index, mix_seed(self.seed, self.epoch, index)) for index in for_us]


def load_batches(dataset: AugmentedDataset, batches: GlobalBatches, workers: int) -> Iterator[Sample]:
    """Yield these batches, read by workers that leave Ctrl-C to the main process."""
    loader = DataLoader(dataset, batch_sampler=batches, num_workers=workers, worker_init_fn=ignore_interrupts)
    try:
        yield from loader
    except DataError as error:  # a worker's error comes with its traceback: the last line says what is wrong
        raise DataError(str(error).strip().splitlines()[-1].removeprefix("voc.data.DataError: ")) from error
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise TrainingError(f"a process that reads images died ({str(error).splitlines()[0]})") from error


def ignore_interrupts(_worker: int) -> None:
    """Let a worker live on after Ctrl-C, until the main process has saved its state."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@contextmanager
def quiet_threads() -> Iterator[None]:
    """Keep threads from printing their tracebacks: TensorBoard's raises its error in the main thread once more."""
    previous, threading.excepthook = threading.excepthook, lambda _: None
    try:
        yield
    finally:
        threading.excepthook = previous


@contextmanager
def sigterm_interrupts() -> Iterator[None]:
    """Let SIGTERM, which cluster schedulers send, end what runs as Ctrl-C does: with a word on how to go on."""
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


class StopRequest:
    """Notes the first Ctrl-C or SIGTERM in `requested`, so that the step can end; the second one acts as usual."""

    def __init__(self) -> None:
        self.requested = False
        self.previous: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        """Start to listen."""
        for number in (signal.SIGINT, signal.SIGTERM):
            self.previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        """Put back what was there before."""
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _note(self, _number: int, _frame: FrameType | None) -> None:
        self.requested = True
        self.__exit__()
