"""The store: the coefficients in force, in one place."""

from collections.abc import Mapping, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from efreg.backends.reference import accumulator
from efreg.force.shards import shard_of
from efreg.force.targets import Place, Target

Key = tuple[torch.device, torch.dtype]
"""Where weights lie, and the dtype in which their statistics are kept."""


class Shelf:
    """The coefficients of the targets of one device and dtype, one behind the other, and what the law keeps.

    A number a unit; coefficients are without an α that changes. planned: 1 where the plan removes a unit, for
    laws that need it.
    """

    def __init__(self, key: Key, targets: Sequence[Target], sizes: Sequence[int]):
        device, dtype = key
        self.sizes = dict(zip(targets, sizes))
        self.starts = dict(zip(targets, accumulate(sizes, initial=0)))
        with torch.inference_mode(False):
            self.coefficients = torch.zeros(sum(sizes), dtype=dtype, device=device)
        self.state: dict[str, Tensor] = {}
        self.planned: Tensor | None = None

    def choose(self, units: Mapping[str, Sequence[int]]) -> Tensor:
        """A tensor like the coefficients: 1 for these units of the targets, by name, and 0."""
        planned = torch.zeros_like(self.coefficients)
        for target in self.sizes:
            planned[self.of(target)][list(units.get(target.name, ()))] = 1
        return planned

    def entries(self, target: Target, place: Place, parameter: Tensor) -> Tensor:
        """The coefficients of a parameter's entries, 0 for those of no unit, shaped to multiply it, or the
        shard of it that lies here."""
        units = place.all_units(parameter.shape[place.dim], self.starts[target])
        if (shard := shard_of(parameter)) is not None:
            units = units.narrow(0, shard.first, shard.length)
        units = units.to(self.coefficients.device)
        c = torch.where(units < 0, 0, self.coefficients[units.clamp_min(0)])
        return c.view([-1 if i == place.dim else 1 for i in range(parameter.ndim)])

    def of(self, target: Target) -> slice:
        """Where a target's numbers lie."""
        return slice(self.starts[target], self.starts[target] + self.sizes[target])

    def numbers(self, target: Target) -> dict[str, Tensor]:
        """What is kept of a target, by name: views."""
        return {
            name: flat[self.of(target)]
            for name, flat in {"coefficient": self.coefficients, **self.state}.items()
        }

    def take(self, target: Target, numbers: dict[str, Tensor]) -> None:
        """Writes what was kept of a target elsewhere."""
        for name, kept in numbers.items():
            flat = self.coefficients if name == "coefficient" else self.state.get(name)
            if flat is None:
                flat = self.state[name] = torch.zeros_like(self.coefficients)
            flat[self.of(target)] = kept.to(flat)


class Store:
    """Shelves for all targets of a force, arranged anew where weights have moved or changed in size."""

    def __init__(self) -> None:
        self._shelves: dict[Key, Shelf] = {}
        self._places: dict[Target, Shelf] = {}

    def __contains__(self, target: Target) -> bool:
        return target in self._places

    def shelf(self, target: Target) -> Shelf:
        """The one that has the target's numbers."""
        return self._places[target]

    def arrange(self, weights: Mapping[Target, Tensor]) -> bool:
        """Makes room for these targets, where the first of their weights lie now. Whether anything moved.

        A target whose number of units changed begins anew.
        """
        wanted: dict[Key, dict[Target, int]] = {}
        for target, weight in weights.items():
            key = weight.device, accumulator(weight.dtype)
            wanted.setdefault(key, {})[target] = target.size(weight)
        if wanted == {key: shelf.sizes for key, shelf in self._shelves.items()}:
            return False
        before, self._places = self._places, {}
        self._shelves = {key: Shelf(key, list(t), list(t.values())) for key, t in wanted.items()}
        for shelf in self._shelves.values():
            for target, size in shelf.sizes.items():
                self._places[target] = shelf
                if target in before and before[target].sizes[target] == size:
                    shelf.take(target, before[target].numbers(target))
                else:
                    target.begin_anew()
        return True
