"""Trying cuts: on a copy whose constant parameters are shaken, so that no wrong cut hides behind a zero."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from efreg.groups import Group
from efreg.pruning.proof import Failure, disagreement
from efreg.pruning.running import copy_of
from efreg.pruning.units import Network

MOST = 64
"""Trials after which what is still suspect is left out unheard."""

FLAT = 1e-3
"""Parameters all below this are given random numbers for a trial: a scale of zero would hide a wrong cut."""


class Trial:
    """Cuts of a network, tried one after the other.

    dead: whether units that go are zero, so that the result must equal the network as it is.
    """

    def __init__(self, model: nn.Module, network: Network, example_inputs: Any, *, dead: bool = False):
        self._model = model if dead else shaken(model)
        self._network, self._inputs, self._dead = network, example_inputs, dead

    def failure(self, chosen: Mapping[str, Sequence[int]], *, quick: bool = True) -> Failure | None:
        """Why the network without these units of its groups is not the same function; None where it is."""
        gone = roots(self._network, chosen)
        if not gone.any():
            return None
        return disagreement(
            self._model, self._network, gone, self._inputs, dead=self._dead, quick=quick, ours=not self._dead
        )

    def refused(self, chosen: Mapping[str, Sequence[int]]) -> dict[str, str]:
        """The groups whose units cannot go, and why; the others can, together."""
        groups = {group.name: group for group in self._network.groups}

        def fails(names: Sequence[str]) -> Failure | None:
            return self.failure({name: chosen[name] for name in names})

        return weed([groups[name] for name in chosen], fails, self._touches, self._kind)

    def _touches(self, group: Group, module: str) -> bool:
        """Whether the group has members in the module, or lies along an axis whose length that was given."""
        prefix = f"{module}." if module else ""
        if any(member.tensor.startswith(prefix) for member in group.members):
            return True
        own = self._network.unit_ids(group)
        sizes = (size for size in self._network.watched.sizes.values() if size.module == module)
        return any(np.isin(self._network.ids.find(size.axis), own).any() for size in sizes)

    def _kind(self, module: str) -> list[str]:
        """The modules of the same class, where that is not one of torch's own."""
        kind = type(self._model.get_submodule(module))
        if kind.__module__.startswith("torch."):
            return [module]
        return [name for name, other in self._model.named_modules() if type(other) is kind]


def weed(
    groups: Sequence[Group],
    fails: Callable[[Sequence[str]], Failure | None],
    touches: Callable[[Group, str], bool],
    kind: Callable[[str], Sequence[str]],
) -> dict[str, str]:
    """The groups that must be left out so that the others can be cut together, each with the reason.

    Where a module broke down, the groups that it handles are suspect; after a second module of its kind all
    that modules of this kind handle; else halves are tried. Where one module made several groups suspect, or
    a difference showed in it that may have come from elsewhere, they are heard one by one in the end.
    """
    rest, trials = list(groups), 0
    heard: list[Group] = []
    suspects: dict[str, str] = {}
    broken: set[str] = set()
    while rest and (failure := fails([group.name for group in rest])):
        trials += 1
        found = []
        if failure.module is not None:
            kinds = kind(failure.module)
            places = kinds if broken & set(kinds) else [failure.module]
            broken.add(failure.module)
            found = [group for group in rest if any(touches(group, place) for place in places)]
        if not found or len(found) == len(rest):
            found = _halved(rest, fails) if trials < MOST else rest
        elif len(places) == 1 and (len(found) > 1 or not failure.broken):
            heard += found
        suspects |= {group.name: failure.reason for group in found}
        rest = [group for group in rest if group.name not in suspects]
    refused = dict(suspects)
    for group in heard:
        if not fails([g.name for g in groups if g.name not in refused] + [group.name]):
            del refused[group.name]
    return refused


def _halved(groups: Sequence[Group], fails: Callable[[Sequence[str]], Failure | None]) -> list[Group]:
    """Groups without which the cut may work: found by cutting halves alone."""
    if len(groups) == 1:
        return list(groups)
    middle = len(groups) // 2
    halves = groups[:middle], groups[middle:]
    found = [g for half in halves if fails([x.name for x in half]) for g in _halved(half, fails)]
    return found or list(groups)


def roots(network: Network, chosen: Mapping[str, Sequence[int]]) -> np.ndarray:
    """Of each id whether it is the root of one of these units of the network's groups. bool [ids]"""
    groups = {group.name: group for group in network.groups}
    found = np.zeros(len(network.ids), bool)
    for name, units in chosen.items():
        found[network.unit_ids(groups[name])[list(units)]] = True
    return found


@torch.no_grad()
def shaken(model: nn.Module) -> nn.Module:
    """A copy in which parameters that are all equal, or as good as zero, have random numbers."""
    copied = copy_of(model)
    generator = torch.Generator().manual_seed(0)
    for parameter in copied.parameters():
        if parameter.is_floating_point() and parameter.numel() and not parameter.is_meta:
            low, high = parameter.aminmax()
            if low == high or max(-low, high) < FLAT:
                noise = torch.empty(parameter.shape).uniform_(0.5, 1.5, generator=generator)
                parameter.copy_(noise / (1 if parameter.ndim < 2 else parameter[0].numel() ** 0.5))
    return copied
