"""What a network costs with fewer units: multiply-accumulates and parameters, from the groups, without
running it.
"""

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from efreg.pruning.units import Network

Factor = tuple[int, tuple[tuple[int, int], ...]]
"""Positions along an axis: how many stay in any case, and for each group (its number) how many it has there.
"""


class Costs:
    """MACs and parameters of a network as functions of how many units of each group go.

    MACs are those that torch's FlopCounterMode counts, halved: convolutions, matrix products and attention.
    """

    def __init__(self, network: Network, shapes: Mapping[str, Sequence[int]]):
        """shapes: of the parameters, by name."""
        self._sizes = [group.size for group in network.groups]
        self._network = network
        self._group_of = np.full(len(network.ids), -1)
        for number, group in enumerate(network.groups):
            self._group_of[network.unit_ids(group)] = number
        self._macs: Counter[tuple[Factor, ...]] = Counter()
        for cost in network.watched.costs:
            self._macs[tuple(sorted(map(self._factor, cost.axes)))] += cost.macs
        self._parameters: Counter[tuple[Factor, ...]] = Counter()
        for name in shapes:
            axes = [axis for axis in network.watched.tensors[name] if axis is not None]
            self._parameters[tuple(sorted(map(self._factor, axes)))] += 1

    def macs(self, removed: Sequence[int]) -> int:
        """Multiply-accumulates where so many units of each group are gone."""
        return self._total(self._macs, removed)

    def parameters(self, removed: Sequence[int]) -> int:
        """How many numbers are trained where so many units of each group are gone."""
        return self._total(self._parameters, removed)

    def _factor(self, axis: np.ndarray) -> Factor:
        counts = Counter(self._group_of[self._network.ids.find(axis)].tolist())
        fixed = counts.pop(-1, 0)
        return fixed, tuple(sorted(counts.items()))

    def _total(self, terms: Mapping[tuple[Factor, ...], int], removed: Sequence[int]) -> int:
        def left(factor: Factor) -> int:
            fixed, shares = factor
            return fixed + sum(n * (self._sizes[g] - removed[g]) // self._sizes[g] for g, n in shares)

        known = {factor: left(factor) for factors in terms for factor in factors}
        total = 0
        for factors, count in terms.items():
            for factor in factors:
                count *= known[factor]
            total += count
        return total
