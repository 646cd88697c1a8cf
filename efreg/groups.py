"""What goes together: groups of units and their members. Forces and pruning share them, and know no more.

A unit is one channel, wherever it lies: rows of the weights that write it, its biases, its norm's scale,
shift and statistics, the columns of the weights that read it. A group is the units that lie on the same axes
of the same tensors, in as many places on each: what a ratio applies to.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor, nn

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)

PARTS = ("writes", "reads", "carries", "follows")
"""What a member is to its units: rows of a dense weight that make them; columns that take them in; bias,
scale, shift or depthwise weight; anything else that has their length, such as running statistics."""


@dataclass(frozen=True, eq=False)
class Member:
    """Positions along an axis of a parameter or buffer, each of which belongs to a unit.

    tensor: the qualified name. part: one of `PARTS`. index: the positions, int64 [M], in rising order of
        units.
    unit: the unit of each, int64 [M]. length: of the whole axis. trained: whether it is a parameter.
    """

    tensor: str
    axis: int
    length: int
    part: str
    index: Tensor
    unit: Tensor
    trained: bool = True

    @property
    def module(self) -> str:
        """The qualified name of the module that the tensor belongs to."""
        return self.tensor.rpartition(".")[0]

    def positions(self, units: Sequence[int]) -> Tensor:
        """Where these units lie along the axis, sorted."""
        return self.index[torch.isin(self.unit, torch.tensor(list(units), dtype=torch.int64))].sort().values

    @cached_property
    def whole(self) -> bool:
        """Whether the axis has a position for each unit and no others, position n for unit n."""
        every = torch.arange(self.length)
        return torch.equal(self.index, every) and torch.equal(self.unit, every)


@dataclass(frozen=True)
class Group:
    """Units that lie on the same axes of the same tensors.

    name: of the module whose weight writes it first, in the model's order. size: how many units, N.
    silent: whether a unit is zero wherever it is read once all that it is written by is zero.
    approximate: a norm mixes its units, so that removing one changes what the others mean. watched: whether
        the members are all that there are; else the group is a layer's filters, of which no more is known.
    """

    name: str
    size: int
    members: tuple[Member, ...] = field(compare=False, repr=False)
    silent: bool = field(default=True, compare=False)
    approximate: bool = field(default=False, compare=False)
    watched: bool = field(default=True, compare=False)

    def of(self, part: str) -> tuple[Member, ...]:
        """The members that are this to the units."""
        return tuple(member for member in self.members if member.part == part)

    @property
    def own(self) -> tuple[str, ...]:
        """The parameters that the units are written by and no others: entry n along the axis is unit n's
        alone.
        """
        written = (*self.of("writes"), *self.of("carries"))
        return tuple(member.tensor for member in written if member.whole and member.trained)

    @property
    def writers(self) -> tuple[str, ...]:
        """The modules whose weights write the units, or weights that the network has itself, by name."""
        return tuple(dict.fromkeys(member.module or member.tensor for member in self.of("writes")))

    @property
    def readers(self) -> tuple[str, ...]:
        """The modules whose weights read the units, or weights that the network has itself, by name."""
        return tuple(dict.fromkeys(member.module or member.tensor for member in self.of("reads")))

    @torch.no_grad()
    def dead(self, model: nn.Module) -> list[int]:
        """The units of which all that writes and carries them is exactly zero now; none where that is not
        silent.
        """
        if not self.silent:
            return []
        written = (*self.of("writes"), *self.of("carries"))
        zero = [stacked(tensor_of(model, m.tensor), m, self.size).eq(0).all(1).cpu() for m in written]
        return torch.stack(zero).all(0).nonzero().flatten().tolist()

    @torch.no_grad()
    def rows(self, model: nn.Module) -> Tensor:
        """Of each unit the rows of all its writers, side by side. [N, D], float32 or wider."""
        parts = [stacked(tensor_of(model, member.tensor), member, self.size) for member in self.of("writes")]
        return torch.cat([part.to(parts[0]) for part in parts], 1)


def tensor_of(model: nn.Module, name: str) -> Tensor:
    """A parameter or buffer by its qualified name. Raises AttributeError where there is none."""
    path, _, key = name.rpartition(".")
    module = model.get_submodule(path)
    found: Tensor | None = module._parameters.get(key)
    found = module._buffers.get(key) if found is None else found
    if found is None:
        raise AttributeError(f"there is no {name!r}")
    return found


def stacked(tensor: Tensor, member: Member, size: int) -> Tensor:
    """A member's entries of each of `size` units as a row; zeros where a unit has fewer. [N, D]"""
    slices = gathered(tensor.detach()).movedim(member.axis, 0).reshape(tensor.shape[member.axis], -1)
    slices = slices.to(torch.promote_types(slices.dtype, torch.float32))
    if member.whole:
        return slices
    index, unit = member.index.to(tensor.device), member.unit.to(tensor.device)
    counts = torch.bincount(unit, minlength=size)
    places = torch.arange(len(unit), device=unit.device) - (counts.cumsum(0) - counts)[unit]
    table = slices.new_zeros(size, int(counts.max()), slices.shape[1])
    table[unit, places] = slices[index]
    return table.flatten(1)


def gathered(tensor: Tensor) -> Tensor:
    """The tensor, whole where it is sharded, which all processes that have a shard ask for together."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def unwrap(model: nn.Module) -> nn.Module:
    """The network inside any nesting of DistributedDataParallel, DataParallel and `torch.compile`."""
    from torch.nn.parallel import DataParallel, DistributedDataParallel

    while True:
        if isinstance(model, (DistributedDataParallel, DataParallel)):
            model = model.module
        elif "_orig_mod" in model._modules:
            model = model.get_submodule("_orig_mod")
        else:
            return model
