"""The processes of a DDP job hold the same bits, and train as one process on the whole batch does."""

from contextlib import nullcontext

import pytest
import torch
from processes import found_by, meeting
from torch import nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

import efreg

ALPHA, STEPS = 1e-12, 4

KINDS = {
    "plain": {},
    "gradients as views of buckets": {"gradient_as_bucket_view": True},
    "static graph": {"static_graph": True},
    "no_sync": {"parts": 2},
    "no_sync, views of buckets": {"parts": 2, "gradient_as_bucket_view": True},
    "zero": {"zero": True},
    "zero, views of buckets": {"zero": True, "gradient_as_bucket_view": True},
    "proximal": {"update": "proximal"},
    "zero, proximal": {"zero": True, "update": "proximal"},
}


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.Flatten(), nn.Linear(64, 3)
    ).double()


def images(step):
    return torch.randn(8, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(step))


def attach(model, update="gradient"):
    efreg.attach(
        model, {"gradient": ALPHA, "proximal": 1e-9}[update], update=update, refresh=1, backend="cpp"
    )


def train(model, *, rank=0, processes=1, parts=1, zero=False):
    """On a process's share of each batch, in so many parts of which the last is synchronised."""
    kind = ZeroRedundancyOptimizer if zero else torch.optim.SGD
    chosen = {"optimizer_class": torch.optim.SGD} if zero else {}
    optimizer = kind(model.parameters(), lr=0.05, momentum=0.9, **chosen)
    for step in range(STEPS):
        optimizer.zero_grad()
        *first, last = images(step).chunk(processes)[rank].chunk(parts)
        with model.no_sync() if first else nullcontext():
            for part in first:
                (model(part).square().mean() / parts).backward()
        (model(last).square().mean() / parts).backward()
        optimizer.step()


def trained(rank, processes, *, parts=1, zero=False, update="gradient", **options):
    model = DistributedDataParallel(network(), **options)
    attach(model, update)
    train(model, rank=rank, processes=processes, parts=parts, zero=zero)
    return model.module.state_dict()


def work(rank, processes, folder):
    with meeting(rank, processes, folder):
        found = {name: trained(rank, processes, **options) for name, options in KINDS.items()}
        torch.save(found, f"{folder}/{rank}.pt")


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow)])
def found(request, tmp_path_factory):
    """What each of the processes found."""
    return found_by(work, request.param, tmp_path_factory.mktemp("distributed"))


@pytest.mark.parametrize("kind", KINDS)
def test_every_process_holds_the_same_bits(kind, found):
    first, *others = (here[kind] for here in found)
    for other in others:
        for name, weight in first.items():
            assert torch.equal(other[name], weight), name


@pytest.mark.parametrize("kind", KINDS)
def test_processes_train_as_one(kind, found):
    alone = network()
    attach(alone, KINDS[kind].get("update", "gradient"))
    train(alone)
    for name, weight in alone.state_dict().items():
        torch.testing.assert_close(found[0][kind][name], weight, rtol=1e-8, atol=1e-10)


def test_the_force_is_felt():
    """Else what is above would say nothing of it."""
    for update in ("gradient", "proximal"):
        alone, without = network(), network()
        attach(alone, update)
        for model in (alone, without):
            train(model)
        assert not torch.allclose(alone[0].weight, without[0].weight, rtol=1e-6)
