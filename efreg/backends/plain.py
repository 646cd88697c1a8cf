"""Plain torch, tensor by tensor, on any device: the oracle of the other backends."""

import torch
from torch import Tensor

from efreg.backends import reference
from efreg.backends.protocol import Backend, Grads
from efreg.backends.rows import Rows
from efreg.force.laws import Factor


class Reference(Backend):
    """The functions of reference.py over rows."""

    name = "reference"

    @torch.no_grad()
    def measure(self, rows: Rows, *, sign: str, norm: bool) -> tuple[Tensor, Tensor, Tensor | None]:
        measured = [reference.measure(w, d, sign=sign, norm=norm) for w, d in zip(rows.tensors, rows.dims)]
        magnitudes, balances, norms = zip(*measured)
        return torch.cat(magnitudes), torch.cat(balances), torch.cat(norms) if norm else None

    @torch.no_grad()
    def pull(self, grads: Grads, rows: Rows, coefficients: Tensor, *, scale: Factor, direction: str) -> None:
        for grad, weight, dim, c in zip(grads, rows.tensors, rows.dims, rows.coefficients(coefficients)):
            if grad is not None:
                by = scale.to(c.device) if isinstance(scale, Tensor) else scale
                reference.pull(grad, weight, c, dim, scale=by, direction=direction)

    @torch.no_grad()
    def shrink(
        self,
        rows: Rows,
        coefficients: Tensor,
        *,
        rates: list[Factor],
        found_inf: Tensor | None = None,
        direction: str,
    ) -> None:
        for rate, weight, dim, c in zip(rates, rows.tensors, rows.dims, rows.coefficients(coefficients)):
            rate = rate.to(c.device) if isinstance(rate, Tensor) else rate
            scale = rate if found_inf is None else rate * (found_inf.to(c.device) == 0)
            reference.shrink(weight, c, dim, scale=scale, direction=direction)
