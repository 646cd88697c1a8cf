"""Norms and means: over each channel alone they are exact, over channels they mix them."""

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
from torch import Tensor
from torch._ops import OpOverload

from efreg.pruning.rules import Outputs, name_of, rule
from efreg.pruning.watching import Run

MIXED = "a norm is taken over them"


def mix(run: Run, what: str, arguments: dict[str, tuple[Tensor, Collection[int]]]) -> None:
    """These axes of the arguments, where they have ids, share a number: they go only by approximation."""
    masked: dict[str, dict[int, np.ndarray]] = {}
    for name, (x, axes) in arguments.items():
        for i in axes:
            if (axis := run.axes(x)[i]) is not None:
                run.freeze(axis, what, soft=True)
                masked.setdefault(name, {})[i % x.ndim] = axis
    if masked:
        run.mask(masked, norm=True)


@rule(
    "native_batch_norm",
    "_native_batch_norm_legit",
    "_native_batch_norm_legit_no_training",
    "_native_batch_norm_legit_functional",
    "cudnn_batch_norm",
    "miopen_batch_norm",
    "batch_norm_with_update",
    "_batch_norm_with_update",
    "_batch_norm_no_update",
)
def batch_norm(
    run: Run,
    out: Outputs,
    input: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    training: bool = False,
    **_: Any,
) -> None:
    """Axis 1 with scale, shift and statistics; whatever else has ids is mixed, as of standardised weights.

    (0 − μ) / σ is zero by its own statistics, and with a scale and a shift that are zero.
    """
    axes = list(run.axes(input))
    mix(run, MIXED, {"input": (input, [i for i in range(input.ndim) if i != 1])})
    if input.shape[1] > 1:
        for x in (weight, bias, running_mean, running_var):
            if x is not None:
                axes[1] = run.same(axes[1], run.axes(x)[0])
        for x in (weight, bias):
            if x is not None:
                run.carry(run.axes(x)[0])
    own = weight is None and training
    run.name(out[0], axes, loud=None if own else weight is None)


@rule("native_layer_norm", "_fused_rms_norm", "rms_norm")
def layer_norm(
    run: Run,
    out: Tensor | Outputs,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    **_: Any,
) -> None:
    """The last axes share a mean, in whole channels of the others."""
    axes = list(run.axes(input))
    normed = range(-len(normalized_shape), 0)
    affine = {name: x for name, x in (("weight", weight), ("bias", bias)) if x is not None}
    for x in affine.values():
        for i in normed:
            if x.shape[i] > 1:
                axes[i] = run.same(axes[i], run.axes(x)[i])
                run.carry(run.axes(x)[i])
    mix(run, MIXED, {"input": (input, normed), **{name: (x, normed) for name, x in affine.items()}})
    within, apart = axes[-len(normalized_shape) :], axes[: -len(normalized_shape)]
    loud = (weight is None and run.can_go(*within)) or (bias is not None and run.can_go(*apart, own=True))
    run.name(out[0] if isinstance(out, tuple) else out, axes, loud=loud)


@rule("native_group_norm")
def group_norm(
    run: Run,
    out: Outputs,
    input: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    group: int = 1,
    **_: Any,
) -> None:
    """[groups, channels a group]: whole groups go exactly, the channels of one share a mean."""
    axes = list(run.axes(input))
    for axis in (axes[0], *axes[2:]):
        run.freeze(axis, MIXED)
    affine = {name: x for name, x in (("weight", weight), ("bias", bias)) if x is not None}
    for x in affine.values():
        if input.shape[1] > 1:
            axes[1] = run.same(axes[1], run.axes(x)[0])
            run.carry(run.axes(x)[0])
    if axes[1] is not None:
        groups, within = run.ids.take_apart(axes[1], [group, input.shape[1] // group])
        run.size([groups], [group])
        run.freeze(within if group > 1 else axes[1], MIXED, soft=True)
        run.mask({"input": {1: axes[1]}, **{name: {0: axes[1]} for name in affine}}, norm=True)
    run.name(out[0], axes, loud=weight is None)


@rule("_weight_norm_interface", "_weight_norm")
def weight_norm(run: Run, out: Tensor | Outputs, v: Tensor, g: Tensor, dim: int = 0, **_: Any) -> None:
    """g · v / ‖v‖ over all axes but `dim`: those are mixed."""
    axes = list(run.axes(v))
    mix(run, MIXED, {"v": (v, [i for i in range(v.ndim) if i != dim % v.ndim])})
    axes[dim] = run.same(axes[dim], run.axes(g)[dim]) if v.shape[dim] > 1 else None
    run.name(out[0] if isinstance(out, tuple) else out, axes, loud=True)


@rule("mean", "var", "std", "var_mean", "std_mean", "linalg_vector_norm", "norm")
def moments(
    run: Run,
    out: Tensor | Outputs,
    function: OpOverload,
    dim: int | Sequence[int] | None = None,
    **given: Any,
) -> None:
    """Exact along axes without ids; over channels mixed."""
    name, x = next(iter(given.items()))
    what = name_of(function).removeprefix("linalg_vector_")
    mix(run, f"a {what} is taken over them", {name: (x, dims_of(dim, x))})
    for each in out if isinstance(out, tuple) else (out,):
        name_reduced(run, each, x, dims_of(dim, x))


def dims_of(dim: int | Sequence[int] | None, x: Tensor) -> set[int]:
    """The axes that a reduction goes over, counted from the first; all where none is named."""
    dims = [dim] if isinstance(dim, int) else dim or range(x.ndim)
    return {d % x.ndim for d in dims}


def name_reduced(run: Run, out: Tensor, x: Tensor, dims: set[int], **more: Any) -> None:
    """The axes that are left after a reduction, with or without places kept for those that went."""
    axes = [None if i in dims else axis for i, axis in enumerate(run.axes(x))]
    kept = out.ndim == x.ndim
    run.name(out, [axis for i, axis in enumerate(axes) if kept or i not in dims], **more)
