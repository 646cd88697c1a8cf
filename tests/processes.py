"""What tests share that train in several processes."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist


@contextmanager
def meeting(rank: int, processes: int, folder: str | Path) -> Iterator[None]:
    """This process is one of a group that meets in the folder, with one thread."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=processes)
    try:
        yield
    finally:
        dist.destroy_process_group()


def found_by(work: Callable[[int, int, str], None], processes: int, folder: Path) -> list[dict]:
    """What each process has saved as RANK.pt in the folder, after work(rank, processes, folder)."""
    torch.multiprocessing.spawn(work, (processes, str(folder)), nprocs=processes)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(processes)]
