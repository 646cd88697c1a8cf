"""What goes through an operation together: rows of tensors, and the groups whose units they write."""

from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from itertools import accumulate
from typing import Any, TypeVar

import torch
from torch import Tensor

from efreg.backends.transfer import send
from efreg.force.laws import Charges, is_finite

T = TypeVar("T")


class Rows:
    """Tensors of one device and dtype, a row each, whose filters have coefficients.

    Filter n of tensors[i] lies along dims[i] and has the coefficient coefficients[units[i][n]], or none where
    that is −1. units: int32 [filters] a row, on the CPU. on_device: what a backend has made of them.
    """

    def __init__(self, tensors: Sequence[Tensor], dims: Sequence[int], units: Sequence[Tensor]):
        self.tensors, self.dims, self.units = list(tensors), list(dims), list(units)
        self.on_device: Any = None
        self._places_on: dict[torch.device, Tensor] = {}

    @classmethod
    def of(cls, weights: Sequence[Tensor], dims: Sequence[int]) -> "Rows":
        """A row for each weight, the coefficients lying weight behind weight."""
        filters = [weight.shape[dim] for weight, dim in zip(weights, dims)]
        starts = accumulate(filters, initial=0)
        return cls(weights, dims, [running(start, n) for start, n in zip(starts, filters)])

    def coefficients(self, coefficients: Tensor) -> list[Tensor]:
        """Those of each row's filters, 0 where there are none."""
        device = coefficients.device
        if device not in self._places_on:
            self._places_on[device] = send(self.places, torch.int64, device)
        places = self._places_on[device]
        found = torch.where(places < 0, 0, coefficients[places.clamp_min(0)])
        return list(found.split(self.filters))

    def charges(self, magnitude: Tensor, balance: Tensor, norm: Tensor | None) -> list[Charges]:
        """Statistics that lie row behind row as one `Charges` a row."""
        parts = [stat.split(self.filters) for stat in (magnitude, _sign(magnitude, balance))]
        norms = [None] * len(self.tensors) if norm is None else norm.split(self.filters)
        return [Charges(m, s, d, n) for m, s, d, n in zip(*parts, self.sizes, norms)]

    @cached_property
    def filters(self) -> list[int]:
        """Of each row how many."""
        return [tensor.shape[dim] for tensor, dim in zip(self.tensors, self.dims)]

    @cached_property
    def sizes(self) -> list[int]:
        """Of each row how many numbers a filter has."""
        return [tensor.numel() // n if n else 0 for tensor, n in zip(self.tensors, self.filters)]

    @cached_property
    def places(self) -> Tensor:
        """`units`, row behind row. int32 [Σ filters]"""
        return torch.cat(self.units) if self.units else running(0, 0)


class Groups:
    """Groups whose charges are taken together, and the rows that write them.

    Group g has sizes[g] units, whose coefficients begin at starts[g]; row i writes owners[i]. For kernels the
    rows lie group behind group. Of a row the filters without a unit count for nothing. on_device: what a
    backend has made of them.
    """

    def __init__(self, rows: Rows, sizes: Sequence[int], starts: Sequence[int], owners: Sequence[int]):
        self.rows, self.sizes, self.starts, self.owners = rows, list(sizes), list(starts), list(owners)
        self._indices: dict[tuple, _Index] = {}
        self.on_device: Any = None

    @classmethod
    def of(cls, rows: Rows) -> "Groups":
        """Each row a group of its own, as `Rows.of` lays them out."""
        starts = list(accumulate(rows.filters, initial=0))[:-1]
        return cls(rows, rows.filters, starts, range(len(starts)))

    def charges(self, magnitude: Tensor, balance: Tensor, norm: Tensor | None) -> Charges:
        """The rows' statistics as those of the groups, [G, N]: sums over all that writes a unit."""
        index = self._on(magnitude)
        m = index.summed(magnitude)
        return Charges(
            m, _sign(m, index.summed(balance)), index.size, None if norm is None else index.length(norm)
        )

    def take(self, flat: Tensor) -> Tensor:
        """Numbers of a flat tensor that has one for each unit, such as coefficients, as [G, N]; else NaN."""
        return self._on(flat).spread(flat)

    def put(self, numbers: Tensor, flat: Tensor) -> None:
        """Writes [G, N] to their places in a flat tensor."""
        index = self._on(flat)
        own = numbers.to(flat.dtype).flatten().index_select(0, index.positions)
        flat.index_copy_(0, index.places, own)

    def split(self, numbers: Tensor) -> list[Tensor]:
        """[G, N] as one tensor a group."""
        return [row[:size] for row, size in zip(numbers, self.sizes)]

    @cached_property
    def members(self) -> list[Tensor]:
        """Of each group which filters write a unit, counted over all rows: int64 [N, K], or −1.

        They are in the rows' order; K is the most that a unit of the group has.
        """
        with torch.device("cpu"):
            places = self.rows.places.long()
            owners = torch.repeat_interleave(torch.tensor(self.owners), torch.tensor(self.rows.filters))
            own = [(owners == g).nonzero().flatten() for g in range(len(self.sizes))]
            return [_members(places[i] - s, size, i) for i, s, size in zip(own, self.starts, self.sizes)]

    @cached_property
    def numbers(self) -> list[int]:
        """Of each group D: how many numbers write a unit, of the first where they differ."""
        of_filter = [size for size, n in zip(self.rows.sizes, self.rows.filters) for _ in range(n)]
        return [
            sum(of_filter[k] for k in table[0].tolist() if k >= 0) if len(table) else 0
            for table in self.members
        ]

    @cached_property
    def packed(self) -> tuple[Tensor, Tensor]:
        """Groups and members as kernels read them: int64 [G, 5], int32.

        Of each group N, where its coefficients begin, how many rows write it, K, and where its [N, K] members
        begin among those of all.
        """
        depths = [table.shape[1] for table in self.members]
        lengths = [table.numel() for table in self.members]
        begins = accumulate(lengths, initial=0)
        counts = [self.owners.count(g) for g in range(len(self.sizes))]
        shapes = list(zip(self.sizes, self.starts, counts, depths, begins))
        with torch.device("cpu"):
            members = torch.cat([table.flatten() for table in self.members]).to(torch.int32)
            return torch.tensor(shapes, dtype=torch.int64).reshape(-1, 5), members

    def _on(self, like: Tensor) -> "_Index":
        key = like.device, like.dtype
        if key not in self._indices:
            with torch.device("cpu"), torch.inference_mode(False):
                self._indices[key] = _Index(self, like)
        return self._indices[key]


class _Index:
    """What gathers the statistics of rows into [G, N] on a device, and takes numbers back."""

    def __init__(self, groups: Groups, like: Tensor):
        shape = len(groups.sizes), max(groups.sizes, default=0)
        deepest = max((table.shape[1] for table in groups.members), default=1)
        filters, units = sum(groups.rows.filters), sum(groups.sizes)
        members = torch.full((*shape, deepest), filters)  # 0 stands behind the filters, and NaN behind that
        members[..., 0] = filters + 1
        positions = torch.zeros(shape, dtype=torch.bool)
        places = torch.full(shape, 0)
        for g, (table, size, start) in enumerate(zip(groups.members, groups.sizes, groups.starts)):
            members[g, :size, : table.shape[1]] = torch.where(table < 0, filters, table)
            members[g, :size, 0] = table[:, 0].clamp_min(0) if size else members[g, :size, 0]
            places[g, :size] = torch.arange(start, start + size)
            positions[g, :size] = True
        whole = deepest == 1 and filters == units and bool(positions.all())
        self._shape = shape if whole and torch.equal(members.flatten(), torch.arange(filters)) else None
        self._members = send(members.squeeze(-1) if deepest == 1 else members, torch.int64, like.device)
        self._ends = send([0.0, torch.nan], like.dtype, like.device)
        self._spread = send(torch.where(positions, places, -1), torch.int64, like.device)
        self.positions = send(positions.flatten().nonzero().flatten(), torch.int64, like.device)
        self.places = send(places[positions], torch.int64, like.device)
        self.size = send(
            groups.numbers, torch.float64 if like.device.type != "mps" else like.dtype, like.device
        )
        self.size = self.size.unsqueeze(1)

    def summed(self, statistic: Tensor) -> Tensor:
        if self._shape:
            return statistic.view(self._shape)
        found = torch.cat([statistic, self._ends])[self._members]
        return found.sum(-1) if found.ndim == 3 else found

    def length(self, norm: Tensor) -> Tensor:
        return self.summed(norm) if self._members.ndim == 2 else self.summed(norm * norm).sqrt()

    def spread(self, flat: Tensor) -> Tensor:
        return torch.cat([flat, self._ends])[self._spread]


def running(start: int, filters: int) -> Tensor:
    """Units one behind the other."""
    return torch.arange(start, start + filters, dtype=torch.int32, device="cpu")


def by_device_and_dtype(items: Iterable[T], tensor: Callable[[T], Tensor]) -> list[list[T]]:
    """The items, grouped by their tensor's device and dtype: what can go through an operation in one call."""
    groups: dict[tuple, list[T]] = {}
    for item in items:
        groups.setdefault((tensor(item).device, tensor(item).dtype), []).append(item)
    return list(groups.values())


def _members(units: Tensor, size: int, filters: Tensor) -> Tensor:
    """Which of the filters, which have these units, write each of `size` units. int64 [size, K]"""
    there = ((units >= 0) & (units < size)).nonzero().flatten()
    order = there[units[there].argsort(stable=True)]
    unit = units[order]
    each = torch.bincount(unit, minlength=size)
    found = torch.full((size, max(1, int(each.max())) if size else 1), -1)
    found[unit, torch.arange(len(unit)) - (each.cumsum(0) - each)[unit]] = filters[order]
    return found


def _sign(magnitude: Tensor, balance: Tensor) -> Tensor:
    """s_n: which way a unit's signs are out of balance (Eq. 4); 0 for one that is not finite."""
    return torch.where(is_finite(magnitude), balance.sign(), 0)
