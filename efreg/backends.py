"""Who carries the operations out, over the filters of many tensors at once."""

import logging
import os
from functools import cache

import torch
from torch import Tensor

from efreg import native, reference
from efreg.laws import Factor, Law
from efreg.native import BackendUnavailable
from efreg.sending import capturing, keep_if_captured, on_device
from efreg.table import Rows, Table

logger = logging.getLogger("efreg")


Grads = list[Tensor | None]
"""A gradient for each row, or None."""


class Backend:
    """The operations that a backend has, and those that are made of them."""

    name: str

    def __init__(self, device: torch.device):
        """Raises BackendUnavailable where it cannot be had on `device`."""

    def measure(self, rows: Rows, *, sign: str, norm: bool) -> tuple[Tensor, Tensor, Tensor | None]:
        """Magnitudes, signs and, where `norm`, L2 norms of all filters, row behind row."""
        raise NotImplementedError

    def pull(self, grads: Grads, rows: Rows, coefficients: Tensor, *, scale: Factor, radial: bool) -> None:
        """grads += scale · c_n · sgn(w), or its radial twin; a row whose gradient is None is left alone."""
        raise NotImplementedError

    def shrink(
        self,
        rows: Rows,
        coefficients: Tensor,
        *,
        rates: list[Factor],
        found_inf: Tensor | None = None,
        radial: bool,
    ) -> None:
        """w ← sgn(w) · max(|w| − rates[i] · c_n, 0), or its radial twin; nothing where found_inf is not 0."""
        raise NotImplementedError

    def charge(self, rows: Rows, coefficients: Tensor, law: Law) -> Tensor:
        """Writes the coefficients that the law gives the filters now; returns magnitudes, row behind row."""
        measured = self.measure(rows, **law.statistics)
        for c, charges in zip(rows.cut(coefficients), rows.charges(*measured)):
            c.copy_(law.of(charges))
        return measured[0]

    def force(
        self,
        grads: Grads,
        rows: Rows,
        coefficients: Tensor,
        law: Law,
        *,
        scale: Factor,
        measured: Rows | None = None,
    ) -> None:
        """`charge`, then `pull`. measured: the first of the rows, where these alone have charges."""
        self.charge(measured or rows, coefficients, law)
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
            if grad is not None:
                by = scale.to(c.device) if isinstance(scale, Tensor) else scale
                reference.pull(grad, weight, c, dim, scale=by, radial=radial)

    def shrink(self, rows, coefficients, *, rates, found_inf=None, radial):
        for rate, weight, dim, c in zip(rates, rows.tensors, rows.dims, rows.cut(coefficients)):
            rate = rate.to(c.device) if isinstance(rate, Tensor) else rate
            scale = rate if found_inf is None else rate * (found_inf.to(c.device) == 0)
            reference.shrink(weight, c, dim, scale=scale, radial=radial)


class Cpp(Backend):
    """C++ on the CPU. A law that it does not know runs as its torch method between the C++ operations."""

    name = "cpp"

    def __init__(self, device):
        self._module = native.load(native.CPP)

    def measure(self, rows, *, sign, norm):
        magnitude, signs, norms = self._module.measure(rows.tensors, rows.dims, sign == "count", norm)
        return magnitude, signs, norms if norm else None

    def pull(self, grads, rows, coefficients, *, scale, radial):
        grads, rows = _with_gradient(grads, rows)
        if grads:
            self._module.pull(
                grads, rows.tensors, coefficients, rows.offsets, rows.dims, float(scale), radial
            )

    def shrink(self, rows, coefficients, *, rates, found_inf=None, radial):
        if found_inf is not None and float(found_inf) != 0:
            return
        scales = [float(rate) for rate in rates]
        self._module.shrink(rows.tensors, coefficients, rows.offsets, rows.dims, scales, radial)

    def charge(self, rows, coefficients, law):
        if not law.native_kind:
            return super().charge(rows, coefficients, law)
        return self._module.charge(rows.tensors, coefficients, rows.offsets, rows.dims, self._known(law))

    def force(self, grads, rows, coefficients, law, *, scale, measured=None):
        if not law.native_kind or any(grad is None for grad in grads):
            return super().force(grads, rows, coefficients, law, scale=scale, measured=measured)
        charged = len((measured or rows).tensors)
        self._module.force(
            grads,
            rows.tensors,
            coefficients,
            rows.offsets,
            rows.dims,
            charged,
            self._known(law),
            float(scale),
        )

    def _known(self, law: Law):
        """The law as the kernels know it."""
        kind = getattr(self._module.Law.Kind, law.native_kind)
        return self._module.Law(kind, *law.native_numbers, law.sign == "count")


