"""Training in several processes, as torchrun starts them; all of this is harmless in one process alone."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from filelock import FileLock, Timeout
from torch import nn
from torch.nn.parallel import DistributedDataParallel


def launched() -> int:
    """How many processes torchrun has started, of which this is one; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", 1))


@contextmanager
def processes(device: str) -> Iterator[None]:
    """Joins the processes that torchrun started for a training on `device`, and parts from them at the end.

    On GPUs each process takes the one of its LOCAL_RANK as the current one; they talk by NCCL, on CPUs by
    Gloo. Without torchrun, or with one process, nothing happens. Raises ValueError where GPUs are too few.
    """
    if launched() == 1:
        yield
        return
    on_gpus = torch.cuda.is_available() and device.startswith(("auto", "cuda"))
    if on_gpus:
        _take_gpu(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if on_gpus else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def _take_gpu(index: int) -> None:
    if index >= (count := torch.cuda.device_count()):
        raise ValueError(
            f"no GPU for process {index}, there are {count}: give torchrun --nproc-per-node {count}"
        )
    torch.cuda.set_device(index)


def world_size() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Which of them this one is, from 0."""
    return dist.get_rank() if world_size() > 1 else 0


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """While no other command works in the folder, which is made. Raises ValueError where one does."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with nullcontext() if rank() else FileLock(folder / ".lock", blocking=False):
            yield
    except Timeout as error:
        raise ValueError(f"another command works in {folder}: wait for it, or name another --out") from error


@contextmanager
def first_alone() -> Iterator[None]:
    """The block in the first process, then in the others; if the first fails, torchrun ends them."""
    if rank():
        dist.barrier()
    yield
    if world_size() > 1 and not rank():
        dist.barrier()


def replicated(model: nn.Module) -> nn.Module:
    """The model whose gradients are the means over the processes; the statistics of its norms are not."""
    return DistributedDataParallel(model) if world_size() > 1 else model


def share_buffers(model: nn.Module) -> None:
    """Gives all processes the buffers of the first."""
    for buffer in model.buffers() if world_size() > 1 else ():
        dist.broadcast(buffer, 0)


def summed(*numbers: float) -> list[float]:
    """The sum of each over all processes."""
    if world_size() == 1:
        return list(numbers)
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    sums = torch.tensor(numbers, dtype=torch.float64, device=device)
    dist.all_reduce(sums)
    return sums.tolist()
