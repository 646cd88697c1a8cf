"""What depends on all places of an axis: exact along axes without ids; a sum over channels reads them,
exactly.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._pytree import tree_leaves

from efreg.pruning.rules import Outputs, name_of, rule
from efreg.pruning.rules.norms import dims_of, mix, name_reduced
from efreg.pruning.rules.pointwise import pointwise, tried
from efreg.pruning.rules.views import in_step
from efreg.pruning.watching import Run


@rule("sum", "nansum")
def sum_(run: Run, out: Tensor, self: Tensor, dim: int | Sequence[int] | None = None, **_: Any) -> None:
    """Channels that are summed are read."""
    dims = dims_of(dim, self)
    for d in dims:
        if run.axes(self)[d] is not None:
            run.contract(self, d, argument="self")
    name_reduced(run, out, self, dims)


@rule(
    *("amax", "amin", "max", "min", "argmax", "argmin", "aminmax", "median", "nanmedian"),
    *("prod", "logsumexp", "all", "any", "count_nonzero", "histc"),
)
def extremes(
    run: Run,
    out: Tensor | Outputs,
    function: OpOverload,
    dim: int | Sequence[int] | None = None,
    **given: Any,
) -> None:
    """An axis that goes: frozen. Of two tensors max and min are pointwise."""
    x, *more = (x for x in given.values() if isinstance(x, Tensor))
    if more:
        pointwise(run, out, function, **given)
        return
    dims = dims_of(dim, x)
    for d in dims:
        run.freeze(run.axes(x)[d], f"{name_of(function)} is taken over them")
    if len(dims) < x.ndim:
        for each, loud in _outputs(run, out, function, {**given, "dim": dim}):
            name_reduced(run, each, x, dims, loud=loud)


@rule("kthvalue", "mode")
def of_rank(run: Run, out: Tensor | Outputs, function: OpOverload, dim: int = -1, **given: Any) -> None:
    extremes(run, out, function, dim, **given)


@rule(
    *("_softmax", "_log_softmax", "_safe_softmax", "sort", "argsort", "topk"),
    *("cumsum", "cumprod", "cummax", "cummin", "logcumsumexp"),
)
def along(run: Run, out: Tensor | Outputs, function: OpOverload, dim: int = -1, **given: Any) -> None:
    """An axis that stays, every place of which depends on the others: frozen."""
    x = next(x for x in given.values() if isinstance(x, Tensor))
    run.freeze(run.axes(x)[dim], f"{name_of(function)} goes over them")
    for each, loud in _outputs(run, out, function, {**given, "dim": dim}):
        axes = [axis if n == m else None for axis, n, m in zip(run.axes(x), each.shape, x.shape)]
        run.name(each, axes, loud=loud)


@rule("linalg_cross")
def cross(
    run: Run,
    out: Tensor | Outputs,
    function: OpOverload,
    self: Tensor,
    other: Tensor,
    dim: int = -1,
    **_: Any,
) -> None:
    """The product of vectors of three."""
    for x in (self, other):
        run.freeze(run.axes(x)[dim], "they are coordinates in space")
    pointwise(run, out, function, self=self, other=other, dim=dim)


def _outputs(run: Run, out: Tensor | Outputs, function: OpOverload, given: dict) -> list[tuple[Tensor, bool]]:
    """The operation's outputs, and which are loud: what is zero in two places of each axis is tried."""

    def probe(x: Tensor) -> Tensor:
        return torch.full((2,) * x.ndim, 1.5 if run.is_loud(x) else 0, dtype=x.dtype)

    found = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
    zeros = [bool((x == 0).all()) for x in tried(function, given, probe)] or [False] * len(found)
    return [(x, not zero or not x.is_floating_point()) for x, zero in zip(found, zeros)]


@rule("_fft_r2c", "_fft_c2r", "_fft_c2c")
def fourier(run: Run, out: Tensor, self: Tensor, dim: Sequence[int], **_: Any) -> None:
    """Exact along axes that are not transformed."""
    for d in dim:
        run.freeze(run.axes(self)[d], "a Fourier transform goes over them")
    run.name(out, [None if i in dims_of(dim, self) else axis for i, axis in enumerate(run.axes(self))])


@rule("mse_loss", "smooth_l1_loss", "huber_loss", "soft_margin_loss", "binary_cross_entropy")
def loss(
    run: Run,
    out: Tensor,
    function: OpOverload,
    self: Tensor,
    target: Tensor,
    reduction: int = 1,
    **given: Any,
) -> None:
    """Pointwise, or the mean or sum of that over all axes, which mixes them."""
    if not reduction:
        pointwise(run, out, function, self=self, target=target, reduction=reduction, **given)
        return
    _mix_pair(run, f"{name_of(function)} is taken over them", {"self": self, "target": target}, self.ndim)


@rule("_cdist_forward")
def distances(run: Run, out: Tensor, x1: Tensor, x2: Tensor, **_: Any) -> None:
    """‖a − b‖ for all pairs of rows, over the last axis."""
    _mix_pair(run, "a distance is taken over them", {"x1": x1, "x2": x2}, 1)
    for x in (x1, x2):
        for axis in run.axes(x)[:-2]:
            run.freeze(axis, "distances are taken along them")
    run.name(out, [*[None] * (out.ndim - 2), run.axes(x1)[-2], run.axes(x2)[-2]], loud=True)


@rule("dist")
def distance(run: Run, out: Tensor, self: Tensor, other: Tensor, **_: Any) -> None:
    _mix_pair(run, "a distance is taken over them", {"self": self, "other": other}, self.ndim)


def _mix_pair(run: Run, what: str, pair: dict[str, Tensor], count: int) -> None:
    """The last axes of two tensors, which are the same, go into one number."""
    a, b = pair.values()
    last = range(-min(count, a.ndim, b.ndim), 0)
    for i in last:
        if a.shape[i] == b.shape[i]:
            run.same(run.axes(a)[i], run.axes(b)[i])
    mix(run, what, {name: (x, range(-min(count, x.ndim), 0)) for name, x in pair.items()})


@rule("tril", "triu")
def triangle(run: Run, out: Tensor, self: Tensor, **_: Any) -> None:
    for axis in run.axes(self)[-2:]:
        run.freeze(axis, "their places make a triangle")
    run.name(out, run.axes(self))


@rule("glu")
def glu(run: Run, out: Tensor, self: Tensor, dim: int = -1, **_: Any) -> None:
    """a · σ(b) for the halves a and b, which go in step."""
    axes = list(run.axes(self))
    axes[dim] = in_step(run, axes[dim], 2)
    run.name(out, axes)
