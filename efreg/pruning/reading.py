"""Layers that read channels, as products of matrices: what they read at an output's position, their weight.

A row is one position of one image: of a convolution a place in space, of a linear layer a token. G is the
groups of a convolution, O the channels out of each, D what a position reads of each: channels in times places
of the kernel.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor


@dataclass(frozen=True)
class Linear:
    """x Wᵀ, or x W where the weight is `turned`. x: [rows, in]."""

    turned: bool = False
    groups: int = 1

    def matrix(self, weight: Tensor) -> Tensor:
        """The weight as [1, O, D]."""
        return (weight.t() if self.turned else weight)[None]

    def weight(self, matrix: Tensor, shape: Sequence[int]) -> Tensor:
        """The weight of this shape whose matrix this is."""
        return matrix[0].t() if self.turned else matrix[0]

    def inputs(self, x: Tensor, rows: Tensor, shape: Sequence[int], kernel: Sequence[int]) -> Tensor:
        """What these rows of an output read. [rows, 1, D]"""
        return x.reshape(-1, x.shape[-1])[rows, None]

    def outputs(self, out: Tensor, rows: Tensor) -> Tensor:
        """These rows of an output, or of what became of it. [rows, channels]"""
        return out.reshape(-1, out.shape[-1])[rows]

    def channels_at(self, out: Tensor) -> int:
        """The axis of an output that its channels lie on."""
        return out.ndim - 1

    def kept(self, kept: dict[int, Tensor], shape: Sequence[int]) -> Tensor | None:
        """The output's channels that stay where these positions of a weight of this shape do."""
        return kept.get(1 if self.turned else 0)


@dataclass(frozen=True)
class Convolution:
    """A convolution over any number of axes. x: [images, channels, space ...]."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    transposed: bool
    groups: int

    def matrix(self, weight: Tensor) -> Tensor:
        """The weight as [G, O, D]."""
        if self.transposed:
            return weight.unflatten(0, (self.groups, -1)).transpose(1, 2).flatten(2)
        return weight.unflatten(0, (self.groups, -1)).flatten(2)

    def weight(self, matrix: Tensor, shape: Sequence[int]) -> Tensor:
        """The weight of this shape whose matrix this is."""
        if self.transposed:
            matrix = matrix.unflatten(2, (shape[0] // self.groups, -1)).transpose(1, 2)
        return matrix.reshape(tuple(shape))

    def inputs(self, x: Tensor, rows: Tensor, shape: Sequence[int], kernel: Sequence[int]) -> Tensor:
        """What these rows of an output of this shape read, zeros from outside. [rows, G, D]"""
        image, *places = torch.unravel_index(rows, (shape[0], *shape[2:]))
        index, inside = [], torch.ones(len(rows), *[1] * len(kernel), dtype=torch.bool, device=x.device)
        for d, place in enumerate(places):
            source, within = self._sources(d, place, kernel[d], x.shape[2 + d])
            spread = [-1 if i in (0, d + 1) else 1 for i in range(1 + len(kernel))]
            index.append(source.reshape([len(rows) if i == 0 else n for i, n in enumerate(spread)]))
            inside = inside & within.reshape(index[-1].shape)
        at = image.reshape(-1, *[1] * len(kernel)), *index
        read = x.movedim(1, -1)[at] * inside[..., None]  # [rows, kernel ..., channels]
        return read.flatten(1, -2).transpose(1, 2).reshape(len(rows), self.groups, -1)

    def _sources(self, d: int, place: Tensor, size: int, length: int) -> tuple[Tensor, Tensor]:
        """Which positions of the input an output's place reads along axis d, and whether they are inside.

        [rows, kernel]
        """
        steps = torch.arange(size, device=place.device) * self.dilation[d]
        if self.transposed:
            spread = place[:, None] + self.padding[d] - steps
            source = spread.div(self.stride[d], rounding_mode="floor")
            inside = (source * self.stride[d] == spread) & (source >= 0) & (source < length)
        else:
            source = place[:, None] * self.stride[d] - self.padding[d] + steps
            inside = (source >= 0) & (source < length)
        return source.clamp(0, length - 1), inside

    def outputs(self, out: Tensor, rows: Tensor) -> Tensor:
        """These rows of an output, or of what became of it. [rows, channels]"""
        image, place = rows // prod(out.shape[2:]), rows % prod(out.shape[2:])
        return out.flatten(2)[image, :, place]

    def channels_at(self, out: Tensor) -> int:
        """The axis of an output that its channels lie on."""
        return 1

    def kept(self, kept: dict[int, Tensor], shape: Sequence[int]) -> Tensor | None:
        """The output's channels that stay where these positions of a weight of this shape do."""
        if not self.transposed:
            return kept.get(0)
        groups = torch.arange(self.groups)
        if 0 in kept:
            groups = torch.unique(kept[0] // (shape[0] // self.groups)) if self.groups > 1 else groups
        within = kept.get(1, torch.arange(shape[1]))
        return (groups[:, None] * shape[1] + within).flatten()


Reading = Linear | Convolution
