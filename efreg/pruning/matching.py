"""Which units a smaller network has kept, found from its parameters and those of the network it was cut from.

A cut keeps rows of tensors in their order and as they are. So each axis that has become shorter asks how its
rows lie in the whole axis; what an axis leaves open, another axis along which the same units lie may decide.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from efreg.groups import tensor_of
from efreg.pruning.cutting import kept_of, sliced
from efreg.pruning.units import Network

OPEN, STAYS, GOES = 0, 1, 2


@dataclass(frozen=True, eq=False)
class _Place:
    """An axis of a parameter that is shorter in the smaller network."""

    name: str
    axis: int
    ids: np.ndarray
    whole: Tensor
    small: Tensor


def gone_from(network: Network, model: nn.Module, small: nn.Module) -> np.ndarray:
    """Of each id whether it is the root of a unit that the smaller network lacks. bool [ids]

    network: the model's. Rows are compared bit by bit, of parameters, not of statistics, which may have been
    estimated anew. Rows that have been changed decide nothing; of equal rows the first that fit are taken.

    Raises ValueError, naming the culprit, where the smaller network was not cut from this one.
    """
    found = _Matching(network, model, small)
    found.settle()
    gone = found.state == GOES
    for name, axes in kept_of(network, gone).items():
        for axis, positions in axes.items():
            if len(positions) != tensor_of(small, name).shape[axis]:
                raise _stranger(name)
    return gone


def _stranger(name: str, why: str = "its rows are not among those of the given network") -> ValueError:
    return ValueError(
        f"the small network was not cut from the given one: {name!r}: {why}. Give the network that it was "
        "cut from, both as they were then"
    )


class _Matching:
    """What is known of each id so far. state: of roots, int8 [ids]."""

    def __init__(self, network: Network, model: nn.Module, small: nn.Module):
        self._network = network
        self.state = np.full(len(network.ids), OPEN, np.int8)
        self._places = list(self._shortened(model, small))

    def settle(self) -> None:
        """Looks at all axes until nothing is open any more."""
        while True:
            asked = [place for place in self._places if (self._states(place.ids) == OPEN).any()]
            if not asked:
                return
            looked = {place: self._look(place) for place in asked if self._is_ready(place)}
            for place, learned in looked.items():
                self._learn(place, learned)
            if any((learned != OPEN).any() for learned in looked.values() if learned is not None):
                continue
            self._guess(asked, looked)

    def _shortened(self, model: nn.Module, small: nn.Module) -> Iterator[_Place]:
        """The axes that have become shorter; ids along those that have not stay."""
        watched = self._network.watched
        tensors, smaller = (_tensors(network) for network in (model, small))
        for name, axes in watched.tensors.items():
            whole, left = tensors[name], smaller.get(name)
            if left is None:
                raise _stranger(name, "the small network has none")
            fits = whole.ndim == left.ndim and all(
                n == m if ids is None else n >= m for ids, n, m in zip(axes, whole.shape, left.shape)
            )
            if not fits:
                raise _stranger(name, f"it has shape {tuple(left.shape)}, there {tuple(whole.shape)}")
            for axis, ids in enumerate(axes):
                if ids is None:
                    continue
                if whole.shape[axis] > left.shape[axis]:
                    if name in watched.parameters:
                        yield _Place(name, axis, ids, whole.detach(), left.detach())
                else:
                    self.state[self._network.ids.find(ids)] = STAYS

    def _states(self, ids: np.ndarray) -> np.ndarray:
        return self.state[self._network.ids.find(ids)]

    def _others(self, place: _Place) -> dict[int, np.ndarray]:
        """The states along the tensor's other axes."""
        axes = self._network.watched.tensors[place.name]
        return {
            axis: self._states(ids) for axis, ids in enumerate(axes) if axis != place.axis and ids is not None
        }

    def _is_ready(self, place: _Place) -> bool:
        return not any((states == OPEN).any() for states in self._others(place).values())

    def _look(self, place: _Place) -> np.ndarray | None:
        """What the rows along an axis say of those that are open; None where they have been changed."""
        kept = {
            axis: torch.from_numpy(np.flatnonzero(states == STAYS))
            for axis, states in self._others(place).items()
        }
        whole = sliced(place.whole, kept).to(place.small.dtype)
        if any(n != m for i, (n, m) in enumerate(zip(whole.shape, place.small.shape)) if i != place.axis):
            return None
        equal = _equal(_rows(whole, place.axis), _rows(place.small, place.axis))
        states = self._states(place.ids)
        may = placements(equal, states)
        return None if may is None else np.where(states == OPEN, may, OPEN)

    def _learn(self, place: _Place, learned: np.ndarray | None) -> None:
        if learned is not None:
            known = learned != OPEN
            self.state[self._network.ids.find(place.ids)[known]] = learned[known]

    def _guess(self, asked: list[_Place], looked: dict[_Place, np.ndarray | None]) -> None:
        """The first of equal rows stays, where all rows are as they were."""
        if strange := [place.name for place, learned in looked.items() if learned is None]:
            raise _stranger(strange[0])
        if not looked:
            raise _stranger(asked[0].name)
        ids = next(iter(looked)).ids
        self.state[self._network.ids.find(ids[self._states(ids) == OPEN][:1])] = STAYS


def _tensors(network: nn.Module) -> dict[str, Tensor]:
    return dict((*network.named_parameters(), *network.named_buffers()))


def _rows(tensor: Tensor, axis: int) -> list[bytes]:
    """Each position along an axis, bit by bit."""
    numbers = tensor.movedim(axis, 0).cpu().contiguous().flatten().view(torch.uint8)
    return [row.tobytes() for row in numbers.reshape(tensor.shape[axis], -1).numpy()]


def _equal(whole: list[bytes], small: list[bytes]) -> np.ndarray:
    """Which rows are the same. bool [N, K]"""
    numbers = {row: n for n, row in enumerate(dict.fromkeys([*whole, *small]))}
    a, b = (np.array([numbers[row] for row in rows]) for rows in (whole, small))
    return a[:, None] == b


def placements(equal: np.ndarray, states: np.ndarray) -> np.ndarray | None:
    """Of N positions, of which K stay in their order, those that must stay and those that must go.

    equal: whether position n may become the k-th, bool [N, K]. states: what is known of the positions, [N].
    Returns states [N], OPEN where there are ways with and without; None where there is no way.
    """
    equal = equal & (states != GOES)[:, None]
    free = states != STAYS
    before = _reached(equal, free)  # [N + 1, K + 1]: whether the first n can become the first k
    after = _reached(equal[::-1, ::-1], free[::-1])[::-1, ::-1]
    if not before[-1, -1]:
        return None
    may_stay = (before[:-1, :-1] & equal & after[1:, 1:]).any(1)
    may_go = (before[:-1] & after[1:]).any(1) & free
    return np.where(may_stay & may_go, OPEN, np.where(may_stay, STAYS, GOES))


def _reached(equal: np.ndarray, free: np.ndarray) -> np.ndarray:
    """Whether the first n positions can become the first k. bool [N + 1, K + 1]"""
    reached = np.zeros((equal.shape[0] + 1, equal.shape[1] + 1), bool)
    reached[0, 0] = True
    for n in range(len(equal)):
        reached[n + 1] = reached[n] & free[n]
        reached[n + 1, 1:] |= reached[n, :-1] & equal[n]
    return reached
