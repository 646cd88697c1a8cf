"""Places taken or written to by number: exact along axes without ids; the other axes are handed on."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from efreg.pruning.ids import Axis
from efreg.pruning.rules import rule
from efreg.pruning.watching import Run

TAKEN, WRITTEN = "they are taken by index", "they are written to by index"


@rule("index")
def index(run: Run, out: Tensor, self: Tensor, indices: Sequence[Tensor | None], **_: Any) -> None:
    """x[i, :, j]: the axes that are indexed freeze, those of the indices come in their place."""
    run.name(out, _indexed(run, self, indices, TAKEN))


@rule("index_put", "_index_put_impl", "_unsafe_index_put")
def index_put(
    run: Run, out: Tensor, self: Tensor, indices: Sequence[Tensor | None], values: Tensor, **_: Any
) -> None:
    """x[i, :, j] = values, which broadcast."""
    axes = _indexed(run, self, indices, WRITTEN)
    for i in range(-values.ndim, 0):
        if values.shape[i] > 1:
            run.same(axes[i] if len(axes) >= -i else None, run.axes(values)[i])
    run.name(out, run.axes(self), loud=run.is_loud(self) or run.is_loud(values))


def _indexed(run: Run, x: Tensor, indices: Sequence[Tensor | None], why: str) -> list[Axis]:
    """The axes of x[indices]. Where others lie between those that are indexed, the indices' come first."""
    left, places = list(run.axes(x)), []
    there: list[Axis] = []
    for found in indices:
        if found is None:
            there, left = there + left[:1], left[1:]
            continue
        is_mask = found.dtype.itemsize == 1
        width = found.ndim if is_mask else 1
        here, left = left[:width], left[width:]
        places.append((len(there), 1 if is_mask else found.ndim))
        for axis in here:
            run.freeze(axis, why)
        for axis in run.axes(found):
            run.freeze(axis, "they are used as an index")
    starts = {start for start, _ in places}
    start = starts.pop() if len(starts) == 1 else 0
    inner = [None] * max((count for _, count in places), default=0)
    return [*there[:start], *inner, *there[start:], *left]


@rule("index_select")
def index_select(run: Run, out: Tensor, self: Tensor, dim: int, **_: Any) -> None:
    axes = list(run.axes(self))
    run.freeze(axes[dim], TAKEN)
    axes[dim] = None
    run.name(out, axes)


@rule("gather")
def gather(run: Run, out: Tensor, self: Tensor, dim: int, index: Tensor, **_: Any) -> None:
    """Along `dim` places are taken; along the others, where each place takes its own, ids are handed on."""
    run.name(out, _beside(run, dim, TAKEN, self, index))


@rule("scatter", "scatter_add", "scatter_reduce")
def scatter(
    run: Run,
    out: Tensor,
    self: Tensor,
    dim: int,
    index: Tensor,
    src: Tensor | None = None,
    value: float = 0,
    **_: Any,
) -> None:
    """Along `dim` places are written to, along the others each by its own."""
    given = [x for x in (self, src) if x is not None]
    axes = _beside(run, dim, WRITTEN, *given, index)
    run.name(out, axes, loud=any(map(run.is_loud, given)) or bool(value))


@rule("index_add", "index_copy", "index_reduce")
def index_add(run: Run, out: Tensor, self: Tensor, dim: int, source: Tensor, **_: Any) -> None:
    axes = _beside(run, dim, WRITTEN, self, source)
    run.name(out, axes, loud=run.is_loud(self) or run.is_loud(source))


@rule("index_fill")
def index_fill(run: Run, out: Tensor, self: Tensor, dim: int, value: Tensor, **_: Any) -> None:
    run.name(out, _beside(run, dim, WRITTEN, self), loud=run.is_loud(self) or bool(value))


def _beside(run: Run, dim: int, why: str, *tensors: Tensor) -> list[Axis]:
    """The axes but `dim`, which are the same for all the tensors."""
    axes: list[Axis] = []
    for i, length in enumerate(tensors[0].shape):
        if i == dim % tensors[0].ndim or any(x.shape[i] != length for x in tensors):
            for x in tensors:
                run.freeze(run.axes(x)[i], why)
            axes.append(None)
        else:
            axes.append(run.meet(*((x, i) for x in tensors)))
    return axes
