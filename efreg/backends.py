"""Who carries the operations out, over the filters of many tensors at once."""

import logging
import os
from functools import cache

import torch
from torch import Tensor

from efreg import native, reference
from efreg.laws import Law
from efreg.native import BackendUnavailable
from efreg.table import Rows

logger = logging.getLogger("efreg")


class Backend:
    """The operations that a backend has, and those that are made of them."""

    name: str

    def measure(self, rows: Rows, *, sign: str, norm: bool) -> tuple[Tensor, Tensor, Tensor | None]:
        """Magnitudes, signs and, where `norm`, L2 norms of all filters, row behind row."""
        raise NotImplementedError

    def pull(
        self, grads: list[Tensor], rows: Rows, coefficients: Tensor, *, scale: float | Tensor, radial: bool
    ) -> None:
        """grads += scale · c_n · sgn(w), or its radial twin."""
        raise NotImplementedError

    def shrink(self, rows: Rows, coefficients: Tensor, *, scales: list[float | Tensor], radial: bool) -> None:
        """tensors[i] ← sgn(w) · max(|w| − scales[i] · c_n, 0), or its radial twin."""
        raise NotImplementedError

    def charge(self, rows: Rows, coefficients: Tensor, law: Law) -> None:
        """Measures the filters and writes the law's coefficients of each."""
        measured = self.measure(rows, **law.statistics)
        for c, charges in zip(rows.cut(coefficients), rows.charges(*measured)):
            c.copy_(law.of(charges))

    def force(
        self, grads: list[Tensor], rows: Rows, coefficients: Tensor, law: Law, *, scale: float | Tensor
    ) -> None:
        """`charge`, then `pull`."""
        self.charge(rows, coefficients, law)
        self.pull(grads, rows, coefficients, scale=scale, radial=law.direction == "radial")


class Reference(Backend):
    """Plain torch, tensor by tensor, on any device: the oracle of the others."""

    name = "reference"

    def measure(self, rows, *, sign, norm):
        measured = [reference.measure(w, d, sign=sign, norm=norm) for w, d in zip(rows.tensors, rows.dims)]
        magnitudes, signs, norms = zip(*measured)
        return torch.cat(magnitudes), torch.cat(signs), torch.cat(norms) if norm else None

    def pull(self, grads, rows, coefficients, *, scale, radial):
        for grad, weight, dim, c in zip(grads, rows.tensors, rows.dims, rows.cut(coefficients)):
            reference.pull(grad, weight, c, dim, scale=scale, radial=radial)

    def shrink(self, rows, coefficients, *, scales, radial):
        for scale, weight, dim, c in zip(scales, rows.tensors, rows.dims, rows.cut(coefficients)):
            reference.shrink(weight, c, dim, scale=scale, radial=radial)


class Cpp(Backend):
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
        if not law.native_kind:
            return super().charge(rows, coefficients, law)
        self._module.charge(rows.tensors, coefficients, rows.offsets, rows.dims, self._known(law))

    def force(self, grads, rows, coefficients, law, *, scale):
        if not law.native_kind:
            return super().force(grads, rows, coefficients, law, scale=scale)
        known, scale = self._known(law), float(scale)
        self._module.force(grads, rows.tensors, coefficients, rows.offsets, rows.dims, known, scale)

    def _known(self, law: Law):
        """The law as the kernels know it."""
        kind = getattr(self._module.Law.Kind, law.native_kind)
        return self._module.Law(kind, law.strength, law.softening, law.sign == "count")


BACKENDS: dict[str, type[Backend]] = {"cpp": Cpp, "reference": Reference}
"""In the order in which `auto` tries them."""

SERVES: dict[str, tuple[str, ...]] = {"cpp": ("cpu",)}
"""The device types of each backend; one that is not named serves every device."""


def select(name: str, device: torch.device) -> Backend:
    """The backend that serves `device`: the one asked for by `name` or EFREG_BACKEND, or the first to be had.

    Raises ValueError for an unknown name, BackendUnavailable for one that cannot be had.
    """
    name = (os.environ.get("EFREG_BACKEND") or "auto") if name == "auto" else name
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
def _backend(name: str) -> Backend:
    return BACKENDS[name]()


@cache
def _automatic(device_type: str) -> Backend:
    for name in BACKENDS:
        if serves(name, device_type):
            try:
                backend = _backend(name)
                logger.info("backend %r serves %s", name, device_type)
                return backend
            except BackendUnavailable as error:
                logger.warning("backend %r cannot be had (%s): a slower one serves", name, error)
    raise AssertionError("the reference serves every device")
