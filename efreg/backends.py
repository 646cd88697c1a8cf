"""Who carries the operations out: the same five methods over the filters of many tensors at once."""

import logging
import os
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from efreg import native, reference
from efreg.laws import L1, Charges, Electrostatic, Law
from efreg.native import BackendUnavailable

logger = logging.getLogger("efreg")


class Rows(NamedTuple):
    """Tensors of one device and dtype whose filters go through an operation together.

    Filter n of tensors[i] lies along dims[i] and has the coefficient coefficients[offsets[i] + n].
    """

    tensors: list[Tensor]
    dims: list[int]
    offsets: list[int]


class Reference:
    """Plain torch, tensor by tensor, on any device: the oracle of the others."""

    name = "reference"

    def measure(self, rows: Rows, *, sign: str, norm: bool) -> tuple[Tensor, Tensor, Tensor | None]:
        """Magnitudes, signs and, where `norm`, L2 norms of all filters, row behind row."""
        measured = [
            reference.measure(w, dim, sign=sign, norm=norm) for w, dim in zip(rows.tensors, rows.dims)
        ]
        magnitudes, signs, norms = zip(*measured)
        return torch.cat(magnitudes), torch.cat(signs), torch.cat(norms) if norm else None

    def pull(
        self, grads: list[Tensor], rows: Rows, coefficients: Tensor, *, scale: float | Tensor, radial: bool
    ) -> None:
        """grads += scale · c_n · sgn(w), or its radial twin."""
        for grad, (weight, dim, c) in zip(grads, _with_coefficients(rows, coefficients)):
            reference.pull(grad, weight, c, dim, scale=scale, radial=radial)

    def shrink(self, rows: Rows, coefficients: Tensor, *, scales: list[float | Tensor], radial: bool) -> None:
        """tensors[i] ← sgn(w) · max(|w| − scales[i] · c_n, 0), or its radial twin."""
        for scale, (weight, dim, c) in zip(scales, _with_coefficients(rows, coefficients)):
            reference.shrink(weight, c, dim, scale=scale, radial=radial)

    def charge(self, rows: Rows, coefficients: Tensor, law: Law) -> None:
        """Measures the filters and writes the law's coefficients of each."""
        measured = self.measure(rows, sign=law.sign, norm=law.measures_norm)
        for charges, offset in zip(charges_of(rows, *measured), rows.offsets):
            coefficients[offset : offset + len(charges.magnitude)] = law.coefficients(charges)

    def force(
        self, grads: list[Tensor], rows: Rows, coefficients: Tensor, law: Law, *, scale: float | Tensor
    ) -> None:
        """`charge`, then `pull`."""
        self.charge(rows, coefficients, law)
        self.pull(grads, rows, coefficients, scale=scale, radial=law.direction == "radial")


class Cpp(Reference):
    """C++ on the CPU. A law that it does not know runs as its torch method between the C++ operations."""

    name = "cpp"

    def __init__(self):
        self._module = native.load()

    def measure(self, rows, *, sign, norm):
        magnitude, signs, norms = self._module.measure(rows.tensors, rows.dims, sign == "count", norm)
        return magnitude, signs, norms if norm else None

    def pull(self, grads, rows, coefficients, *, scale, radial):
        self._module.pull(grads, rows.tensors, coefficients, rows.offsets, rows.dims, float(scale), radial)

    def shrink(self, rows, coefficients, *, scales, radial):
        scales = [float(scale) for scale in scales]
        self._module.shrink(rows.tensors, coefficients, rows.offsets, rows.dims, scales, radial)

    def charge(self, rows, coefficients, law):
        known = self._known(law)
        if known is None:
            return super().charge(rows, coefficients, law)
        self._module.charge(rows.tensors, coefficients, rows.offsets, rows.dims, known)

    def force(self, grads, rows, coefficients, law, *, scale):
        known = self._known(law)
        if known is None:
            return super().force(grads, rows, coefficients, law, scale=scale)
        self._module.force(grads, rows.tensors, coefficients, rows.offsets, rows.dims, known, float(scale))

    def _known(self, law: Law):
        """The law as the kernels know it; None for others, also subclasses: they may compute otherwise."""
        kind = self._module.Law.Kind
        if type(law) is Electrostatic:
            strength = law.alpha * law.k_e
            return self._module.Law(kind.electrostatic, strength, law.softening, law.sign == "count")
        if type(law) is L1:
            return self._module.Law(kind.l1, law.alpha, 0.0, True)
        return None


BACKENDS: dict[str, type[Reference]] = {"cpp": Cpp, "reference": Reference}
"""In the order in which `auto` tries them."""

SERVES: dict[str, tuple[str, ...]] = {"cpp": ("cpu",)}
"""The device types of each backend; one that is not named serves every device."""


def select(name: str, device: torch.device) -> Reference:
    """The backend that serves `device`: the one asked for by `name` or EFREG_BACKEND, or the first to be had.

    Raises ValueError for an unknown name, BackendUnavailable for one that cannot be had.
    """
    name = os.environ.get("EFREG_BACKEND", "auto") if name == "auto" else name
    if name == "auto":
        return _automatic(device.type)
    if name not in BACKENDS:
        raise ValueError(f"unknown backend {name!r}: there are auto, {', '.join(BACKENDS)}")
    if not serves(name, device.type):
        raise BackendUnavailable(
            f"backend {name!r} serves {', '.join(SERVES[name])}; the weights are on {device}"
        )
    return _backend(name)


def serves(name: str, device_type: str) -> bool:
    """Whether backend `name` is made for devices of this type."""
    return device_type in SERVES.get(name, (device_type,))


@cache
def _backend(name: str) -> Reference:
    return BACKENDS[name]()


@cache
def _automatic(device_type: str) -> Reference:
    for name in BACKENDS:
        if serves(name, device_type):
            try:
                backend = _backend(name)
                logger.info("backend %r serves %s", name, device_type)
                return backend
            except BackendUnavailable as error:
                logger.warning("backend %r cannot be had (%s): a slower one serves", name, error)
    raise AssertionError("the reference serves every device")


def charges_of(rows: Rows, magnitude: Tensor, sign: Tensor, norm: Tensor | None) -> list[Charges]:
    """The flat statistics of `measure`, cut into one `Charges` a row."""
    charges, start = [], 0
    for weight, dim in zip(rows.tensors, rows.dims):
        filters = weight.shape[dim]
        cut = slice(start, start + filters)
        size = weight.numel() // filters if filters else 0
        charges.append(Charges(magnitude[cut], sign[cut], size, None if norm is None else norm[cut]))
        start += filters
    return charges


def _with_coefficients(rows: Rows, coefficients: Tensor):
    for weight, dim, offset in zip(*rows):
        yield weight, dim, coefficients[offset : offset + weight.shape[dim]]
