"""Operations on each number alone, with broadcasting: axes aligned from the right are the same."""

from collections.abc import Callable
from itertools import count
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._pytree import tree_leaves, tree_map

from efreg.pruning.rules import Outputs, name_of, rule
from efreg.pruning.running import tensors_in
from efreg.pruning.watching import Run


@rule(
    *("pointwise", "copy", "where", "masked_fill", "_to_copy", "hardswish", "floor_divide", "fmod", "lerp"),
    *("complex", "polar", "log_sigmoid_forward", "fake_quantize_per_tensor_affine_cachemask"),
    *("leaky_relu", "elu", "celu", "selu", "hardtanh", "hardsigmoid"),  # older torch has no tag for these
)
def pointwise(run: Run, out: Tensor | Outputs, function: OpOverload, **given: Any) -> None:
    """Axes of equal length are united, of length 1 broadcast; a constant of that length freezes."""
    out = out[0] if isinstance(out, tuple) else out
    inputs = tensors_in(given)
    axes, loud = [], False
    for i in range(-out.ndim, 0):
        axes.append(run.meet(*((x, i) for x in inputs if x.ndim >= -i and x.shape[i] == out.shape[i])))
        loud = loud or (run.can_go(axes[-1]) and not _keeps_zero(run, function, given, i))
    for x in filter(run.is_weight, inputs):
        for axis in run.axes(x):
            run.carry(axis)
        if run.is_weight(out) and x.shape == out.shape:
            run.alike(axes, x)
    run.name(out, axes, loud=loud)


def _keeps_zero(run: Run, function: Callable, given: dict[str, Any], i: int) -> bool:
    """Whether a channel of axis i, zero in the inputs that have it and keep zero, is zero in the output."""

    values = count(1.5, 0.7)  # unequal, so that no two cancel

    def probe(x: Tensor) -> Tensor:
        zero = x.ndim >= -i and run.axes(x)[i] is not None and not run.is_loud(x)
        return torch.full((1,), 0 if zero else next(values), dtype=x.dtype)

    found = tried(function, given, probe)
    return bool(found) and bool((found[0] == 0).all())


def tried(function: Callable, given: dict[str, Any], probe: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """What an operation gives with other tensors; none where it does not take them."""
    try:
        found = function(**tree_map(lambda x: probe(x) if isinstance(x, Tensor) else x, given))
    except (RuntimeError, TypeError, IndexError, NotImplementedError):
        return []
    return [x for x in tree_leaves(found) if isinstance(x, Tensor)]


@rule("_prelu_kernel")
def prelu(run: Run, out: Tensor, self: Tensor, weight: Tensor, **_: Any) -> None:
    """The slopes go with the channels, but they are no part of what these are written by."""
    channels = 1 if self.ndim > 1 else 0
    slopes = run.axes(weight)[channels] if weight.numel() > 1 else None
    axes = list(run.axes(self))
    if slopes is not None:
        axes[channels] = run.same(axes[channels], slopes)
    run.name(out, axes)


@rule(
    "fake_quantize_per_channel_affine_cachemask",
    "_fake_quantize_learnable_per_channel_affine",
)
def in_steps(
    run: Run, out: Tensor | Outputs, self: Tensor, axis: int, scale: Tensor, zero_point: Tensor, **_: Any
) -> None:
    """Each channel along `axis` rounded to multiples of its own scale."""
    axes = list(run.axes(self))
    for x in (scale, zero_point):
        if x.numel() > 1:
            axes[axis] = run.same(axes[axis], run.axes(x)[0])
    for each in out if isinstance(out, (tuple, list)) else (out,):
        run.name(each, axes)


@rule("detach", "alias", "lift_fresh", "rrelu_with_noise", "_conj", "_neg_view")
def unary(run: Run, out: Tensor, function: OpOverload, **given: Any) -> None:
    """One number from one number of the first argument; zero from zero."""
    run.name(out, run.axes(_first(given)))


@rule("bernoulli")
def bernoulli(run: Run, out: Tensor, self: Tensor, p: Tensor | float | None = None, **_: Any) -> None:
    """0 or 1, by a probability that it is given or that the tensor has."""
    run.name(out, run.axes(self), loud=None if p is None else True)


@rule("native_dropout", "_fused_dropout")
def native_dropout(run: Run, out: Outputs, function: OpOverload, **given: Any) -> None:
    """The numbers, and which of them stayed."""
    for each, loud in zip(out, (None, True)):
        run.name(each, run.axes(_first(given)), loud=loud)


@rule("view_as_real")
def view_as_real(run: Run, out: Tensor, self: Tensor, **_: Any) -> None:
    run.name(out, [*run.axes(self), None])


@rule("view_as_complex")
def view_as_complex(run: Run, out: Tensor, self: Tensor, **_: Any) -> None:
    *axes, parts = run.axes(self)
    run.freeze(parts, "they are real and imaginary parts")
    run.name(out, axes)


@rule(
    *("fill", "normal", "uniform", "exponential", "log_normal", "cauchy", "geometric", "random"),
    *("ones_like", "full_like", "rand_like", "randn_like", "randint_like"),
)
def filled(run: Run, out: Tensor, function: OpOverload, **given: Any) -> None:
    """Numbers in the shape of a tensor, which they would follow."""
    run.name(out, run.axes(_first(given)), loud=True)


@rule("zero", "zeros_like", "empty_like")
def zeros_like(run: Run, out: Tensor, self: Tensor, **_: Any) -> None:
    run.name(out, run.axes(self), loud=False)


@rule(
    *("empty", "empty_strided", "new_empty", "new_empty_strided", "zeros", "new_zeros"),
    *("ones", "new_ones", "full", "new_full", "rand", "randn"),
    always=True,
)
def uniform(run: Run, out: Tensor, function: OpOverload, **_: Any) -> None:
    """The same number everywhere, or dice: whatever its axes meet, they go with it."""
    run.name(
        out,
        [run.ids.fresh(n) if n > 1 else None for n in out.shape],
        loud="empty" not in name_of(function) and "zeros" not in name_of(function),
    )
    run.size(run.axes(out), out.shape)


def _first(given: dict[str, Any]) -> Tensor:
    return next(x for x in given.values() if isinstance(x, Tensor))