class Launched(Backend):
    """Whole-model launches on a GPU: one for each operation, however many rows there are.

    Its kernels have measure, charge, pull and shrink as kernels/force.py defines them. Nothing here waits for
    the device. A law that they do not know runs as its torch method between the launches.
    """

    def __init__(self, device: torch.device):
        if torch.cuda.is_initialized() and capturing(device):
            raise RuntimeError("a graph is being captured: do once outside what is to be captured")
        try:
            self._kernels = self._load()
            self.measure(Rows.of([torch.ones(1, 1, device=device)], [0]), sign="count", norm=False)
        except BackendUnavailable:
            raise
        except Exception as error:  # whatever a compiler, a driver or a launch may raise
            raise BackendUnavailable(
                f"{self.name} does not run on {device}: {native.last_line(error)}"
            ) from error

    def _load(self):
        raise NotImplementedError

    def measure(self, rows, *, sign, norm):
        table = rows.table
        magnitude, signs, norms = (torch.empty_like(table.magnitude) for _ in range(3))
        norms = norms if norm else None
        table.read(rows)
        self._launch("measure", table, magnitude, signs, norms, sign == "count")
        return magnitude, signs, norms

    def pull(self, grads, rows, coefficients, *, scale, radial):
        table = rows.table
        table.check(coefficients)
        targets, copies = table.targets(grads, rows)
        table.read(rows)
        self._launch("pull", table, targets, coefficients, table.scale(scale), radial)
        for grad, copy in copies:
            grad.copy_(copy)
        torch.autograd.graph.increment_version([grad for grad in grads if grad is not None])

    def shrink(self, rows, coefficients, *, rates, found_inf=None, radial):
        table = rows.table
        table.check(coefficients)
        found_inf = on_device(0.0 if found_inf is None else found_inf, table.magnitude)
        table.read(rows)
        self._launch("shrink", table, coefficients, table.rates(rates), found_inf, radial)
        table.write(rows)
        torch.autograd.graph.increment_version(rows.tensors)

    def charge(self, rows, coefficients, law):
        if law.native_kind not in self._kernels.KINDS:
            return super().charge(rows, coefficients, law)
        table = rows.table
        table.check(coefficients)
        numbers = table.law(law.native_numbers)
        table.read(rows)
        self._launch(
            "charge", table, table.magnitude, table.sign, coefficients, table.done, numbers,
            law.native_kind, law.sign == "count",
        )  # fmt: skip
        return table.magnitude

    def _launch(self, operation: str, table: Table, *arguments) -> None:
        getattr(self._kernels, operation)(table.tiles, table.layout, table.weights, *arguments, table.dtype)
        keep_if_captured(table.device, table, arguments)


class Triton(Launched):
    """Triton on CUDA; in Triton's interpreter (TRITON_INTERPRET=1) on the CPU, which is for tests."""

    name = "triton"

    def _load(self):
        return native.load_triton()


class Cuda(Launched):
    """The same launches in CUDA C++, for where Triton is not."""

    name = "cuda"

    def _load(self):
        if torch.version.hip or not torch.cuda.is_available():
            raise BackendUnavailable("there is no CUDA device here")
        return native.load(native.CUDA)


def _with_gradient(grads: Grads, rows: Rows) -> tuple[list[Tensor], Rows]:
    """The rows that have a gradient, and these."""
    active = [i for i, grad in enumerate(grads) if grad is not None]
    return [grads[i] for i in active], rows.only(active)


BACKENDS: dict[str, type[Backend]] = {"triton": Triton, "cuda": Cuda, "cpp": Cpp, "reference": Reference}
"""In the order in which `auto` tries them."""

SERVES: dict[str, tuple[str, ...]] = {"triton": ("cuda", "xpu"), "cuda": ("cuda",), "cpp": ("cpu",)}
"""The device types of each backend; one that is not named serves every device."""


def select(name: str, device: torch.device) -> Backend:
    """The backend that serves `device`: the one asked for by `name` or EFREG_BACKEND, or the first to be had.

    Raises ValueError for an unknown name, BackendUnavailable for one that cannot be had.
    """
    name = (os.environ.get("EFREG_BACKEND") or "auto") if name == "auto" else name
    if name == "auto":
        return _automatic(device)
    if name not in BACKENDS:
        raise ValueError(f"unknown backend {name!r}: there are auto, {', '.join(BACKENDS)}")
    if not serves(name, device.type):
        interpreted = name == "triton" and native.interpreting()
        served = "cpu while TRITON_INTERPRET is set" if interpreted else ", ".join(SERVES[name])
        raise BackendUnavailable(f"backend {name!r} serves {served}; the weights are on {device}")
    return _backend(name, device)


def serves(name: str, device_type: str) -> bool:
    """Whether backend `name` is made for such devices; Triton's interpreter reads the CPU's memory alone."""
    if name == "triton" and native.interpreting():
        return device_type == "cpu"
    return device_type in SERVES.get(name, (device_type,))


def _untried(name: str, device_type: str) -> bool:
    """Whether nobody has run this backend on such devices yet: it serves them by name only."""
    return name == "triton" and (device_type in ("cpu", "xpu") or torch.version.hip is not None)


@cache
def _backend(name: str, device: torch.device) -> Backend:
    return BACKENDS[name](device)


@cache
def _automatic(device: torch.device) -> Backend:
    for name in BACKENDS:
        if serves(name, device.type) and not _untried(name, device.type):
            try:
                backend = _backend(name, device)
                logger.info("backend %r serves %s", name, device)
                return backend
            except BackendUnavailable as error:
                logger.warning("backend %r cannot be had (%s): a slower one serves", name, error)
    raise AssertionError("the reference serves every device")
