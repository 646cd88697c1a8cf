"""The multi-tensor table: tensors that go through an operation together, and where each filter lies."""

import math
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate
from typing import TypeVar

import torch
from torch import Tensor

from efreg.laws import Charges
from efreg.reference import accumulator
from efreg.sending import Sent, capturing, on_device, send

T = TypeVar("T")


class Rows:
    """Tensors of one device and dtype, a row each.

    Filter n of tensors[i] lies along dims[i] and has the coefficient coefficients[offsets[i] + n]; rows of
    one layer share an offset.
    """

    def __init__(self, tensors: Sequence[Tensor], dims: Sequence[int], offsets: Sequence[int]):
        self.tensors, self.dims, self.offsets = list(tensors), list(dims), list(offsets)
        self._table: Table | None = None

    @classmethod
    def of(cls, weights: Sequence[Tensor], dims: Sequence[int]) -> "Rows":
        """A row for each weight, the coefficients lying weight behind weight."""
        offsets, filters = [], 0
        for weight, dim in zip(weights, dims):
            offsets.append(filters)
            filters += weight.shape[dim]
        return cls(weights, dims, offsets)

    def with_more(self, tensors: Sequence[Tensor], offsets: Sequence[int]) -> "Rows":
        """These rows, and behind them others along dim 0, which share the coefficients at the offsets."""
        dims = [*self.dims, *(0 for _ in tensors)]
        return Rows([*self.tensors, *tensors], dims, [*self.offsets, *offsets])

    def only(self, indices: Sequence[int]) -> "Rows":
        """Some of the rows."""
        if len(indices) == len(self.tensors):
            return self
        return Rows(*([part[i] for i in indices] for part in (self.tensors, self.dims, self.offsets)))

    def cut(self, coefficients: Tensor) -> list[Tensor]:
        """The coefficients of each row, views of the flat tensor."""
        return [
            coefficients[o : o + w.shape[dim]] for w, dim, o in zip(self.tensors, self.dims, self.offsets)
        ]

    def charges(self, magnitude: Tensor, sign: Tensor, norm: Tensor | None) -> list[Charges]:
        """Statistics that lie row behind row as one `Charges` a row."""
        found, start = [], 0
        for weight, dim in zip(self.tensors, self.dims):
            filters = weight.shape[dim]
            own = slice(start, start + filters)
            size = weight.numel() // filters if filters else 0
            found.append(Charges(magnitude[own], sign[own], size, None if norm is None else norm[own]))
            start += filters
        return found

    @property
    def table(self) -> "Table":
        """The rows as kernels on a device read them, made at the first use."""
        if self._table is None:
            self._table = _table_of(self)
        return self._table


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
        filters = [weight.shape[dim] for weight, dim in zip(rows.tensors, rows.dims)]
        sizes = [weight.numel() // n if n else 0 for weight, n in zip(rows.tensors, filters)]
        self.copies = {
            i: torch.empty_like(weight.movedim(dim, 0), memory_format=torch.contiguous_format)
            for i, (weight, dim) in enumerate(zip(rows.tensors, rows.dims))
            if not _filters_are_dense(weight, dim)
        }
        addresses = [self.copies.get(i, weight).data_ptr() for i, weight in enumerate(rows.tensors)]
        starts = accumulate(filters, initial=0)
        self.tiles = send(_tiles(filters, sizes), torch.int32, self.device)
        self.layout = send(list(zip(filters, sizes, rows.offsets, starts)), torch.int64, self.device)
        self.weights = send(addresses, torch.int64, self.device)
        acc = accumulator(self.dtype)
        self.magnitude, self.sign = torch.empty(2, sum(filters), dtype=acc, device=self.device)
        self.done = torch.zeros(len(filters), dtype=torch.int32, device=self.device)
        self._sent_targets = Sent(torch.int64, self.device)
        self._sent_law, self._sent_scale, self._sent_rates = (Sent(acc, self.device) for _ in range(3))
        self._seen: tuple = ()

    def check(self, coefficients: Tensor) -> None:
        """Raises ValueError for coefficients that kernels, which see an address alone, would misread."""
        like = self.magnitude
        if coefficients.dtype is not like.dtype or coefficients.device != like.device:
            found = f"{coefficients.dtype} on {coefficients.device}"
            raise ValueError(f"coefficients are {found}: give {like.dtype} on {like.device}")
        if not coefficients.is_contiguous():
            raise ValueError("coefficients must be contiguous")

    def read(self, rows: Rows) -> None:
        """Renews the dense copies of weights that are not dense."""
        for i, copy in self.copies.items():
            copy.copy_(rows.tensors[i].movedim(rows.dims[i], 0))

    def write(self, rows: Rows) -> None:
        """Hands the dense copies back to the weights."""
        for i, copy in self.copies.items():
            rows.tensors[i].movedim(rows.dims[i], 0).copy_(copy)

    def targets(self, grads: list[Tensor | None], rows: Rows) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """Addresses and turns of the gradients, on the device; and (gradient, copy) where a copy is pulled.

        Raises ValueError for a gradient whose shape, dtype or device is not its weight's.
        """
        there = [grad for grad in grads if grad is not None]
        missing = [i for i, grad in enumerate(grads) if grad is None] if len(there) < len(grads) else []
        seen = missing, list(map(Tensor.data_ptr, there)), list(map(Tensor.stride, there))
        if seen == self._seen:
            return self._sent_targets.last, []
        found = [(None, 1) if grad is None else self._target(i, grad, rows) for i, grad in enumerate(grads)]
        copies = [
            (grad.movedim(dim, 0), target)
            for grad, dim, (target, _) in zip(grads, rows.dims, found)
            if target is not grad
        ]
        self._seen = ()
        sent = self._sent_targets([(0 if t is None else t.data_ptr(), turn) for t, turn in found])
        self._seen = () if copies or capturing(self.device) else seen
        return sent, copies

    def law(self, numbers: tuple[float, float]) -> Tensor:
        """The law's native numbers on the device, [2]."""
        return self._sent_law(list(numbers))

    def scale(self, scale: float | Tensor) -> Tensor:
        """A factor of all rows on the device, 0-dim; a number that is not 1 is one that changes."""
        if isinstance(scale, Tensor) or scale == 1:
            return on_device(scale, self.magnitude)
        return self._sent_scale([float(scale)])[0]

    def rates(self, rates: list[float | Tensor]) -> Tensor:
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


TABLES = 8
"""Tables that are kept for operations on bare tensors, whose rows do not last."""

_tables: OrderedDict[tuple, Table] = OrderedDict()


def _table_of(rows: Rows) -> Table:
    """The table of these addresses, sizes and strides, found again or made."""
    key = tuple(
        (w.data_ptr(), w.shape, w.stride(), dim, offset, w.dtype, w.device)
        for w, dim, offset in zip(rows.tensors, rows.dims, rows.offsets)
    )
    with torch.inference_mode(False):  # what is made here serves steps outside inference mode, too
        table = _tables.pop(key, None) or Table(rows)
    _tables[key] = table
    if len(_tables) > TABLES:
        _tables.popitem(last=False)
    return table


def _tiles(filters: list[int], sizes: list[int]) -> Tensor:
    """Row and first filter of each program's tile, [T, 2]."""
    from efreg.kernels.launch import filters_a_tile

    with torch.device("cpu"):
        per_tile = torch.tensor([filters_a_tile(size) for size in sizes])
        counts = -(torch.tensor(filters) // -per_tile)
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


def by_device_and_dtype(items: Iterable[T], tensor: Callable[[T], Tensor]) -> list[list[T]]:
    """The items, grouped by their tensor's device and dtype: what can go through an operation in one call."""
    groups: dict[tuple, list[T]] = {}
    for item in items:
        groups.setdefault((tensor(item).device, tensor(item).dtype), []).append(item)
    return list(groups.values())
