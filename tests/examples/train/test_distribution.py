"""The same noise and BatchNorm on several processes as on one."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor, nn
from voc.train.distribution import GlobalBatchNoise, Group, share_batch_statistics

from wsseg_layers import StochasticGate


def noisy(x: Tensor) -> Tensor:
    """Apply all random functions of the networks."""
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
