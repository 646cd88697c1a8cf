"""From what was watched to groups of units, and to what is frozen and why."""

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch

from efreg.groups import Group, Member
from efreg.pruning.ids import Axis, Ids
from efreg.pruning.watching import Watched

UNREAD = "nothing was seen to read them"


@dataclass(frozen=True)
class Frozen:
    """Rows of a dense weight that cannot go: how many of how many, and why."""

    name: str
    count: int
    rows: int
    reason: str


class Network:
    """The groups of a network that was watched, its units numbered, and what cannot go.

    groups: in the model's order. frozen: of each dense weight what cannot go.
    """

    def __init__(self, watched: Watched, *, approximate: bool = False, left_out: Iterable[tuple] = ()):
        self.watched = watched
        self.ids: Ids = watched.ids.copy()
        for ids, reason in left_out:
            self.ids.freeze(ids, reason)
        self.ids.settle(approximate)
        self.approximate = approximate
        self._names = list(watched.tensors)
        self._roots_of: dict[str, np.ndarray] = {}
        self._classes()
        self.groups = self._groups()
        self._unit_of = {
            root: (group, n)
            for group in self.groups
            for n, root in enumerate(self._roots_of[group.name].tolist())
        }
        self.frozen = self._frozen()

    def unit_at(self, tensor: str, axis: int, position: int) -> tuple[Group, int] | None:
        """The group and the unit that a position along an axis belongs to; None where it cannot go."""
        found = self._axis(tensor, axis)
        return None if found is None else self._unit_of.get(int(self.ids.find(found[[position]])[0]))

    def reason_at(self, tensor: str, axis: int, positions: np.ndarray) -> str:
        """Why positions along an axis cannot go."""
        found = self._axis(tensor, axis)
        reasons = [] if found is None else self.ids.reasons(found[positions])
        return next(filter(None, reasons), "a group needs two units at least")

    def _axis(self, tensor: str, axis: int) -> Axis:
        return self.watched.tensors[self.watched.aliases[tensor]][axis]

    def unit_ids(self, group: Group) -> np.ndarray:
        """The roots of the group's units."""
        return self._roots_of[group.name]

    def kept(self, axis: np.ndarray, gone: np.ndarray) -> np.ndarray:
        """Which positions of an axis stay. gone: of each id whether the class with this root goes, [ids]"""
        return ~gone[self.ids.find(axis)]

    def frozen_in(self, scope: Collection[str]) -> list[Frozen]:
        """What is frozen of these modules' weights; of all where there are none."""
        return [x for x in self.frozen if not scope or {x.name, x.name.rpartition(".")[0]} & {*scope}]

    def top_reasons(self, scope: Collection[str], most: int = 3) -> list[str]:
        """The reasons that keep the most rows of weights, each with what it keeps.

        scope: the modules to look at, all where there are none.
        """
        rows: Counter[str] = Counter()
        names: dict[str, str] = {}
        for frozen in self.frozen_in(scope):
            rows[frozen.reason] += frozen.count
            names.setdefault(frozen.reason, frozen.name)
        return [
            f"{count} rows, as of {names[reason]!r}: {reason}" for reason, count in rows.most_common(most)
        ]

    def columns(self, gone: np.ndarray) -> Iterator[tuple[str, int, np.ndarray]]:
        """Of the weights that read units with these roots the axes, and the positions there."""
        for code, part in self._part.items():
            name, axis, ids = self._at(code)
            stays = self.kept(ids, gone)
            if part == "reads" and not stays.all():
                yield name, axis, np.flatnonzero(~stays)

    def _at(self, code: int) -> tuple[str, int, np.ndarray]:
        """The tensor and the axis that a code stands for, and the ids along it."""
        name, axis = self._names[code // 16], code % 16
        ids = self.watched.tensors[name][axis]
        assert ids is not None  # what has none has no code
        return name, axis, ids

    def _classes(self) -> None:
        """All positions of all tensors, sorted by class, then by tensor and axis."""
        ids, codes, places = [], [], []
        for number, name in enumerate(self._names):
            for axis, known in enumerate(self.watched.tensors[name]):
                if known is not None:
                    ids.append(known)
                    codes.append(np.full(len(known), number * 16 + axis))
                    places.append(np.arange(len(known)))
        self._base = np.concatenate([np.empty(0, np.int64), *ids])
        self._codes = np.concatenate([np.empty(0, np.int64), *codes])
        self._places = np.concatenate([np.empty(0, np.int64), *places])
        self._part = self._parts()
        self._root = self.ids.find(self._base) if len(self._base) else self._base

    def _parts(self) -> dict[int, str]:
        """What each axis of each tensor is to the units that lie on it."""
        marked = np.full(len(self.ids), 3)
        for code, marks in ((2, self.watched.carries), (1, self.watched.reads), (0, self.watched.writes)):
            for ids in marks:
                marked[ids] = code
        best = np.full(16 * len(self._names), 3)
        if len(self._base):
            np.minimum.at(best, self._codes, marked[self._base])
        return {
            code: ("writes", "reads", "carries", "follows")[best[code]]
            for code in np.unique(self._codes).tolist()
        }

    def _groups(self) -> tuple[Group, ...]:
        count = len(self.ids)
        if not count or not len(self._base):
            return ()
        written, taken = np.zeros(count, bool), np.zeros(count, bool)
        writing = np.array([self._part[code] == "writes" for code in self._codes.tolist()])
        written[self._root[writing]] = True
        for ids in self.watched.taken:
            taken[self.ids.find(ids)] = True
        made = np.unique(self._root[writing])
        unread = made[~taken[made]]
        self.ids.freeze(unread[~self.ids.are_frozen(unread, self.approximate)], UNREAD)
        able = written & taken
        able[self._root] &= ~self.ids.are_frozen(self._root, self.approximate)
        chosen = able[self._root]
        order = np.lexsort((self._places[chosen], self._codes[chosen], self._root[chosen]))
        roots, codes, places = (x[chosen][order] for x in (self._root, self._codes, self._places))
        bounds = np.flatnonzero(np.diff(roots, prepend=-1, append=-1))
        families: dict[tuple, list[tuple[int, int]]] = defaultdict(list)
        for low, high in pairwise(bounds.tolist()):
            families[tuple(codes[low:high].tolist())].append((low, high))
        return self._named(families, roots, codes, places)

    def _named(
        self,
        families: Mapping[tuple, list[tuple[int, int]]],
        roots: np.ndarray,
        codes: np.ndarray,
        places: np.ndarray,
    ) -> tuple[Group, ...]:
        found, ordered = [], []
        taken: Counter[str] = Counter()
        for signature, spans in families.items():
            first = next(code for code in signature if self._part[code] == "writes")
            spans.sort(key=lambda span: places[span[0] : span[1]][codes[span[0] : span[1]] == first][0])
            start = places[spans[0][0] : spans[0][1]][codes[spans[0][0] : spans[0][1]] == first][0]
            ordered.append((first, start, signature, spans))
        for first, _, signature, spans in sorted(ordered, key=lambda x: x[:2]):
            if len(spans) < 2:
                continue
            name = self._names[first // 16].rpartition(".")[0] or self._names[first // 16]
            taken[name] += 1
            name = name if taken[name] == 1 else f"{name}#{taken[name]}"
            units = np.concatenate([np.full(high - low, n) for n, (low, high) in enumerate(spans)])
            rows = np.concatenate([np.arange(low, high) for low, high in spans])
            own = roots[[low for low, _ in spans]]
            members = []
            for code in dict.fromkeys(signature):
                here = codes[rows] == code
                tensor, axis, ids = self._at(code)
                members.append(
                    Member(
                        tensor,
                        axis,
                        len(ids),
                        self._part[code],
                        torch.from_numpy(places[rows][here].copy()),
                        torch.from_numpy(units[here].copy()),
                        tensor in self.watched.parameters,
                    )
                )
            self._roots_of[name] = own
            found.append(
                Group(
                    name,
                    len(spans),
                    tuple(members),
                    silent=not bool(self.ids.are_loud(own).any()),
                    approximate=bool(self.ids.are_soft(own).any()),
                )
            )
        return tuple(found)

    def _frozen(self) -> tuple[Frozen, ...]:
        """Of each dense weight the rows that cannot go, by reason."""
        found = []
        free = np.zeros(len(self.ids), bool)
        for own in self._roots_of.values():
            free[own] = True
        for code, part in self._part.items():
            if part != "writes":
                continue
            name, _, axis = self._at(code)
            roots = self.ids.find(axis)
            reasons = Counter(
                reason or "a group needs two units at least"
                for reason, free_ in zip(self.ids.reasons(axis), free[roots].tolist())
                if not free_
            )
            name = name.removesuffix(".weight")
            found += [Frozen(name, count, len(axis), reason) for reason, count in reasons.items()]
        return tuple(found or self._unwritten())

    def _unwritten(self) -> Iterator[Frozen]:
        """Where no weight was seen to write, as where all are quantised first: what became of each."""
        for name, axes in self.watched.tensors.items():
            if len(axes) > 1 and axes[0] is not None:
                for reason, count in Counter(filter(None, self.ids.reasons(axes[0]))).items():
                    yield Frozen(name.removesuffix(".weight"), count, len(axes[0]), reason)


def members_of(watched: Watched, group: Group) -> np.ndarray:
    """The ids of the positions at which a group's units are written."""
    places = ((watched.tensors[m.tensor][m.axis], m.index.numpy()) for m in group.of("writes"))
    return np.concatenate([ids[index] for ids, index in places if ids is not None])
