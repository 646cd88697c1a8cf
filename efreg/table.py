"""The multi-tensor table: tensors that go through an operation together, and where each filter lies."""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, TypeVar

from torch import Tensor

from efreg.laws import Charges

T = TypeVar("T")


class Rows(NamedTuple):
    """Tensors of one device and dtype, a row each.

    Filter n of tensors[i] lies along dims[i] and has the coefficient coefficients[offsets[i] + n]; rows of
    one layer share an offset.
    """

    tensors: list[Tensor]
    dims: list[int]
    offsets: list[int]

    @classmethod
    def of(cls, weights: Sequence[Tensor], dims: Sequence[int]) -> "Rows":
        """A row for each weight, the coefficients lying weight behind weight."""
        offsets, filters = [], 0
        for weight, dim in zip(weights, dims):
            offsets.append(filters)
            filters += weight.shape[dim]
        return cls(list(weights), list(dims), offsets)

    def only(self, indices: Sequence[int]) -> "Rows":
        """Some of the rows."""
        return (
            self
            if len(indices) == len(self.tensors)
            else Rows(*([part[i] for i in indices] for part in self))
        )

    def cut(self, coefficients: Tensor) -> list[Tensor]:
        """The coefficients of each row, views of the flat tensor."""
        return [coefficients[o : o + w.shape[dim]] for w, dim, o in zip(*self)]

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


def by_device_and_dtype(items: Iterable[T], tensor: Callable[[T], Tensor]) -> list[list[T]]:
    """The items, grouped by their tensor's device and dtype: what can go through an operation in one call."""
    groups: dict[tuple, list[T]] = {}
    for item in items:
        groups.setdefault((tensor(item).device, tensor(item).dtype), []).append(item)
    return list(groups.values())
