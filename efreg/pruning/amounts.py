"""How many units of each group go: by one ratio, by one for each key, or by the smallest that reaches a
target.
"""

import logging
from bisect import bisect_left
from collections.abc import Callable, Sequence
from fractions import Fraction
from math import ceil
from typing import Any

from torch import nn

from efreg.pruning.choosing import globally, ranks
from efreg.pruning.costs import Costs
from efreg.pruning.requests import Request, names_of, removed
from efreg.pruning.units import Network

logger = logging.getLogger("efreg")

STEPS = 10_000
"""A target is met by a ratio of so many steps: four decimals."""


class Amounts:
    """What a request means for a network's groups.

    covered: the numbers of the groups that it covers. costs: what the network costs with fewer units.
    """

    def __init__(self, model: nn.Module, network: Network, request: Request):
        self._model, self._request, self._groups = model, request, network.groups
        self.covered = [g for g, group in enumerate(self._groups) if request.covers(model, group)]
        self.costs = Costs(network, {name: p.shape for name, p in model.named_parameters()})

    def counts(self) -> list[int]:
        """How many units of each group go.

        Raises ValueError for a target out of reach, with what can be reached, for a key that covers no group
        and for two that cover one.
        """
        if self._request.keyed:
            return self._keyed()
        at = self._global() if self._request.ranking == "global" else self._uniform
        return at(self._request.ratio) if self._request.ratio is not None else self._reaching(at)

    def _uniform(self, ratio: Fraction) -> list[int]:
        counts = [0] * len(self._groups)
        for g in self.covered:
            counts[g] = self._request.removed(ratio, self._groups[g].size)
        return counts

    def _keyed(self) -> list[int]:
        counts = [0] * len(self._groups)
        keys: dict[int, Any] = {}
        for key, (ratio, modules) in self._request.keyed.items():
            found = [g for g in self.covered if names_of(self._groups[g]) & modules]
            if ratio and not found:
                raise Nothing(f"{key!r}: {float(ratio)}", modules)
            for g in found:
                if g in keys:
                    name = self._groups[g].name
                    raise ValueError(f"{keys[g]!r} and {key!r} both give a ratio for {name!r}: give it one")
                keys[g], counts[g] = key, self._request.removed(ratio, self._groups[g].size)
        return counts

    def _global(self) -> Callable[[Fraction], list[int]]:
        """The counts as a function of the share of all units that go."""
        groups = [self._groups[g] for g in self.covered]
        full = [0] * len(self._groups)
        saved = [
            self.costs.macs(full) - self.costs.macs([int(i == g) for i in range(len(full))])
            for g in self.covered
        ]
        most = [self._request.at_most(group.size) for group in groups]
        order = globally(
            [ranks(self._model, group, self._request.importance) for group in groups], saved, most
        )

        def at(ratio: Fraction) -> list[int]:
            counts = [0] * len(full)
            for i in order[: ceil(ratio * sum(group.size for group in groups))]:
                counts[self.covered[i]] += 1
            sizes = [group.size for group in self._groups]
            return [removed(Fraction(c, n), n, self._request.round_to) for c, n in zip(counts, sizes)]

        return at

    def _reaching(self, at: Callable[[Fraction], list[int]]) -> list[int]:
        """The counts at the smallest ratio, to four decimals, that reaches all targets."""
        full, targets = [0] * len(self._groups), self._request.targets
        measures = {"speedup": self.costs.macs, "params": self.costs.parameters}

        def reached(counts: Sequence[int], what: str) -> Fraction:
            return Fraction(measures[what](full), max(measures[what](counts), 1))

        def enough(step: int) -> bool:
            counts = at(Fraction(step, STEPS))
            return all(reached(counts, what) >= target for what, target in targets.items())

        step = bisect_left(range(STEPS), True, key=enough)
        if step == STEPS:
            last = at(Fraction(STEPS - 1, STEPS))
            best = ", ".join(f"{what} {float(reached(last, what)):.3f}" for what in targets)
            asked = " with ".join(f"a {what} of {float(target)}" for what, target in targets.items())
            most = self._request.most
            left = "one unit left" if most is None else f"{float(most)} gone"
            raise ValueError(f"{asked} is out of reach: {best} at most, with {left} of each group")
        logger.info("ratio %s reaches what was asked", step / STEPS)
        return at(Fraction(step, STEPS))


class Nothing(Exception):
    """A part of a request, in words, that covers no group, and the modules that it names."""
