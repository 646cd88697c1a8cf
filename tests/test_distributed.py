"""Two processes of a DDP job hold the same bits, and train as one process on the whole batch does."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

import efreg

ALPHA, STEPS = 1e-12, 4


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.Flatten(), nn.Linear(64, 3)
    ).double()


def images(step):
    return torch.randn(4, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(step))


def train(model, optimizer, part):
    for step in range(STEPS):
        optimizer.zero_grad()
        model(images(step)[part]).square().mean().backward()
        optimizer.step()


def optimizer_of(kind, model):
    if kind == "zero":
        return ZeroRedundancyOptimizer(model.parameters(), torch.optim.SGD, lr=0.05, momentum=0.9)
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


def work(rank, folder, kind):
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    model = DistributedDataParallel(network())
    efreg.attach(model, ALPHA, refresh=1, backend="cpp")
    train(model, optimizer_of(kind, model), slice(2 * rank, 2 * rank + 2))
    torch.save(model.module.state_dict(), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("kind", ["sgd", pytest.param("zero", marks=pytest.mark.slow)])
def test_two_processes(tmp_path, kind):
    torch.multiprocessing.spawn(work, (str(tmp_path), kind), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    alone = network()
    efreg.attach(alone, ALPHA, refresh=1)
    train(alone, optimizer_of("sgd", alone), slice(0, 4))
    for name, weight in alone.state_dict().items():
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], weight, rtol=1e-8, atol=1e-10)
