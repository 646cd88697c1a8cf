"""What a force is to do to a network, kept beside it in float64 and plain torch."""

from dataclasses import dataclass, field
from itertools import pairwise

import formulas
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import efreg
from efreg.groups import Group, Member

TIE = 1e-5
"""Two charges so near each other, relatively, are not told apart in float32 as they are in float64."""


@dataclass
class Shadow:
    """One force: its law and way, the members of each group that count for charges and that are pulled.

    age: steps since charges were taken, None where they are to be taken. served: all steps.
    kept: of each group the coefficients in force, without an α that changes.
    """

    law: efreg.Law
    update: str
    refresh: int | None
    groups: dict[str, tuple[Group, list[Member]]]
    age: int | None = None
    served: int = 0
    kept: dict[str, Tensor] = field(default_factory=dict)
    strength: float = 1.0

    @property
    def direction(self) -> str:
        return self.law.direction

    def begin(self, model: nn.Module, planned: dict[str, list[int]]) -> None:
        """Before a step: takes charges where they are due, of the weights as they are, and looks at α."""
        if self.age is None or (self.refresh and self.age >= self.refresh):
            for name, (group, _) in self.groups.items():
                self.kept[name] = self._charged(model, group, planned.get(name, []))
            self.age = 0
        self.strength = self.law.alpha(self.served) if callable(self.law.alpha) else 1.0
        self.age, self.served = self.age + 1, self.served + 1

    def _charged(self, model: nn.Module, group: Group, planned: list[int]) -> Tensor:
        if isinstance(self.law, efreg.Fade):
            return torch.isin(torch.arange(group.size), torch.tensor(planned)).double()
        rows = [[] for _ in range(group.size)]
        for member in group.of("writes"):
            filters = whole(model.get_parameter(member.tensor).detach()).movedim(member.axis, 0)
            for index, unit in zip(member.index.tolist(), member.unit.tolist(), strict=True):
                rows[unit].append(filters[index].flatten())
        m, s = formulas.statistics([torch.cat(parts) for parts in rows])
        if any(0 < b - a < TIE * b for a, b in pairwise(sorted(m))):
            raise Tied
        size = sum(len(part) for part in rows[0])
        alpha = 1.0 if callable(self.law.alpha) else self.law.alpha
        return torch.tensor(formulas.coefficients(self.law, alpha, m, s, size), dtype=torch.float64)

    def pulled(self, parameters: dict[str, Tensor], grads: dict[str, Tensor | None], climbs: bool) -> None:
        """Adds the force to gradients, in place; Fade, once it ends, zeroes those of what went."""
        if self.direction == "share":
            if self.strength >= 1:
                for name, dim, c in self._pieces(parameters):
                    if grads[name] is not None:
                        grads[name] *= 1 - formulas.along(grads[name], dim, c)
        elif self.update == "gradient":
            for name, dim, c in self._pieces(parameters):
                if grads[name] is not None:
                    t = self.strength * c * (-1 if climbs else 1)
                    grads[name] += formulas.pull(parameters[name], grads[name], dim, t, self.direction)

    def shrunk(self, parameters: dict[str, Tensor], rates: dict[str, float]) -> None:
        """The proximal step after the optimizer's own, in place, each parameter at its rate."""
        if self.update == "proximal":
            for name, dim, c in self._pieces(parameters):
                rate = rates[name] if self.law.paced else 1.0
                t = rate * self.strength * c
                parameters[name].copy_(formulas.shrunk(parameters[name], dim, t, self.direction))

    def _pieces(self, parameters: dict[str, Tensor]) -> list[tuple[str, int, Tensor]]:
        """Of each parameter that is pulled its axis, and the coefficients of the entries there."""
        found = []
        for name, (_, members) in self.groups.items():
            for member in members:
                c = torch.zeros(parameters[member.tensor].shape[member.axis], dtype=torch.float64)
                c[member.index] = self.kept[name][member.unit]
                found.append((member.tensor, member.axis, c))
        return found


def whole(tensor: Tensor) -> Tensor:
    """A tensor as it is where nothing is sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


class Tied(Exception):
    """Charges that only float64 tells apart."""


def of_layers(model: nn.Module) -> dict[str, tuple[Group, list[Member]]]:
    """The filters of each convolution as a group of its own."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d) and module.groups == 1:
            every = torch.arange(module.out_channels)
            member = Member(f"{name}.weight", 0, len(every), "writes", every, every)
            found[name] = Group(name, len(every), (member,)), [member]
    return found


def of_plan(plan: efreg.Plan, scope: str) -> dict[str, tuple[Group, list[Member]]]:
    """The groups of a plan, with what a scope pulls of them."""
    parts = ("writes", "carries") if scope == "filter" else ("writes",)
    return {
        cut.name: (cut.group, [m for m in cut.group.members if m.part in parts and m.trained])
        for cut in plan.cuts
    }
