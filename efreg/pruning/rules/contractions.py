"""Operations that sum products over an axis: what they take in is read, what a weight gives is written."""

import math
from collections.abc import Sequence
from math import prod
from typing import Any

import numpy as np
from torch import Tensor
from torch._ops import OpOverload

from efreg.pruning.ids import Axis
from efreg.pruning.rules import Outputs, rule
from efreg.pruning.watching import Run


@rule("convolution", "_convolution", "mkldnn_convolution", "cudnn_convolution", always=True)
def convolution(
    run: Run,
    out: Tensor,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    transposed: bool = False,
    groups: int = 1,
    **_: Any,
) -> None:
    """Input axis 1 is read by weight axis 1, weight axis 0 writes; transposed the other way round.

    In groups either whole ones go, or the same channel of each: `Ids.take_apart` leaves it open. Depthwise
    each channel is handed through. Kernels reach over space, so ids there freeze.
    """
    for axis in (run.axes(input)[0], *run.axes(input)[2:]):
        run.freeze(axis, "a convolution reaches over them")
    for axis in run.axes(weight)[2:]:
        run.freeze(axis, "they are places in a kernel")
    reads, writes = (0, 1) if transposed else (1, 0)
    space = input if transposed else out
    run.cost(
        space.shape[0] * prod(space.shape[2:]) * prod(weight.shape[2:]),
        *zip(run.axes(weight)[:2], weight.shape),
    )
    if groups > 1:
        channels = _in_groups(run, out, input, weight, groups, transposed)
    else:
        run.contract(input, 1, weight, reads, argument="input")
        channels = run.write(weight, writes)
    if bias is not None:
        run.carry(run.axes(bias)[0])
        channels = run.same(channels, run.axes(bias)[0]) if out.shape[1] > 1 else None
    run.name(out, [None, channels, *[None] * (out.ndim - 2)], loud=run.is_loud(weight))


def _in_groups(run: Run, out: Tensor, input: Tensor, weight: Tensor, groups: int, transposed: bool) -> Axis:
    """Channels of a grouped convolution: [groups, channels a group] on both sides, the same groups.

    The weight has [groups · channels out a group, channels in a group], transposed [groups · in, out a
    group].
    """
    within_in, within_out = input.shape[1] // groups, out.shape[1] // groups
    first, second = run.axes(weight)[:2]
    if within_in == within_out == 1:
        run.carry(first)
    else:
        run.take(input, 1)
        run.read(weight, 0 if transposed else 1)
        run.write(weight, 1 if transposed else 0)
        if not run.is_weight(weight) and (channels := run.axes(input)[1]) is not None:
            run.mask({"input": {1: channels}}, norm=False)
    if transposed:
        group, _ = run.ids.take_apart(run.same(run.axes(input)[1], first), [groups, within_in])
        run.size([group], [groups])
        return run.ids.put_together([group, second], [groups, within_out])
    group, reading = run.ids.take_apart(run.axes(input)[1], [groups, within_in])
    run.size([group], [groups])
    if within_in > 1:
        run.same(reading, second)
    if within_out == 1:
        return run.same(group, first)
    run.same(group, run.ids.take_apart(first, [groups, within_out])[0])
    return first


@rule("torchvision::deform_conv2d")
def deform_convolution(
    run: Run,
    out: Tensor,
    input: Tensor,
    weight: Tensor,
    offset: Tensor,
    mask: Tensor,
    bias: Tensor | None,
    groups: int = 1,
    **_: Any,
) -> None:
    """A convolution at places that are computed."""
    for x in (offset, mask):
        for axis in run.axes(x):
            run.freeze(axis, "places are taken by them")
    convolution(run, out, input, weight, bias, groups=groups)


@rule("mm", "bmm", always=True)
def mm(run: Run, out: Tensor, self: Tensor, mat2: Tensor, **_: Any) -> None:
    _product(run, out, self, mat2, "self", "mat2")


