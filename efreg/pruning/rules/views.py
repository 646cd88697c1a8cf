"""Operations that only move numbers: axes renamed, merged, split, put side by side, taken apart."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from torch import Tensor
from torch._ops import OpOverload

from efreg.pruning.ids import Axis
from efreg.pruning.rules import Outputs, rule
from efreg.pruning.rules.unknown import unknown
from efreg.pruning.watching import Run


def together(run: Run, axis: Axis, count: int) -> Axis:
    """Each `count` positions that follow one another are one: theirs, fewer."""
    if axis is None:
        return None
    table = axis.reshape(-1, count)
    run.ids.unite(np.broadcast_to(table[:, :1], table.shape), table)
    return table[:, 0]


def in_step(run: Run, axis: Axis, parts: int) -> Axis:
    """Of equal parts of an axis the n-th position of each is one: those of a part."""
    if axis is None:
        return None
    table = axis.reshape(parts, -1)
    run.ids.unite(np.broadcast_to(table[:1], table.shape), table)
    return table[0]


@rule("view", "_unsafe_view", "_reshape_alias", "reshape", "_reshape_copy", "view_copy")
def view(run: Run, out: Tensor, self: Tensor, **_: Any) -> None:
    """Merged axes repeat their ids; of split axes one carries them (groups.md): see `Ids.take_apart`."""
    axes = reshaped(run, run.axes(self), self.shape, out.shape)
    run.name(out, axes)
    run.size(axes, out.shape)


def reshaped(run: Run, axes: Sequence[Axis], before: Sequence[int], after: Sequence[int]) -> list[Axis]:
    """The axes of a row-major view from one shape to another.

    Both are taken apart at each other's borders, then put together; where these do not nest, ids freeze.
    """
    pieces: list[Axis] = []
    lengths: list[int] = []
    borders = sorted({*_borders(before), *_borders(after)})
    if 0 in (*before, *after) or any(high % low for low, high in pairwise(borders)):
        for axis in axes:
            run.freeze(axis, "a view mixes its axes")
        return [None] * len(after)
    for axis, (low, high) in zip(axes, _spans(before)):
        inside = [border for border in borders if low <= border <= high]
        sizes = [inside[k] // inside[k - 1] for k in range(len(inside) - 1, 0, -1)]
        lengths += sizes
        pieces += run.ids.take_apart(axis, sizes) if len(sizes) > 1 else [axis] * len(sizes)
    merged = []
    for low, high in _spans(after):
        count = sum(low < border <= high for border in borders)
        merged.append(run.ids.put_together(pieces[:count], lengths[:count]) if count else None)
        pieces, lengths = pieces[count:], lengths[count:]
    return merged


def _borders(shape: Sequence[int]) -> list[int]:
    """1, and the products of the last one, two, three ... lengths."""
    return np.cumprod([1, *shape[::-1]]).tolist()


def _spans(shape: Sequence[int]) -> list[tuple[int, int]]:
    """Of each axis its borders, first axis first."""
    borders = _borders(shape)
    return list(pairwise(borders))[::-1]


@rule("as_strided")
def as_strided(
    run: Run,
    out: Tensor,
    function: OpOverload,
    self: Tensor,
    size: Sequence[int],
    stride: Sequence[int],
    **given: Any,
) -> None:
    """The same numbers in the same places, as where pooling lays its output out anew; else nobody knows."""
    axes = run.axes(self)  # in place the strides are the new ones already
    same = len(axes) == len(size) and all(axis is None or len(axis) == n for axis, n in zip(axes, size))
    if same and all(n == 1 or a == b for n, a, b in zip(size, stride, self.stride())):
        run.name(out, axes)
    else:
        unknown(run, out, function, self=self)


@rule("permute")
def permute(run: Run, out: Tensor, self: Tensor, dims: Sequence[int], **_: Any) -> None:
    axes = run.axes(self)
    run.name(out, [axes[d] for d in dims])


@rule("transpose")
def transpose(run: Run, out: Tensor, self: Tensor, dim0: int, dim1: int, **_: Any) -> None:
    axes = list(run.axes(self))
    axes[dim0], axes[dim1] = axes[dim1], axes[dim0]
    run.name(out, axes)


@rule("t")
def t(run: Run, out: Tensor, self: Tensor, **_: Any) -> None:
    run.name(out, run.axes(self)[::-1])


@rule("unsqueeze")
def unsqueeze(run: Run, out: Tensor, self: Tensor, dim: int, **_: Any) -> None:
    axes = list(run.axes(self))
    axes.insert(dim % out.ndim, None)
    run.name(out, axes)


@rule("squeeze")
def squeeze(run: Run, out: Tensor, self: Tensor, dim: int | None = None, **_: Any) -> None:
    """Axes of length 1 go. In place the shape is the new one already, which says which."""
    axes = run.axes(self)
    if out is not self:
        dims = range(self.ndim) if dim is None else [dim] if isinstance(dim, int) else dim
        gone = {d % self.ndim for d in dims if self.shape[d] == 1}
    elif isinstance(dim, int):
        gone = {dim % len(axes)} if len(axes) > out.ndim else set()
    else:
        gone = set(range(len(axes)))
        for axis in axes:
            run.freeze(axis, "axes are squeezed in place")
        axes = [None] * out.ndim
    run.name(out, [axis for i, axis in enumerate(axes) if i not in gone])


@rule("expand", always=True)
def expand(run: Run, out: Tensor, self: Tensor, **_: Any) -> None:
    """New axes, and those that were of length 1, go with whatever they meet."""
    axes = [None] * (out.ndim - self.ndim) + list(run.axes(self))
    before = [1] * (out.ndim - self.ndim) + list(self.shape)
    run.name(out, [run.ids.fresh(n) if m < n else axis for axis, m, n in zip(axes, before, out.shape)])
    run.size(run.axes(out), out.shape)


@rule("repeat")
def repeat(run: Run, out: Tensor, self: Tensor, **_: Any) -> None:
    """Ids repeated."""
    axes = [None] * (out.ndim - self.ndim) + list(run.axes(self))
    run.name(
        out, [None if axis is None else np.tile(axis, n // len(axis)) for axis, n in zip(axes, out.shape)]
    )


@rule("flip")
def flip(run: Run, out: Tensor, self: Tensor, dims: Sequence[int] = (), **_: Any) -> None:
    axes = list(run.axes(self))
    for d in dims:
        axis = axes[d]
        axes[d] = None if axis is None else axis[::-1]
    run.name(out, axes)


@rule("roll")
def roll(
    run: Run, out: Tensor, self: Tensor, shifts: Sequence[int], dims: Sequence[int] = (), **_: Any
) -> None:
    """Exact along axes without ids."""
    for d in dims or range(self.ndim):
        run.freeze(run.axes(self)[d], "they are rolled along their axis")
    run.name(out, run.axes(self))


@rule("cat")
def cat(run: Run, out: Tensor, tensors: Sequence[Tensor], dim: int = 0, **_: Any) -> None:
    """Ids side by side; what cannot go beside what can gets frozen ids of its own."""
    parts = [x for x in tensors if x.ndim == out.ndim]
    axes = [
        run.same(*(run.axes(x)[i] for x in parts)) if i != dim % out.ndim else None for i in range(out.ndim)
    ]
    pieces = [(run.axes(x)[dim], x.shape[dim]) for x in parts]
    if any(piece is not None for piece, _ in pieces):
        axes[dim % out.ndim] = np.concatenate([_known(run, piece, length) for piece, length in pieces])
    beside = run.can_go(*(axis for i, axis in enumerate(axes) if i != dim % out.ndim))
    run.name(out, axes, loud=any(run.is_loud(x) for x in parts if beside or run.can_go(run.axes(x)[dim])))


def _known(run: Run, axis: Axis, length: int) -> np.ndarray:
    if axis is None:
        axis = run.ids.fresh(length)
        run.freeze(axis, "they are concatenated with channels")
    return axis


@rule("stack")
def stack(run: Run, out: Tensor, tensors: Sequence[Tensor], dim: int = 0, **_: Any) -> None:
    """The tensors' axes are united; the new one is a fixed number."""
    axes = [run.same(*(run.axes(x)[i] for x in tensors)) for i in range(out.ndim - 1)]
    axes.insert(dim % out.ndim, None)
    run.name(out, axes, loud=any(run.is_loud(x) for x in tensors))


