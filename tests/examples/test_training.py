"""What a training needs: seeded batches, the same noise and BatchNorm on several processes, a way to stop."""

import signal
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from voc.dataset.layout import read_classes, read_split
from voc.dataset.splits import VOCDataset, load_split
from voc.dataset.transforms import TrainTransform
from voc.train.batches import AugmentedDataset, GlobalBatches, load_batches
from voc.train.distribution import GlobalBatchNoise, Group, share_batch_statistics
from voc.train.seeds import mix_seed
from voc.train.signals import StopRequest

from wsseg_layers import StochasticGate


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


def noisy(x: Tensor) -> Tensor:
    """Everything random that the networks do."""
    x = F.dropout2d(nn.Dropout(0.5)(x), 0.3)
    return StochasticGate(0.4).train()(nn.Dropout2d(0.5)(x), x)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_noise_is_that_of_the_whole_batch(world_size: int, layout: torch.memory_format) -> None:
    x = torch.rand(4, 6, 5, 3).add_(1).contiguous(memory_format=layout)
    results = []
    for size in (1, world_size):
        shares = []
        for rank in range(size):
            torch.manual_seed(5)
            with GlobalBatchNoise(Group(rank, size)):
                shares.append(noisy(x.chunk(size)[rank]))
        results.append(torch.cat(shares))
    assert torch.equal(*results)


def test_noise_is_that_of_dropout() -> None:
    torch.manual_seed(0)
    x = torch.ones(8, 50, 6, 6, requires_grad=True)
    with GlobalBatchNoise(Group(1, 3)):
        out = F.dropout(x, 0.25)
        channels = F.dropout2d(x, 0.25)
        assert F.dropout(x, 0.25, training=False) is x
        assert F.dropout(x, 0.0) is x
    assert out.unique().tolist() == pytest.approx([0, 4 / 3])
    assert (out > 0).float().mean().item() == pytest.approx(0.75, abs=0.02)
    assert torch.equal(channels.amin(dim=(2, 3)), channels.amax(dim=(2, 3)))
    assert (channels > 0).float().mean().item() == pytest.approx(0.75, abs=0.1)
    (grad,) = torch.autograd.grad(out.sum(), x)
    assert torch.equal(grad, out)


def norm_on_two_processes(rank: int, store: str, x: Tensor, weight: Tensor, results: dict[int, list[Tensor]]) -> None:
    """Run BatchNorm and its backward pass on this process's half of the batch."""
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.BatchNorm2d(3, affine=False))
    share_batch_statistics(model)
    half = x.chunk(2)[rank].clone().requires_grad_()
    out = model(half)
    (out * weight.chunk(2)[rank]).sum().backward()
    assert half.grad is not None
    parameters = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    results[rank] = [out.detach(), half.grad, *parameters, *model.buffers()]
    dist.destroy_process_group()


def test_batch_norm_of_two_processes_is_that_of_one(tmp_path: Path) -> None:
    torch.manual_seed(1)
    x, weight = 3 * torch.randn(4, 3, 5, 4) + 2, torch.randn(4, 3, 5, 4)
    model = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.BatchNorm2d(3, affine=False))
    whole = x.clone().requires_grad_()
    out = model(whole)
    (out * weight).sum().backward()
    with mp.Manager() as manager:
        shared = manager.dict()
        mp.spawn(norm_on_two_processes, (str(tmp_path / "store"), x, weight, shared), nprocs=2)
        first, second = shared[0], shared[1]
    assert whole.grad is not None
    torch.testing.assert_close(torch.cat([first[0], second[0]]), out.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.cat([first[1], second[1]]), whole.grad, rtol=1e-4, atol=1e-5)
    for ours, parameter in zip(zip(first[2:4], second[2:4], strict=True), model.parameters(), strict=True):
        torch.testing.assert_close(sum(ours), parameter.grad, rtol=1e-4, atol=1e-5)
    for ours, buffer in zip(first[4:], model.buffers(), strict=True):
        torch.testing.assert_close(ours, buffer, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_is_noted_once(number: int) -> None:
    before = signal.getsignal(number)
    with StopRequest() as stop:
        assert not stop.requested
        signal.raise_signal(number)
        assert stop.requested
        assert signal.getsignal(number) is before
    assert signal.getsignal(number) is before