@rule("addmm", always=True)
def addmm(run: Run, out: Tensor, self: Tensor, mat1: Tensor, mat2: Tensor, **_: Any) -> None:
    _product(run, out, mat1, mat2, "mat1", "mat2", self)


@rule("baddbmm", always=True)
def baddbmm(run: Run, out: Tensor, self: Tensor, batch1: Tensor, batch2: Tensor, **_: Any) -> None:
    _product(run, out, batch1, batch2, "batch1", "batch2", self)


@rule("mv")
def mv(run: Run, out: Tensor, self: Tensor, vec: Tensor, **_: Any) -> None:
    _product(run, out, self, vec, "self", "vec")


@rule("addmv")
def addmv(run: Run, out: Tensor, self: Tensor, mat: Tensor, vec: Tensor, **_: Any) -> None:
    _product(run, out, mat, vec, "mat", "vec", self)


@rule("dot", "vdot")
def dot(run: Run, out: Tensor, function: OpOverload, **given: Any) -> None:
    (name, a), (_, b) = ((name, x) for name, x in given.items() if isinstance(x, Tensor))
    run.same(run.axes(a)[0], run.axes(b)[0])
    run.contract(a, 0, argument=name)


@rule("linear", always=True)
def linear(
    run: Run, out: Tensor, input: Tensor, weight: Tensor, bias: Tensor | None = None, **_: Any
) -> None:
    """x Wᵀ + b, where it comes in one piece."""
    run.cost(prod(input.shape[:-1]), *zip(run.axes(weight), weight.shape))
    run.contract(input, input.ndim - 1, weight, 1, argument="input")
    axes = [*run.axes(input)[:-1], run.write(weight, 0)]
    loud = run.is_loud(weight) or (run.is_loud(input) and run.can_go(*axes[:-1], own=True))
    run.name(out, axes, loud=loud | (bias is not None and _add(run, axes, bias)))


def _product(
    run: Run, out: Tensor, a: Tensor, b: Tensor, a_name: str, b_name: str, added: Tensor | None = None
) -> None:
    """a [..., m, k] times b [..., k, n]: k is read, m and n are written where they are axes of weights.

    The product of two weights is a weight: its axes are theirs, and k is between them.
    """
    rows, inner = a.ndim - 2, (a.ndim - 1, max(b.ndim - 2, 0))
    columns = range(inner[1] + 1, b.ndim)
    run.cost(1, *zip(run.axes(a), a.shape), *((run.axes(b)[i], b.shape[i]) for i in columns))
    if run.is_weight(out):
        run.meet((a, inner[0]), (b, inner[1]))
        run.take(a, inner[0])
    elif run.is_weight(b):
        run.contract(a, inner[0], b, inner[1], argument=a_name)
    else:
        run.contract(b, inner[1], a, inner[0], argument=b_name)
    shared = [run.meet((a, i), (b, i)) for i in range(rows)]
    left, right = run.axes(a)[rows], [run.axes(b)[i] for i in columns]
    if not run.is_weight(out):
        run.write(a, rows)
        for i in columns:
            run.write(b, i)
    axes = [*shared, left, *right]
    loud = run.is_loud(a), run.is_loud(b)
    louder = (
        (loud[0] and run.can_go(left, own=True))
        or (loud[1] and run.can_go(*right, own=True))
        or (all(loud) and run.can_go(*shared, own=True))
    )
    run.name(out, axes, loud=louder | (added is not None and _add(run, axes, added)))


def _add(run: Run, axes: list[Axis], added: Tensor) -> bool:
    """Unites axes with those of a bias. Returns whether it sounds where all that writes a channel is zero."""
    loud = run.is_loud(added)
    for i in range(-len(axes), 0):
        there = added.ndim >= -i and added.shape[i] > 1
        if there:
            if run.is_weight(added):
                run.carry(run.axes(added)[i])
            axes[i] = run.same(axes[i], run.axes(added)[i])
        loud = loud or (run.can_go(axes[i], own=True) and not there)
    return loud