@rule("split", "unsafe_split")
def split(run: Run, out: Sequence[Tensor], self: Tensor, dim: int = 0, **_: Any) -> None:
    """Equal parts go in step, the n-th of each with the n-th of the others: their number is fixed."""
    lengths = [x.shape[dim] for x in out]
    if len(set(lengths)) == 1:
        in_step(run, run.axes(self)[dim], len(out))
    _parts(run, out, self, dim, lengths)


@rule("split_with_sizes", "unsafe_split_with_sizes")
def split_with_sizes(run: Run, out: Sequence[Tensor], self: Tensor, dim: int = 0, **_: Any) -> None:
    """Ids taken apart where the network says; equal parts in step."""
    split(run, out, self, dim)


def _parts(run: Run, out: Sequence[Tensor], self: Tensor, dim: int, lengths: Sequence[int]) -> None:
    whole = run.axes(self)[dim]
    run.size([whole], [self.shape[dim]])
    bounds = np.cumsum([0, *lengths])
    parts = [None if whole is None else whole[low:high] for low, high in pairwise(bounds)]
    run.size(parts, lengths)
    for x, part in zip(out, parts):
        run.name(x, [part if i == dim % self.ndim else axis for i, axis in enumerate(run.axes(self))])


@rule("unbind")
def unbind(run: Run, out: Sequence[Tensor], self: Tensor, dim: int = 0, **_: Any) -> None:
    run.freeze(run.axes(self)[dim], "the network takes them one by one")
    for x in out:
        run.name(x, [axis for i, axis in enumerate(run.axes(self)) if i != dim % self.ndim])


@rule("select")
def select(run: Run, out: Tensor, self: Tensor, dim: int, index: int, **_: Any) -> None:
    _take_one(run, run.axes(self)[dim], index)
    run.name(out, [axis for i, axis in enumerate(run.axes(self)) if i != dim % self.ndim])


