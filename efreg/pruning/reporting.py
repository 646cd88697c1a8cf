"""What pruning changed: MACs, parameters, bytes and measured latency, before and after."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from efreg.groups import unwrap
from efreg.pruning.inspecting import Inspection
from efreg.pruning.layers import Layer, layers_of
from efreg.pruning.plans import Plan
from efreg.pruning.running import device_of, evaluation, forward, macs_by_module, shapes


@dataclass(frozen=True)
class Figures:
    """One model's size and cost.

    macs: multiply-accumulates of a forward pass of the example inputs, of convolutions and linear layers.
    parameters: how many numbers are trained. bytes: of parameters and buffers. latency: milliseconds, median.
    layers: what each module costs.
    """

    macs: int
    parameters: int
    bytes: int
    latency: float
    layers: tuple[Layer, ...] = field(repr=False)


@dataclass(frozen=True)
class Report:
    """Two models side by side; `str` gives a table.

    network: the class of the first. inputs: the shapes of the example inputs. device: what the latency was
        measured on, with threads on the CPU.
    """

    before: Figures
    after: Figures
    network: str
    inputs: str
    device: str

    @property
    def speedup(self) -> float:
        """MACs before / MACs after, the papers' speedup."""
        return self.before.macs / self.after.macs

    @property
    def measured_speedup(self) -> float:
        """Latency before / latency after."""
        return self.before.latency / self.after.latency

    @property
    def compression(self) -> float:
        """Parameters before / parameters after."""
        return self.before.parameters / self.after.parameters

    @property
    def rows(self) -> list[tuple[str, str, str, str]]:
        """The table, its header first."""
        b, a = self.before, self.after
        return [
            ("", "before", "after", "ratio"),
            ("MACs", f"{b.macs:,}", f"{a.macs:,}", f"{self.speedup:.3f}"),
            ("parameters", f"{b.parameters:,}", f"{a.parameters:,}", f"{self.compression:.3f}"),
            ("bytes", f"{b.bytes:,}", f"{a.bytes:,}", f"{b.bytes / a.bytes:.3f}"),
            ("latency, ms", f"{b.latency:.2f}", f"{a.latency:.2f}", f"{self.measured_speedup:.3f}"),
        ]

    def __str__(self) -> str:
        widths = [max(map(len, column)) for column in zip(*self.rows, strict=True)]
        return "\n".join(_line(row, widths) for row in self.rows)

    def to_html(
        self,
        inspection: Inspection | None = None,
        plan: Plan | None = None,
        *,
        curves: Mapping[str, Sequence[tuple[float, float]]] | None = None,
        title: str | None = None,
        command: str | None = None,
    ) -> str:
        """A page to look at, one file that needs no network: what was cut, and what each layer costs.

        inspection: of the first model. plan: what was cut from it. With both the page has the widths of all
            groups before and after, and what stays and why.
        curves: of each name the accuracies in percent at ratios, as pairs (ratio, accuracy).
        title: the heading, the network's class where there is none. command: what made the page.

        Raises ValueError where one of inspection and plan is missing, ImportError without matplotlib or
        Jinja, which the extra `lab` brings.
        """
        from efreg.pruning.page import Page

        if (inspection is None) != (plan is None):
            raise ValueError("a page with widths needs the plan and the inspection of the network: give both")
        return Page(
            title=title or self.network,
            table=self.rows,
            note=f"Of a forward pass of {self.inputs}; latency is a median, measured here on {self.device}.",
            before=self.before.layers,
            after=self.after.layers,
            curves=curves or {},
            command=command,
            **({} if inspection is None or plan is None else _groups(inspection, plan)),
        ).html()


def report(before: nn.Module, after: nn.Module, *, example_inputs: Any, repeats: int = 20) -> Report:
    """Compares two models on the example inputs, in eval mode without gradients; both stay as they were.

    Latency is the median of `repeats` runs of each, taken in turns after a warm-up, so that a drift of the
    machine's speed falls on both.

    example_inputs: a tensor, a tuple of arguments or a dict of keyword arguments, on the models' device.

    Raises ValueError naming the shapes where a model cannot take the example inputs.
    """
    models = unwrap(before), unwrap(after)
    layers = [layers_of(model, example_inputs) for model in models]
    first, second = map(_figures, models, layers, _latencies(models, example_inputs, repeats))
    return Report(
        first,
        second,
        type(models[0]).__name__,
        shapes(example_inputs),
        _described(device_of(models[0])),
    )


def macs(model: nn.Module, example_inputs: Any) -> int:
    """Multiply-accumulates of one forward pass in eval mode: half the FLOPs of torch's FlopCounterMode.

    Biases, norms and activations are free. Raises ValueError naming the shapes where the model cannot take
    the example inputs.
    """
    return macs_by_module(unwrap(model), example_inputs).total()


def _groups(inspection: Inspection, plan: Plan) -> dict[str, Any]:
    """What a page says of groups: their units before and after, and what stays."""
    removed = {cut.name: cut.removed for cut in plan.cuts}
    reasons = inspection.reasons
    for x in plan.left_out:
        reasons.setdefault(f"the proof refused them: {x.reason}", []).append(x.group.name)
    left = {group.name: group.size - removed.get(group.name, 0) for group in inspection.groups}
    return {"groups": inspection.groups, "left": left, "reasons": reasons}


def _figures(model: nn.Module, layers: tuple[Layer, ...], latency: float) -> Figures:
    tensors = (*model.parameters(), *model.buffers())
    return Figures(
        macs=sum(layer.macs for layer in layers),
        parameters=sum(layer.parameters for layer in layers),
        bytes=sum(tensor.numel() * tensor.element_size() for tensor in tensors),
        latency=latency,
        layers=layers,
    )


def _described(device: torch.device) -> str:
    if device.type == "cpu":
        return f"the CPU (threads: {torch.get_num_threads()})"
    return torch.get_device_module(device).get_device_name(device)


def _latencies(models: tuple[nn.Module, ...], example_inputs: Any, repeats: int) -> list[float]:
    """The median milliseconds of each model's forward pass."""
    times: list[list[float]] = [[] for _ in models]
    with evaluation(*models):
        for _ in range(3):
            for model in models:
                forward(model, example_inputs)
        for _ in range(repeats):
            for model, taken in zip(models, times, strict=True):
                taken.append(_milliseconds(partial(forward, model, example_inputs), device_of(model)))
    return [statistics.median(taken) for taken in times]


def _milliseconds(run: Callable[[], Any], device: torch.device) -> float:
    _synchronize(device)
    start = time.perf_counter()
    run()
    _synchronize(device)
    return 1e3 * (time.perf_counter() - start)


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _line(cells: tuple[str, ...], widths: list[int]) -> str:
    figures = [f"{cell:>{width}}" for cell, width in zip(cells[1:], widths[1:], strict=True)]
    return "  ".join([cells[0].ljust(widths[0]), *figures])
