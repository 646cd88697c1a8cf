"""The multi-tensor table: tensors that go through an operation together, and where each filter lies."""

import math
from collections import OrderedDict
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from efreg.backends.protocol import Grads
from efreg.backends.reference import accumulator
from efreg.backends.rows import Groups, Rows
from efreg.backends.transfer import Sent, capturing, on_device, send
from efreg.force.laws import Factor


class Table:
    """Where the filters of some rows lie: arrays on the device, laid out as kernels/force.py says.

    It holds no tensor of the rows. Weights that are not dense in memory, filter behind filter, have a dense
    copy here, which `read` renews.
    """

    def __init__(self, rows: Rows):
        first = rows.tensors[0]
        self.device, self.dtype = first.device, first.dtype
        if capturing(self.device):
            raise RuntimeError(
                "a graph is being captured and the table of these weights does not exist yet: "
                "take one step, with gradients, before the capture"
            )
        filters, sizes = rows.filters, rows.sizes
        self.copies = {
            i: torch.empty_like(weight.movedim(dim, 0), memory_format=torch.contiguous_format)
            for i, (weight, dim) in enumerate(zip(rows.tensors, rows.dims))
            if not _filters_are_dense(weight, dim)
        }
        addresses = [self.copies.get(i, weight).data_ptr() for i, weight in enumerate(rows.tensors)]
        starts = accumulate(filters, initial=0)
        self.tiles = send(_tiles(filters, sizes), torch.int32, self.device)
        self.layout = send(list(zip(filters, sizes, starts)), torch.int64, self.device)
        self.units = send(rows.places, torch.int32, self.device)
        self.weights = send(addresses, torch.int64, self.device)
        self.accumulator = acc = accumulator(self.dtype)
        self.magnitude, self.balance = torch.empty(2, sum(filters), dtype=acc, device=self.device)
        self._sent_targets = Sent(torch.int64, self.device)
        self._sent_law, self._sent_scale, self._sent_rates = (Sent(acc, self.device) for _ in range(3))
        self._one = on_device(1.0, self.magnitude)
        self._seen: tuple = ()

    def check(self, coefficients: Tensor) -> None:
        """Raises ValueError for coefficients that kernels, which see an address alone, would misread."""
        if coefficients.dtype is not self.accumulator or coefficients.device != self.device:
            found = f"{coefficients.dtype} on {coefficients.device}"
            raise ValueError(f"coefficients are {found}: give {self.accumulator} on {self.device}")
        if not coefficients.is_contiguous():
            raise ValueError("coefficients must be contiguous")

    def read(self, rows: Rows) -> None:
        """Renews the dense copies of weights that are not dense."""
        for i, copy in self.copies.items():
            copy.copy_(rows.tensors[i].detach().movedim(rows.dims[i], 0))

    def write(self, rows: Rows) -> None:
        """Hands the dense copies back to the weights."""
        for i, copy in self.copies.items():
            rows.tensors[i].detach().movedim(rows.dims[i], 0).copy_(copy)

    def targets(
        self, grads: Grads, there: list[Tensor], rows: Rows
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """Addresses and turns of the gradients, on the device; and (gradient, copy) where a copy is pulled.

        there: the gradients that are not None.
        Raises ValueError for a gradient whose shape, dtype or device is not its weight's.
        """
        missing = [i for i, grad in enumerate(grads) if grad is None] if len(there) < len(grads) else []
        in_order = all(map(Tensor.is_contiguous, there))
        strides = None if in_order else list(map(Tensor.stride, there))
        seen = missing, list(map(Tensor.data_ptr, there)), strides
        if seen == self._seen:
            return self._sent_targets.last, []
        found, copies = [], []
        for i, grad in enumerate(grads):
            if grad is None:
                found.append((0, 1))
                continue
            target, turn = self._target(i, grad, rows)
            found.append((target.data_ptr(), turn))
            if target is not grad:
                copies.append((grad.movedim(rows.dims[i], 0), target))
        self._seen = ()
        sent = self._sent_targets(found)
        self._seen = () if copies or capturing(self.device) else seen
        return sent, copies

    def law(self, numbers: list[Factor]) -> Tensor:
        """The law's numbers on the device."""
        return self._sent_law(numbers)

    def scale(self, scale: Factor) -> Tensor:
        """A factor of all rows on the device, 0-dim; a number that is not 1 is one that changes."""
        if isinstance(scale, Tensor):
            return on_device(scale, self.magnitude)
        return self._one if scale == 1 else self._sent_scale([float(scale)])[0]

    def rates(self, rates: list[Factor]) -> Tensor:
        """The rows' learning rates on the device: numbers are sent, tensors that lie there gathered."""
        if any(isinstance(rate, Tensor) and rate.device.type != "cpu" for rate in rates):
            return torch.stack([on_device(rate, self.magnitude) for rate in rates])
        return self._sent_rates([float(rate) for rate in rates])

    def _target(self, i: int, grad: Tensor, rows: Rows) -> tuple[Tensor, int]:
        """What is pulled in place of a gradient, itself or a dense copy, and its turn."""
        weight, dim = rows.tensors[i], rows.dims[i]
        _check_gradient(grad, weight)
        if i not in self.copies and (turn := _turn(grad, weight)):
            return grad, turn
        dense = self.copies.get(i, weight)
        return torch.empty_like(dense).copy_(grad.movedim(dim, 0)), 1


class Shapes(NamedTuple):
    """Groups on a device, as kernels/force.py has them: owners, groups, members; and a counter for each."""

    owners: Tensor
    groups: Tensor
    members: Tensor
    done: Tensor


def shapes_of(groups: Groups, device: torch.device) -> Shapes:
    """The groups as kernels on a device read them, made at the first use."""
    if groups.on_device is None:
        with torch.device("cpu"), torch.inference_mode(False):
            shapes, members = groups.packed
            shapes, owners = shapes.clone(), torch.tensor(groups.owners)
            tiles = torch.tensor(tiles_of(groups.rows.filters, groups.rows.sizes))
            shapes[:, 2] = torch.zeros(len(shapes), dtype=torch.int64).index_add_(0, owners, tiles)
            done = torch.zeros(len(shapes), dtype=torch.int32)
            arrays = (owners, torch.int32), (shapes, torch.int64), (members, torch.int32), (done, torch.int32)
            groups.on_device = Shapes(*(send(array, dtype, device) for array, dtype in arrays))
    return groups.on_device


TABLES = 8
"""Tables that are kept for operations on bare tensors, whose rows do not last."""

_tables: OrderedDict[tuple, Table] = OrderedDict()


def table_of(rows: Rows) -> Table:
    """The rows as kernels on a device read them, made at the first use."""
    if rows.on_device is None:
        rows.on_device = _found_or_made(rows)
    return rows.on_device


def _found_or_made(rows: Rows) -> Table:
    """The table of these addresses, sizes and strides."""
    weights = zip(rows.tensors, rows.dims)
    places = ((w.data_ptr(), w.shape, w.stride(), dim, w.dtype, w.device) for w, dim in weights)
    key = (*places, tuple(rows.places.tolist()))
    with torch.inference_mode(False):  # what is made here serves steps outside inference mode, too
        table = _tables.pop(key, None) or Table(rows)
    _tables[key] = table
    if len(_tables) > TABLES:
        _tables.popitem(last=False)
    return table


def tiles_of(filters: list[int], sizes: list[int]) -> list[int]:
    """How many tiles each row is cut into."""
    from efreg.kernels.launch import filters_a_tile

    return [-(-n // filters_a_tile(size)) for n, size in zip(filters, sizes)]


def _tiles(filters: list[int], sizes: list[int]) -> Tensor:
    """Row and first filter of each program's tile, [T, 2]."""
    from efreg.kernels.launch import filters_a_tile

    with torch.device("cpu"):
        per_tile = torch.tensor([filters_a_tile(size) for size in sizes])
        counts = torch.tensor(tiles_of(filters, sizes))
        row = torch.repeat_interleave(torch.arange(len(filters)), counts)
        before = counts.cumsum(0) - counts
        first = (torch.arange(len(row)) - before[row]) * per_tile[row]
    return torch.stack([row, first], dim=1)


def _filters_are_dense(tensor: Tensor, dim: int) -> bool:
    """Whether the filters lie one behind the other, each without gaps."""
    return dim == 0 and bool(_orders(tensor))


def _turn(grad: Tensor, weight: Tensor) -> int:
    """How a gradient's order in memory follows from its weight's (kernels/force.py), 0 where it does not."""
    if grad.stride() == weight.stride():
        return 1
    orders, weight_orders = _orders(grad), _orders(weight)
    if not orders or not weight_orders:
        return 0
    if orders & weight_orders:
        return 1
    return math.prod(weight.shape[2:]) if torch.contiguous_format in orders else weight.shape[1]


def _orders(tensor: Tensor) -> set[torch.memory_format]:
    """The dense orders in which the numbers lie: both, where there is one channel or one position."""
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(tensor.ndim, torch.contiguous_format)
    formats = (torch.contiguous_format, last)
    return {format for format in formats if tensor.is_contiguous(memory_format=format)}


def _check_gradient(grad: Tensor, weight: Tensor) -> None:
    for what in ("shape", "dtype", "device"):
        if getattr(grad, what) != getattr(weight, what):
            raise ValueError(
                f"a gradient has {what} {getattr(grad, what)}, its weight {getattr(weight, what)}: "
                "they must agree, or backend='reference' serves them"
            )
