"""Shards: what this process has of a parameter that `fully_shard` spread over several."""

import sys
from typing import TYPE_CHECKING, NamedTuple, TypeGuard

from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.tensor import DTensor


class Shard(NamedTuple):
    """Which entries of a parameter, along the axis that is sharded, lie here, and with whom the others."""

    first: int
    length: int
    group: "ProcessGroup"


def is_sharded(tensor: Tensor) -> "TypeGuard[DTensor]":
    """Whether it is a DTensor."""
    module = sys.modules.get("torch.distributed.tensor")  # nobody has made one before it was imported
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Tensor) -> Tensor:
    """What lies on this process: the tensor, or its shard."""
    return tensor._local_tensor if is_sharded(tensor) else tensor


def shard_of(tensor: Tensor) -> Shard | None:
    """Where the shard lies that this process has; None of a tensor that each process has whole."""
    if not is_sharded(tensor):
        return None
    from torch.distributed.tensor import Shard as Sharded

    for axis, placement in enumerate(tensor.placements):
        if isinstance(placement, Sharded):
            whole, processes = tensor.shape[placement.dim], tensor.device_mesh.size(axis)
            each = -(-whole // processes)
            first = min(each * tensor.device_mesh.get_local_rank(axis), whole)
            return Shard(first, min(each, whole - first), tensor.device_mesh.get_group(axis))
    return None


def check_sharding(tensor: Tensor, name: str, dim: int) -> None:
    """Raises ValueError for a parameter that is sharded otherwise than along `dim`, where its filters lie."""
    if not is_sharded(tensor):
        return
    from torch.distributed.tensor import Shard as Sharded

    split = [placement for placement in tensor.placements if not placement.is_replicate()]
    if len(split) > 1 or any(type(p) is not Sharded or p.dim != dim for p in split):
        raise ValueError(
            f"{name} is placed as {tuple(tensor.placements)}, which splits its filters: shard it along "
            f"dimension {dim}, where they lie (fully_shard(..., shard_placement_fn=lambda p: Shard({dim})))"
        )


def check_parameters(model: nn.Module) -> None:
    """Raises ValueError where parameters are cut up without regard to filters, naming what does it."""
    for module in model.modules():
        if any(kind.__name__ == "FullyShardedDataParallel" for kind in type(module).__mro__):
            raise ValueError(
                "FullyShardedDataParallel makes flat pieces of parameters, in which there are no filters: "
                "take torch.distributed.fsdp.fully_shard"
            )
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "ds_id"):
            raise ValueError(
                f"{name} is partitioned by DeepSpeed's ZeRO stage 3, in flat pieces in which there are no "
                "filters: take stage 1 or 2, or torch.distributed.fsdp.fully_shard"
            )
