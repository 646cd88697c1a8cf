"""A whole training step of two processes, with the force beside one without, in turns."""

import copy

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

import efreg
from efreg.lab import models

PROCESSES, BATCH, ROUNDS = 2, 16, 30
WITHOUT = "without the force"
WAYS = {"DDP": DistributedDataParallel, "FSDP2": fully_shard}


def steps(way, refresh):
    """The step without a force and the one with, of the same network."""
    torch.manual_seed(0)
    torch.set_flush_denormal(True)
    torch.set_num_threads(1)
    first = models.vgg19(num_classes=10)
    networks = {name: WAYS[way](copy.deepcopy(first)) for name in (WITHOUT, "with")}
    efreg.attach(networks["with"], alpha=1e-14, refresh=refresh)
    return {name: step(network) for name, network in networks.items()}


def step(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    images, labels = torch.randn(BATCH, 3, 32, 32), torch.randint(10, (BATCH,))

    def train():
        optimizer.zero_grad()
        cross_entropy(model(images), labels).backward()
        optimizer.step()

    return train


def join(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=PROCESSES)


def follow(folder, way, refresh, told):
    """The other process: it takes the steps that it is told by name, until it is told of none."""
    join(1, folder)
    functions = steps(way, refresh)
    while (name := told.recv()) is not None:
        functions[name]()
    dist.destroy_process_group()


def together(told, name, function):
    """The step in both processes."""

    def call():
        told.send(name)
        function()

    return call


@pytest.mark.parametrize("refresh", [None, 1], ids=["kept", "fresh"])
@pytest.mark.parametrize("way", WAYS)
def test_step_of_two_processes(side_by_side, tmp_path, way, refresh):
    """One thread each; the batch is that of each process."""
    context = torch.multiprocessing.get_context("spawn")
    there, told = context.Pipe(duplex=False)
    other = context.Process(target=follow, args=(str(tmp_path), way, refresh, there), daemon=True)
    threads = torch.get_num_threads()
    other.start()
    join(0, tmp_path)
    functions = {name: together(told, name, step) for name, step in steps(way, refresh).items()}
    what = f"training step of {PROCESSES} processes, {way}, charges {'fresh' if refresh else 'kept'}"
    side_by_side(what, f"VGG-19, batch {BATCH} each", functions, relative_to=WITHOUT, rounds=ROUNDS)
    told.send(None)
    other.join()
    dist.destroy_process_group()
    torch.set_num_threads(threads)
