"""Whole-model launches on a GPU, in Triton or in CUDA C++: one for each operation, however many rows."""

from types import ModuleType

import torch
from torch import Tensor

from efreg.backends import native
from efreg.backends.native import BackendUnavailable
from efreg.backends.protocol import Backend, Grads, Kept, fused
from efreg.backends.rows import Groups, Rows
from efreg.backends.table import Table, shapes_of, table_of
from efreg.backends.transfer import capturing, keep_if_captured, on_device
from efreg.force.laws import DIRECTIONS, Factor, Law


class Launched(Backend):
    """Kernels that have measure, charge, pull and shrink as kernels/force.py defines them.

    Nothing here waits for the device. Other laws than the paper's run as torch between the launches.
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

    def _load(self) -> ModuleType:
        raise NotImplementedError

    def measure(self, rows: Rows, *, sign: str, norm: bool) -> tuple[Tensor, Tensor, Tensor | None]:
        table = table_of(rows)
        magnitude, balance = torch.empty_like(table.magnitude), torch.empty_like(table.balance)
        norms = torch.empty_like(table.magnitude) if norm else None
        table.read(rows)
        self._launch("measure", table, magnitude, balance, norms, sign == "count")
        return magnitude, balance, norms

    def pull(self, grads: Grads, rows: Rows, coefficients: Tensor, *, scale: Factor, direction: str) -> None:
        table = table_of(rows)
        table.check(coefficients)
        there = [grad for grad in grads if grad is not None]
        targets, copies = table.targets(grads, there, rows)
        table.read(rows)
        along = DIRECTIONS.index(direction)
        self._launch("pull", table, table.units, targets, coefficients, table.scale(scale), along)
        for grad, copy in copies:
            grad.detach().copy_(copy)
        torch.autograd.graph.increment_version(there)

    def shrink(
        self,
        rows: Rows,
        coefficients: Tensor,
        *,
        rates: list[Factor],
        found_inf: Tensor | None = None,
        direction: str,
    ) -> None:
        table = table_of(rows)
        table.check(coefficients)
        skip = on_device(0.0 if found_inf is None else found_inf, table.magnitude)
        table.read(rows)
        along = DIRECTIONS.index(direction)
        self._launch("shrink", table, table.units, coefficients, table.rates(rates), skip, along)
        table.write(rows)
        torch.autograd.graph.increment_version(rows.tensors)

    def charge(self, groups: Groups, coefficients: Tensor, law: Law, kept: Kept | None = None) -> None:
        if not fused(law):
            return super().charge(groups, coefficients, law, kept)
        table = table_of(groups.rows)
        table.check(coefficients)
        numbers = table.law([law.strength, law.softening])
        shapes = shapes_of(groups, table.device)
        table.read(groups.rows)
        self._launch(
            "charge", table, *shapes, table.magnitude, table.balance, coefficients,
            numbers, law.sign == "count",
        )  # fmt: skip

    def _launch(self, operation: str, table: Table, *arguments: object) -> None:
        getattr(self._kernels, operation)(table.tiles, table.layout, table.weights, *arguments, table.dtype)
        keep_if_captured(table.device, table, arguments)


class Triton(Launched):
    """Triton on CUDA; in Triton's interpreter (TRITON_INTERPRET=1) on the CPU, which is for tests."""

    name = "triton"

    def _load(self) -> ModuleType:
        return native.load_triton()


class Cuda(Launched):
    """The same launches in CUDA C++, for where Triton is not."""

    name = "cuda"

    def _load(self) -> ModuleType:
        if torch.version.hip or not torch.cuda.is_available():
            raise BackendUnavailable("there is no CUDA device here")
        return native.load(native.CUDA)
