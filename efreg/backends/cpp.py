"""C++ on the CPU."""

from torch import Tensor

from efreg.backends import native
from efreg.backends.protocol import Backend, Grads, fused
from efreg.backends.rows import Rows
from efreg.force.laws import DIRECTIONS


class Cpp(Backend):
    """The operations of csrc/cpu. Other laws than the paper's run as torch between them."""

    name = "cpp"

    def __init__(self, device):
        self._module = native.load(native.CPP)

    def measure(self, rows, *, sign, norm):
        magnitude, balance, norms = self._module.measure(rows.tensors, rows.dims, sign == "count", norm)
        return magnitude, balance, norms if norm else None

    def pull(self, grads, rows, coefficients, *, scale, direction):
        grads, rows = _with_gradient(grads, rows)
        if grads:
            along = DIRECTIONS.index(direction)
            self._module.pull(grads, rows.tensors, coefficients, rows.places, rows.dims, float(scale), along)

    def shrink(self, rows, coefficients, *, rates, found_inf=None, direction):
        if found_inf is not None and float(found_inf) != 0:
            return
        scales = [float(rate) for rate in rates]
        along = DIRECTIONS.index(direction)
        self._module.shrink(rows.tensors, coefficients, rows.places, rows.dims, scales, along)

    def charge(self, groups, coefficients, law, kept=None):
        if not fused(law):
            return super().charge(groups, coefficients, law, kept)
        rows = groups.rows
        self._module.charge(rows.tensors, coefficients, *groups.packed, rows.dims, self._electrostatic(law))

    def force(self, grads, rows, groups, coefficients, law, *, scale, kept=None):
        if not fused(law) or any(grad is None for grad in grads):
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

    def _electrostatic(self, law):
        return self._module.Electrostatic(law.strength, law.softening, law.sign == "count")


def _with_gradient(grads: Grads, rows: Rows) -> tuple[list[Tensor], Rows]:
    """The rows that have a gradient, and these."""
    active = [i for i, grad in enumerate(grads) if grad is not None]
    return [grads[i] for i in active], rows.only(active)
