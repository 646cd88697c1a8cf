"""Spans: what a force acts on as it is in the model now, and what of it lies on this process."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from efreg.backends.rows import Rows, running
from efreg.backends.transfer import send
from efreg.force.shards import is_sharded, local, shard_of
from efreg.force.store import Shelf
from efreg.force.targets import Place, Target


class Found(NamedTuple):
    """A place as it is in the model now."""

    target: Target
    place: Place
    module: nn.Module
    key: str
    parameter: nn.Parameter


class Span(NamedTuple):
    """Entries of a tensor along `dim`, from the first to the last that belongs to a unit, and their units.

    before: how many entries of the parameter's span lie on other processes and come first.
    """

    tensor: Tensor
    dim: int
    first: int
    units: Tensor
    before: int = 0

    @classmethod
    def of(cls, f: Found, shelf: Shelf) -> "Span":
        """The parameter's; of a sharded one without its numbers."""
        dim, parameter = f.place.dim, f.parameter
        first, own = f.place.units(parameter.shape[dim])
        units = torch.where(own < 0, -1, own + shelf.starts[f.target]).to(torch.int32)
        tensor = torch.empty(parameter.shape, device="meta") if is_sharded(parameter) else parameter
        return cls(tensor, dim, first, units)

    @classmethod
    def here(cls, f: Found, shelf: Shelf) -> "Span":
        """What lies on this process."""
        span, shard = cls.of(f, shelf), shard_of(f.parameter)
        if shard is None:
            return span._replace(tensor=local(f.parameter))
        end = shard.first + shard.length
        low = min(max(span.first, shard.first), end)
        high = max(low, min(span.first + len(span.units), end))
        units = span.units[low - span.first :][: high - low]
        return cls(local(f.parameter), span.dim, low - shard.first, units, max(low - span.first, 0))

    @property
    def is_all(self) -> bool:
        """Whether there are no other entries."""
        return len(self.units) == self.tensor.shape[self.dim]

    @property
    def slice(self) -> Tensor:
        """The entries."""
        if self.is_all:
            return self.tensor
        return self.tensor.detach().narrow(self.dim, self.first, len(self.units))


def rows_of(spans: Sequence[Span]) -> Rows:
    """The spans as rows."""
    return Rows([s.slice for s in spans], [s.dim for s in spans], [s.units for s in spans])


class Gathering:
    """Makes the statistics of all filters out of those of the filters that lie on each process.

    One sum over the processes, of a number a filter and statistic, whatever the parameters' size.
    """

    def __init__(self, found: Sequence[Found], shelf: Shelf):
        there = here = 0
        places: dict[Any, tuple[list[Tensor], list[Tensor]]] = {}
        for f in found:
            span, shard = Span.here(f, shelf), shard_of(f.parameter)
            mine, its = places.setdefault(shard and shard.group, ([], []))
            mine.append(running(here, len(span.units)))
            its.append(running(there + span.before, len(span.units)))
            here, there = here + len(span.units), there + len(Span.of(f, shelf).units)
        self._filters, device = there, shelf.coefficients.device
        self._parts = [
            (group, *(send(torch.cat(x), torch.int64, device) for x in indices))
            for group, indices in places.items()
        ]

    def __call__(
        self, magnitude: Tensor, balance: Tensor, norm: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Of each statistic those of all filters, one behind the other."""
        here = torch.stack([magnitude, balance] if norm is None else [magnitude, balance, norm])
        found = here.new_zeros(len(here), self._filters)
        for group, mine, its in self._parts:
            part = torch.zeros_like(found)
            part[:, its] = here[:, mine]
            if group is not None:
                torch.distributed.all_reduce(part, group=group)
            found += part
        return found[0], found[1], None if norm is None else found[2]
