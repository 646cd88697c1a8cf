"""Operations over space that hand each channel on: pooling, upsampling, padding, sampling."""

from collections.abc import Sequence
from math import prod
from typing import Any

import numpy as np
from torch import Tensor
from torch._ops import OpOverload

from efreg.pruning.rules import Outputs, name_of, rule
from efreg.pruning.rules.views import together
from efreg.pruning.watching import Run

PLACES = "they lie along a spatial axis"

POOLS = [
    f"{kind}_pool{d}d"
    for d in (1, 2, 3)
    for kind in (
        "avg",
        "max",
        "adaptive_avg",
        "adaptive_max",
        "_adaptive_avg",
        "fractional_max",
        "mkldnn_max",
    )
]
POOLS += ["max_pool2d_with_indices", "max_pool3d_with_indices"]
RESIZED = [
    f"upsample_{kind}"
    for kind in ("nearest1d", "nearest2d", "nearest3d", "linear1d", "bilinear2d", "trilinear3d", "bicubic2d")
]
RESIZED += [
    f"_upsample_{kind}"
    for kind in ("nearest_exact1d", "nearest_exact2d", "nearest_exact3d", "bilinear2d_aa", "bicubic2d_aa")
]
PADS = [f"{kind}_pad{d}d" for d in (1, 2, 3) for kind in ("reflection", "replication")]


def _space(function: OpOverload) -> int:
    """How many axes are space, as the operation's name says."""
    return next(d for d in (1, 2, 3) if f"{d}d" in name_of(function))


@rule(*POOLS, *RESIZED, *PADS)
def channelwise(run: Run, out: Tensor | Outputs, function: OpOverload, **given: Any) -> None:
    """The last axes, as many as the operation's name says, are space."""
    x = next(x for x in given.values() if isinstance(x, Tensor))
    space = _space(function)
    axes = list(run.axes(x))
    for axis in axes[-space:]:
        run.freeze(axis, PLACES)
    for each in out if isinstance(out, tuple) else (out,):
        places = not each.is_floating_point()  # where a maximum was
        run.name(each, [*axes[:-space], *[None] * space], loud=True if places else None)


@rule("max_unpool2d", "max_unpool3d")
def unpool(run: Run, out: Tensor, function: OpOverload, self: Tensor, indices: Tensor, **_: Any) -> None:
    """To where the maxima were, of the same channels."""
    channels = self.ndim - _space(function) - 1
    axis = run.meet((self, channels), (indices, channels))
    channelwise(run, out, function, self=self)
    axes = [axis if i == channels else other for i, other in enumerate(run.axes(out))]
    run.name(out, axes, loud=run.is_loud(self))


@rule("constant_pad_nd")
def pad(run: Run, out: Tensor, self: Tensor, pad: Sequence[int], value: float = 0, **_: Any) -> None:
    """Padded channels are new and frozen, as in the shortcuts of CIFAR's ResNets."""
    axes = list(run.axes(self))
    for k in range(len(pad) // 2):
        i, (before, after) = self.ndim - 1 - k, pad[2 * k : 2 * k + 2]
        if (axis := axes[i]) is None or not (before or after):
            continue
        if before < 0 or after < 0:
            run.freeze(axis, "they are cropped")
        new = run.ids.fresh(max(before, 0) + max(after, 0))
        run.freeze(new, "they are padded")
        inner = axis[max(-before, 0) : self.shape[i] - max(-after, 0)]
        axes[i] = np.concatenate([new[: max(before, 0)], inner, new[max(before, 0) :]])
    run.name(out, axes, loud=run.is_loud(self) or bool(value))


@rule("grid_sampler_2d", "grid_sampler_3d", "cudnn_grid_sampler")
def grid_sampler(run: Run, out: Tensor, input: Tensor, grid: Tensor, **_: Any) -> None:
    """Places of all channels, taken by coordinates."""
    for axis in (run.axes(input)[0], *run.axes(input)[2:], *run.axes(grid)):
        run.freeze(axis, "places are taken from them")
    run.name(out, [None, run.axes(input)[1], *[None] * (out.ndim - 2)])


@rule("torchvision::roi_align", "torchvision::roi_pool")
def roi_align(run: Run, out: Tensor | Outputs, input: Tensor, rois: Tensor, **_: Any) -> None:
    """Boxes of [batch, channels, height, width], pooled to [boxes, channels, height, width]."""
    for axis in (run.axes(input)[0], *run.axes(input)[2:], *run.axes(rois)):
        run.freeze(axis, "boxes are taken from them")
    for each in out if isinstance(out, tuple) else (out,):
        run.name(each, [None, run.axes(input)[1], *[None] * (each.ndim - 2)])


@rule("im2col")
def im2col(run: Run, out: Tensor, self: Tensor, kernel_size: Sequence[int], **_: Any) -> None:
    """Patches: each channel repeats for every place of the kernel."""
    *batch, channels = run.axes(self)[:-2]
    for axis in run.axes(self)[-2:]:
        run.freeze(axis, PLACES)
    repeated = None if channels is None else np.repeat(channels, prod(kernel_size))
    run.name(out, [*batch, repeated, None])


@rule("col2im")
def col2im(run: Run, out: Tensor, self: Tensor, kernel_size: Sequence[int], **_: Any) -> None:
    """Patches put back: the channels of all places of the kernel are one."""
    *batch, columns, places = run.axes(self)
    run.freeze(places, PLACES)
    channels = together(run, columns, prod(kernel_size))
    run.name(out, [*batch, channels, None, None])
