"""Ids of positions along axes, and which of them are the same channel: union-find, whole arrays at a time.

An axis is an array of ids, one a position, or None where nothing about it can change (batch, space, time, an
input of the network). A split is a question that stays open while a network is watched: an axis of n1 · n2
positions was taken apart into two of n1 and n2, or the other way round, and either may carry the channels.
"""

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

Axis = np.ndarray | None
"""The ids along an axis, int64 [length], or None."""

HARD = 1 << 40
"""Codes of reasons from here up hold in any case, those below only where nothing approximate is allowed."""

REST = "its channels come in a rectangle, of which another axis is cut"


@dataclass(frozen=True)
class Split:
    """whole, reshaped to the lengths of `parts` in row-major order, is the product of the parts.

    made: whether it was put together from them, instead of taken apart.
    """

    whole: np.ndarray
    sizes: tuple[int, ...]
    parts: tuple[Axis, ...]
    made: bool = False


class Ids:
    """All ids of a network that is watched."""

    def __init__(self) -> None:
        self._parent = np.empty(0, np.int64)
        self._code = np.empty(0, np.int64)  # of a class's root: why it cannot go, 0 where it can
        self._loud = np.empty(
            0, bool
        )  # of a class's root: whether it may be non-zero though its weights are zero
        self._carries = np.empty(0, bool)  # of a class's root: chosen to carry a split
        self._looked = np.empty(0, bool)  # of an id: whether something reads it
        self._count = 0
        self._reasons: list[str] = []
        self._splits: list[Split] = []
        self._known: dict[Hashable, Any] = {}  # what was taken apart or put together before

    def __len__(self) -> int:
        return self._count

    def copy(self) -> "Ids":
        """The same ids, which go on apart."""
        other = Ids.__new__(Ids)
        other.__dict__.update(self.__dict__)
        other._parent, other._code = self._parent.copy(), self._code.copy()
        other._loud, other._carries = self._loud.copy(), self._carries.copy()
        other._reasons, other._splits = list(self._reasons), list(self._splits)
        return other

    def fresh(self, length: int) -> np.ndarray:
        """New ids, each a class of its own."""
        start, self._count = self._count, self._count + length
        if self._count > len(self._parent):
            more = max(length, len(self._parent), 1024)
            size = len(self._parent)
            self._parent = np.concatenate([self._parent, np.arange(size, size + more)])
            self._code = np.concatenate([self._code, np.zeros(more, np.int64)])
            self._loud = np.concatenate([self._loud, np.zeros(more, bool)])
            self._carries = np.concatenate([self._carries, np.zeros(more, bool)])
            self._looked = np.concatenate([self._looked, np.zeros(more, bool)])
        return np.arange(start, self._count)

    def find(self, ids: np.ndarray) -> np.ndarray:
        """The root of each id's class."""
        roots = self._parent[ids]
        while ((above := self._parent[roots]) != roots).any():
            roots = above
        self._parent[ids] = roots
        return roots

    def unite(self, a: np.ndarray, b: np.ndarray) -> None:
        """Entry by entry, the two are the same channel."""
        a, b = np.ravel(a), np.ravel(b)
        while True:
            a, b = self.find(a), self.find(b)
            apart = a != b
            if not apart.any():
                return
            a, b = a[apart], b[apart]
            low, high = np.minimum(a, b), np.maximum(a, b)
            np.minimum.at(self._parent, high, low)
            low = self._parent[high]
            np.maximum.at(self._code, low, self._code[high])
            np.logical_or.at(self._loud, low, self._loud[high])
            np.logical_or.at(self._carries, low, self._carries[high])

    def same(self, axes: Sequence[Axis], why: str) -> Axis:
        """Axes of one length are the same; what meets an axis without ids cannot go."""
        known = [axis for axis in axes if axis is not None]
        if not known:
            return None
        first = known[0]
        for axis in known[1:]:
            if axis is not first:
                self.unite(first, axis)
        if len(known) < len(axes):
            self.freeze(first, why)
        return first

    def freeze(self, axis: Axis, reason: str, *, soft: bool = False) -> None:
        """The ids cannot go, for this reason; soft: unless an approximation is allowed."""
        if axis is None:
            return
        if reason not in self._reasons:
            self._reasons.append(reason)
        code = HARD // 2 - self._reasons.index(reason) + (0 if soft else HARD)
        roots = self.find(np.ravel(axis))
        self._code[roots] = np.maximum(self._code[roots], code)

    def are_frozen(self, ids: np.ndarray, approximate: bool) -> np.ndarray:
        """Whether each id's class cannot go."""
        return self._code[self.find(ids)] > (HARD if approximate else 0)

    def reasons(self, ids: np.ndarray) -> list[str]:
        """Of each id's class why it cannot go; empty where it can."""
        codes = self._code[self.find(ids)]
        return [self._reasons[(HARD // 2 - c) % HARD] if c else "" for c in codes.tolist()]

    def are_soft(self, ids: np.ndarray) -> np.ndarray:
        """Whether each id's class can go only where an approximation is allowed."""
        codes = self._code[self.find(ids)]
        return (codes > 0) & (codes < HARD)

    def sound(self, axis: Axis) -> None:
        """The channels may be non-zero though all that they are written by is zero."""
        if axis is not None:
            self._loud[self.find(np.ravel(axis))] = True

    def are_loud(self, ids: np.ndarray) -> np.ndarray:
        """Whether each id's class may be non-zero though all that it is written by is zero."""
        return self._loud[self.find(ids)]

    def take_apart(self, whole: Axis, sizes: Sequence[int]) -> list[Axis]:
        """The axes of a row-major view of `whole` as `sizes`.

        Where the ids repeat along all but one of them, that one has them; else the question stays open.
        """
        if whole is None:
            return [None] * len(sizes)
        table = self.find(whole).reshape(sizes)
        for i in range(len(sizes)):
            line = table[tuple(slice(None) if i == j else slice(1) for j in range(len(sizes)))]
            if sizes[i] > 1 and (table == line).all():
                rows = whole.reshape(sizes)[tuple(slice(None) if i == j else 0 for j in range(len(sizes)))]
                return [rows if i == j else None for j in range(len(sizes))]
        key = (whole.tobytes(), *sizes)
        made = self._known.get(whole.tobytes())
        if made is not None and made.sizes == tuple(sizes):
            return list(made.parts)
        if key not in self._known:
            parts = tuple(self.fresh(size) if size > 1 else None for size in sizes)
            self._splits.append(Split(whole, tuple(sizes), parts))
            self._known[key] = parts
        return list(self._known[key])

    def put_together(self, parts: Sequence[Axis], sizes: Sequence[int]) -> Axis:
        """The axis that these make, merged in row-major order."""
        known = [(i, part) for i, part in enumerate(parts) if part is not None]
        if not known:
            return None
        if len(known) == 1:
            ((place, only),) = known
            shape = [-1 if i == place else 1 for i in range(len(parts))]
            return np.broadcast_to(only.reshape(shape), sizes).reshape(-1)
        key = (*(part if part is None else part.tobytes() for part in parts), *sizes)
        if key not in self._known:
            whole = self.fresh(prod(sizes))
            self._splits.append(Split(whole, tuple(sizes), tuple(parts), made=True))
            self._known[key] = whole
            self._known[whole.tobytes()] = self._splits[-1]
        return self._known[key]

    def made_of(self, axis: np.ndarray) -> list[tuple[Axis, int]]:
        """The parts that an axis was put together from, each with its length; itself where it was not."""
        made = self._known.get(axis.tobytes())
        return [(axis, len(axis))] if made is None else list(zip(made.parts, made.sizes))

    def look_at(self, axis: np.ndarray) -> None:
        """Something reads the positions as they are."""
        self._looked[axis] = True

    def settle(self, approximate: bool) -> None:
        """Answers every open split: the part that gives more units carries, the others cannot be cut.

        First those that leave no choice, then the others in the order in which they came up.
        """
        self._splits = self._questions()
        for family in self._families():
            while family:
                worths = [self._worths(split, approximate) for split in family]
                forced = [i for i, worth in enumerate(worths) if np.count_nonzero(worth) <= 1]
                forced += [
                    i
                    for i, split in enumerate(family)
                    if self._carried(split) is not None and i not in forced
                ]
                if not forced:
                    self._answer(family[0], approximate, self._scores(0, family, worths))
                for i in forced:
                    self._answer(family[i], approximate)
                family = [split for i, split in enumerate(family) if i not in (forced or [0])]
        self._splits = []

    def _questions(self) -> list[Split]:
        """The splits but those of axes that nothing looked at between being put together and taken apart."""
        every = [axis for split in self._splits for axis in (split.whole, *split.parts) if axis is not None]
        roots = self.find(np.arange(self._count))
        once = np.bincount(np.concatenate([[], *every]).astype(int), minlength=self._count) == 1
        alone = np.bincount(roots, minlength=self._count) == 1
        plain = once & alone & ~self._looked[: self._count] & (self._code[: self._count] == 0)
        return [split for split in self._splits if not (split.made and plain[split.whole].all())]

    def _families(self) -> Iterator[list[Split]]:
        """The open splits, those together that share a part."""
        owner: dict[int, int] = {}
        leader = list(range(len(self._splits)))

        def top(i: int) -> int:
            while leader[i] != i:
                i = leader[i]
            return i

        for i, split in enumerate(self._splits):
            for axis in (split.whole, *split.parts):
                for root in () if axis is None else set(self.find(axis).tolist()):
                    a, b = top(owner.setdefault(root, i)), top(i)
                    leader[max(a, b)] = min(a, b)
        families: dict[int, list[Split]] = {}
        for i, split in enumerate(self._splits):
            families.setdefault(top(i), []).append(split)
        yield from families.values()

    def _carried(self, split: Split) -> int | None:
        """The part that another split has already chosen."""
        for i, part in enumerate(split.parts):
            if part is not None and self._carries[self.find(part)].any():
                return i
        return None

    def _worths(self, split: Split, approximate: bool) -> list[int]:
        """Of each part how many units it would carry."""
        return [
            0 if part is None else self._worth(_rows(split, i), part, approximate)
            for i, part in enumerate(split.parts)
        ]

    def _worth(self, rows: np.ndarray, part: np.ndarray, approximate: bool) -> int:
        """How many classes can go once each row of ids is one, the part's own id with it."""
        table = self.find(np.concatenate([part[:, None], rows], 1))
        labels, inverse = np.unique(table, return_inverse=True)
        local = Ids()
        nodes = local.fresh(len(labels))
        inverse = inverse.reshape(table.shape)
        local.unite(np.broadcast_to(nodes[inverse[:, :1]], inverse[:, 1:].shape), nodes[inverse[:, 1:]])
        roots = local.find(nodes)
        return len(set(roots.tolist()) - set(roots[self.are_frozen(labels, approximate)].tolist()))

    def _scores(self, number: int, family: Sequence[Split], worths: Sequence[Sequence[int]]) -> list[int]:
        """Of each part the units that there are if it carries, with those of other splits that it forces."""
        split = family[number]
        tops = [None if part is None else int(self.find(part)[0]) for part in split.parts]
        scores = []
        for i, top in enumerate(tops):
            units = {top: worths[number][i]}
            for other, worth in zip(family, worths):
                others = [None if part is None else int(self.find(part)[0]) for part in other.parts]
                if other is not split and any(x is not None and x != top and x in tops for x in others):
                    free = [(w, x) for w, x in zip(worth, others) if x is not None and x not in tops]
                    units.update({x: w for w, x in free[:1]})
            scores.append(sum(units.values()) if worths[number][i] else 0)
        return scores

    def _answer(self, split: Split, approximate: bool, scores: Sequence[int] | None = None) -> None:
        worths = self._worths(split, approximate)
        carrier = self._carried(split)
        if carrier is None or not worths[carrier]:
            carrier = int(np.argmax(scores or worths))
        parts = sorted((part for part in split.parts if part is not None), key=len, reverse=True)
        everything = np.concatenate([split.whole, *parts])
        if not worths[carrier]:
            why = next(filter(None, self.reasons(everything)), REST)
            self.freeze(everything, why, soft=not (self._code[self.find(everything)] > HARD).any())
            return
        for i, part in enumerate(split.parts):
            if part is None:
                continue
            if i == carrier:
                rows = _rows(split, i)
                self.unite(np.broadcast_to(part[:, None], rows.shape), rows)
                self._carries[self.find(part)] = True
            else:
                self.freeze(part, REST)


def _rows(split: Split, part: int) -> np.ndarray:
    """The ids of the whole, a row for each position along the part. [length, others]"""
    table = np.moveaxis(split.whole.reshape(split.sizes), part, 0)
    return table.reshape(len(table), -1)
