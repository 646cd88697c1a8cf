"""What a backend carries out, over the filters of many tensors at once."""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple, TypeGuard

import torch
from torch import Tensor

from efreg.backends.rows import Groups, Rows
from efreg.force.laws import Electrostatic, Factor, Law

Grads = Sequence[Tensor | None]
"""A gradient for each row, or None."""


class Backend:
    """The operations that a backend has, and those that are made of them."""

    name: str

    def __init__(self, device: torch.device):
        """Raises BackendUnavailable where it cannot be had on `device`."""

    def measure(self, rows: Rows, *, sign: str, norm: bool) -> tuple[Tensor, Tensor, Tensor | None]:
        """Magnitudes, balances of the signs and, where `norm`, L2 norms of all filters, row behind row."""
        raise NotImplementedError

    def pull(self, grads: Grads, rows: Rows, coefficients: Tensor, *, scale: Factor, direction: str) -> None:
        """grads += scale · c_n · sgn(w), or its twins (reference.py); a row whose gradient is None stays."""
        raise NotImplementedError

    def shrink(
        self,
        rows: Rows,
        coefficients: Tensor,
        *,
        rates: list[Factor],
        found_inf: Tensor | None = None,
        direction: str,
    ) -> None:
        """w ← sgn(w) · max(|w| − rates[i] · c_n, 0), or its twins; nothing where found_inf is not 0."""
        raise NotImplementedError

    def charge(self, groups: Groups, coefficients: Tensor, law: Law, kept: "Kept | None" = None) -> None:
        """Writes the coefficients that the law gives the groups now, and what it keeps."""
        apply(law, groups, self.measure(groups.rows, **law.statistics), coefficients, kept)

    def force(
        self,
        grads: Grads,
        rows: Rows,
        groups: Groups,
        coefficients: Tensor,
        law: Law,
        *,
        scale: Factor,
        kept: "Kept | None" = None,
    ) -> None:
        """`charge`, then `pull`. The groups' rows are the first of the rows."""
        self.charge(groups, coefficients, law, kept)
        self.pull(grads, rows, coefficients, scale=scale, direction=law.direction)


class Kept(NamedTuple):
    """What a law keeps, by name: a number a unit, laid out as the coefficients are.

    begin: whether it begins now with the groups that are charged. planned: laid out likewise, 1 for a unit
    that the plan removes.
    """

    state: dict[str, Tensor]
    begin: bool
    planned: Tensor | None = None


@torch.no_grad()
def apply(
    law: Law,
    groups: Groups,
    statistics: tuple[Tensor, Tensor, Tensor | None],
    coefficients: Tensor,
    kept: Kept | None = None,
) -> None:
    """Writes the coefficients of groups with these statistics, all of them by one call of the law."""
    charges = groups.charges(*statistics)
    if kept is not None and kept.planned is not None:
        charges = replace(charges, planned=groups.take(kept.planned) > 0)
    if not law.keeps or kept is None:
        return groups.put(law.of(charges), coefficients)
    begun = law.begin(charges) if kept.begin else {n: groups.take(flat) for n, flat in kept.state.items()}
    charges = replace(charges, state=begun)
    groups.put(law.of(charges), coefficients)
    for name, numbers in charges.state.items():
        if name not in kept.state:
            kept.state[name] = torch.zeros_like(coefficients)
        groups.put(numbers, kept.state[name])


def fused(law: Law) -> TypeGuard[Electrostatic]:
    """Whether the kernels know the law: the paper's own, whose coefficients are taken as it is measured."""
    return type(law) is Electrostatic and not law.relative