@rule(
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_fused_attention_overrideable",
    "_scaled_dot_product_attention_math",
    "_scaled_dot_product_attention_math_for_mps",
    always=True,
)
def attention(
    run: Run,
    out: Outputs,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float | None = None,
    attn_mask: Tensor | None = None,
    attn_bias: Tensor | None = None,
    **_: Any,
) -> None:
    """softmax(q kᵀ · scale) v over [batch, heads, length, channels]; without a scale it is made from the
    width.

    A scale of 1/√width counts as none: some kernels are always told one.
    """
    q, k, v = run.axes(query), run.axes(key), run.axes(value)
    for axis in (q[2], k[2], v[2]):
        run.freeze(axis, "attention goes over them")
    if scale is None or math.isclose(scale, query.shape[3] ** -0.5):
        run.freeze(q[3], "the scale of attention is made from their number")
    run.contract(query, 3, key, 3, argument="query")
    heads = _heads(run, query, key, value)
    mask = attn_mask if attn_mask is not None else attn_bias
    if mask is not None:
        for i, axis in zip(range(-4, 0), (q[0], heads, None, None)):
            if mask.ndim >= -i and mask.shape[i] > 1:
                run.same(run.axes(mask)[i], axis)
    work = query.shape[0] * query.shape[2] * key.shape[2]
    run.cost(work, (heads, query.shape[1]), (q[3], query.shape[3]))
    run.cost(work, (heads, query.shape[1]), (v[3], value.shape[3]))
    run.name(out[0], [q[0], heads, None, v[3]], loud=run.is_loud(value))


def _heads(run: Run, query: Tensor, *others: Tensor) -> Axis:
    """The heads of queries; of keys and values there may be fewer, each for several queries that follow."""
    heads, count = run.axes(query)[1], query.shape[1]
    for x in others:
        own = run.axes(x)[1]
        if x.shape[1] > 1:
            heads = run.same(heads, None if own is None else np.repeat(own, count // x.shape[1]))
        else:
            run.freeze(heads, "they share keys and values")
    return heads


@rule("embedding")
def embedding(run: Run, out: Tensor, weight: Tensor, **_: Any) -> None:
    """Rows by number; the columns are written."""
    run.freeze(run.axes(weight)[0], "they are rows of an embedding")
    run.name(out, [*[None] * (out.ndim - 1), run.write(weight, 1)], loud=False)


@rule("_embedding_bag", "_embedding_bag_forward_only")
def embedding_bag(
    run: Run, out: Outputs, weight: Tensor, mode: int = 0, per_sample_weights: Tensor | None = None, **_: Any
) -> None:
    """Rows by number, summed, averaged or their maximum; the columns are written."""
    run.freeze(run.axes(weight)[0], "they are rows of an embedding")
    run.name(out[0], [None, run.write(weight, 1)], loud=False)


@rule("_trilinear")
def trilinear(
    run: Run,
    out: Tensor,
    i1: Tensor,
    i2: Tensor,
    i3: Tensor,
    expand1: Sequence[int],
    expand2: Sequence[int],
    expand3: Sequence[int],
    sumdim: Sequence[int],
    **_: Any,
) -> None:
    """Σ x W y over `sumdim`, with axes of length 1 put in at `expand`: what is summed is read, the rest
    written.
    """
    factors = []
    for x, expand in ((i1, expand1), (i2, expand2), (i3, expand3)):
        places = iter(range(x.ndim))
        factors.append([(x, None if d in expand else next(places)) for d in range(x.ndim + len(expand))])
    axes = []
    for d, found in enumerate(zip(*factors)):
        there = [(x, i) for x, i in found if i is not None]
        axis = run.meet(*there)
        if d not in sumdim:
            axes.append(axis)
        for x, i in there:
            if run.is_weight(x):
                (run.read if d in sumdim else run.write)(x, i)
            elif d in sumdim:
                run.take(x, i)
    run.name(out, axes, loud=True)
