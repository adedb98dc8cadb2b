"""Batches follow from the seed alone."""

from pathlib import Path

import torch
from hypothesis import given
from hypothesis import strategies as st
from voc.dataset.layout import read_classes, read_split
from voc.dataset.splits import VOCDataset, load_split
from voc.dataset.transforms import TrainTransform
from voc.train.batches import AugmentedDataset, GlobalBatches, load_batches
from voc.train.distribution import Group
from voc.train.seeds import mix_seed


@given(
    st.integers(1, 60),
    st.sampled_from([4, 8, 12]),
    st.sampled_from([1, 2, 4]),
    st.integers(0, 2**31),
    st.integers(1, 9),
)
def test_batches_do_not_depend_on_the_number_of_processes(
    length: int, batch_size: int, world_size: int, seed: int, epoch: int
) -> None:
    alone = list(GlobalBatches(length, batch_size, seed, epoch))
    shares = [
        list(GlobalBatches(length, batch_size, seed, epoch, group=Group(rank, world_size)))
        for rank in range(world_size)
    ]
    joined = [[key for share in step for key in share] for step in zip(*shares, strict=True)]
    if length >= batch_size:
        assert joined == alone
        assert len(alone) == length // batch_size
    indices = [index for batch in alone for index, _ in batch]
    assert len(set(indices)) == len(indices)
    assert set(indices) <= set(range(length))
    assert list(GlobalBatches(length, batch_size, seed, epoch, first=1)) == alone[1:]


def test_epochs_and_seeds_differ() -> None:
    first, second, other = (list(GlobalBatches(64, 8, *pair)) for pair in ((0, 1), (0, 2), (1, 1)))
    assert first != second
    assert first != other
    assert mix_seed(1, 2) != mix_seed(2, 1)


def test_augmentation_follows_from_the_seed_alone(toy_root: Path) -> None:
    classes = read_classes(toy_root)
    split = load_split(toy_root, read_split(toy_root, "train"), classes)
    dataset = AugmentedDataset(VOCDataset(split), TrainTransform(33))
    batches = GlobalBatches(len(dataset), 4, seed=3, epoch=1)
    assert len(batches) == 3
    loaded = [list(load_batches(dataset, batches, workers)) for workers in (0, 2)]
    for here, there in zip(*loaded, strict=True):
        assert torch.equal(here.image, there.image)
        assert here.name == there.name
    state = torch.get_rng_state()
    image = dataset[0, 7].image
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(image, dataset[0, 8].image)
