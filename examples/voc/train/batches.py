"""Batches of augmented images. They depend on the seed only, not on the number of processes."""

from collections.abc import Iterator

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from ..dataset.errors import DataError
from ..dataset.splits import Sample, VOCDataset
from ..dataset.transforms import TrainTransform
from .distribution import ALONE, Group
from .errors import TrainingError
from .seeds import mix_seed
from .signals import ignore_interrupts


class AugmentedDataset(Dataset[Sample]):
    """Augmented images; the key of an item is its index and the seed of its augmentation."""

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
    """The batches of one epoch, of which each process gets its share.

    The order of the images depends on `seed` and `epoch` only, the augmentation of an image on `seed`, `epoch` and its
    index; neither depends on the number of processes. The last images of an epoch, if fewer than a batch, are left out:
    the BatchNorm statistics of very few images are noise.
    """

    def __init__(
        self, length: int, batch_size: int, seed: int, epoch: int, first: int = 0, group: Group = ALONE
    ) -> None:
        self.indices = range(length)
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = epoch
        self.steps = range(first, max(1, length // batch_size))
        self.group = group

    def __len__(self) -> int:
        """Return the number of batches."""
        return len(self.steps)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        """Yield this process's keys of every batch."""
        rank, size = self.group
        order = np.random.default_rng(mix_seed(self.seed, self.epoch)).permutation(self.indices).tolist()
        for step in self.steps:
            batch = order[step * self.batch_size : (step + 1) * self.batch_size]
            share = len(batch) // size
            for_us = batch[rank * share : (rank + 1) * share]
            yield [(index, mix_seed(self.seed, self.epoch, index)) for index in for_us]


def load_batches(dataset: AugmentedDataset, batches: GlobalBatches, workers: int) -> Iterator[Sample]:
    """Yield these batches, read by worker processes that ignore Ctrl-C."""
    loader = DataLoader(dataset, batch_sampler=batches, num_workers=workers, worker_init_fn=ignore_interrupts)
    try:
        yield from loader
    except DataError as error:  # a worker's error holds its traceback; the last line is the message
        name = f"{DataError.__module__}.{DataError.__qualname__}: "
        raise DataError(str(error).strip().splitlines()[-1].removeprefix(name)) from error
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise TrainingError(f"a process that reads images died ({str(error).splitlines()[0]})") from error
