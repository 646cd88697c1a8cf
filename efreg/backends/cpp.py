"""C++ on the CPU."""

import torch
from torch import Tensor

from efreg.backends import native
from efreg.backends.protocol import Backend, Grads, Kept, fused
from efreg.backends.rows import Groups, Rows
from efreg.force.laws import DIRECTIONS, Electrostatic, Factor, Law


class Cpp(Backend):
    """The operations of csrc/cpu. Other laws than the paper's run as torch between them."""

    name = "cpp"

    def __init__(self, device: torch.device):
        self._module = native.load(native.CPP)

    def measure(self, rows: Rows, *, sign: str, norm: bool) -> tuple[Tensor, Tensor, Tensor | None]:
        magnitude, balance, norms = self._module.measure(rows.tensors, rows.dims, sign == "count", norm)
        return magnitude, balance, norms if norm else None

    def pull(self, grads: Grads, rows: Rows, coefficients: Tensor, *, scale: Factor, direction: str) -> None:
        along = DIRECTIONS.index(direction)
        self._module.pull(grads, rows.tensors, coefficients, rows.places, rows.dims, float(scale), along)

    def shrink(
        self,
        rows: Rows,
        coefficients: Tensor,
        *,
        rates: list[Factor],
        found_inf: Tensor | None = None,
        direction: str,
    ) -> None:
        if found_inf is not None and float(found_inf) != 0:
            return
        scales = [float(rate) for rate in rates]
        along = DIRECTIONS.index(direction)
        self._module.shrink(rows.tensors, coefficients, rows.places, rows.dims, scales, along)

    def charge(self, groups: Groups, coefficients: Tensor, law: Law, kept: Kept | None = None) -> None:
        if not fused(law):
            return super().charge(groups, coefficients, law, kept)
        rows = groups.rows
        self._module.charge(rows.tensors, coefficients, *groups.packed, rows.dims, self._electrostatic(law))

    def force(
        self,
        grads: Grads,
        rows: Rows,
        groups: Groups,
        coefficients: Tensor,
        law: Law,
        *,
        scale: Factor,
        kept: Kept | None = None,
    ) -> None:
        if not fused(law):
            return super().force(grads, rows, groups, coefficients, law, scale=scale, kept=kept)
        self._module.force(
            grads,
            rows.tensors,
            coefficients,
            *groups.packed,
            rows.places,
            rows.dims,
            self._electrostatic(law),
            float(scale),
        )

    def _electrostatic(self, law: Electrostatic) -> object:
        return self._module.Electrostatic(law.strength, law.softening, law.sign == "count")