def _take_one(run: Run, axis: Axis, index: int) -> None:
    """What is taken by its number stays, and so do those that it is counted by: before it, or behind it."""
    if axis is not None:
        counted = axis[index:] if index < 0 else axis[: index + 1]
        run.freeze(counted, "the network takes one of them by its number")


@rule("slice")
def slice_(
    run: Run,
    out: Tensor,
    self: Tensor,
    dim: int = 0,
    start: int | None = None,
    end: int | None = None,
    step: int = 1,
    **_: Any,
) -> None:
    """Some of the ids; every second one goes in step with those between."""
    axes = list(run.axes(self))
    axis, length = axes[dim], self.shape[dim]
    if axis is not None and out.shape[dim] == 1 < length:
        _take_one(run, axis, start or 0)
    elif axis is not None and out.shape[dim] < length:
        if step > 1 and length % step == 0:
            together(run, axis, step)
        elif step > 1:
            run.freeze(axis, f"every {step}th of them is taken")
        begin = min(max((start or 0) + (length if (start or 0) < 0 else 0), 0), length)
        axes[dim] = axis[begin::step][: out.shape[dim]]
        lengths = [out.shape[dim], length, begin, begin + out.shape[dim]]
        run.size([axes[dim], axis, axis[:begin] if begin else None, axis[: lengths[3]]], lengths)
    run.name(out, axes)


@rule("pixel_shuffle")
def pixel_shuffle(run: Run, out: Tensor, self: Tensor, upscale_factor: int, **_: Any) -> None:
    """C · r² channels become C: the r² of each go together."""
    *rest, channels = run.axes(self)[:-2]
    run.name(out, [*rest, together(run, channels, upscale_factor**2), *_space(run, self)])


@rule("pixel_unshuffle")
def pixel_unshuffle(run: Run, out: Tensor, self: Tensor, downscale_factor: int, **_: Any) -> None:
    """C channels become C · r²: each repeats."""
    *rest, channels = run.axes(self)[:-2]
    channels = None if channels is None else np.repeat(channels, downscale_factor**2)
    run.name(out, [*rest, channels, *_space(run, self)])


@rule("channel_shuffle", "native_channel_shuffle")
def channel_shuffle(run: Run, out: Tensor, self: Tensor, groups: int, **_: Any) -> None:
    """A view as [groups, C / groups], transposed."""
    batch, channels, *rest = run.axes(self)
    sizes = [groups, self.shape[1] // groups]
    parts = run.ids.take_apart(channels, sizes)
    run.name(out, [batch, run.ids.put_together(parts[::-1], sizes[::-1]), *rest])


def _space(run: Run, x: Tensor) -> list[Axis]:
    for axis in run.axes(x)[-2:]:
        run.freeze(axis, "they lie along a spatial axis")
    return [None, None]


@rule("unfold")
def unfold(run: Run, out: Tensor, self: Tensor, dimension: int, **_: Any) -> None:
    """Windows along one axis, which become the last."""
    axes = list(run.axes(self))
    run.freeze(axes[dimension], "windows are taken along them")
    axes[dimension] = None
    run.name(out, [*axes, None])


@rule("diagonal")
def diagonal(run: Run, out: Tensor, self: Tensor, dim1: int = 0, dim2: int = 1, **_: Any) -> None:
    """Two axes go, the diagonal becomes the last."""
    gone = {dim1 % self.ndim, dim2 % self.ndim}
    for d in gone:
        run.freeze(run.axes(self)[d], "a diagonal is taken of them")
    run.name(out, [*(axis for i, axis in enumerate(run.axes(self)) if i not in gone), None])


@rule("trace")
def trace(run: Run, out: Tensor, self: Tensor, **_: Any) -> None:
    for axis in run.axes(self):
        run.freeze(axis, "a diagonal is taken of them")


@rule("diag_embed")
def diag_embed(
    run: Run, out: Tensor, self: Tensor, offset: int = 0, dim1: int = -2, dim2: int = -1, **_: Any
) -> None:
    """The last axis becomes the diagonal of two."""
    run.freeze(run.axes(self)[-1], "they become a diagonal")
    axes = list(run.axes(self)[:-1])
    for d in sorted((dim1 % out.ndim, dim2 % out.ndim)):
        axes.insert(d, None)
    run.name(out, axes)


@rule("_pack_padded_sequence")
def pack(run: Run, out: Outputs, input: Tensor, **_: Any) -> None:
    """Sequences end to end: [batch, length, ...] or [length, batch, ...] to [sum of lengths, ...]."""
    for axis in run.axes(input)[:2]:
        run.freeze(axis, "sequences are packed along them")
    run.name(out[0], [None, *run.axes(input)[2:]])


@rule("_pad_packed_sequence")
def unpack(run: Run, out: Outputs, data: Tensor, padding_value: float = 0, **_: Any) -> None:
    run.freeze(run.axes(data)[0], "sequences are packed along them")
    run.name(out[0], [None, None, *run.axes(data)[1:]], loud=bool(padding_value) or run.is_loud(data))
