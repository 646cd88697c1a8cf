"""What pruning changed: MACs, parameters, bytes and measured latency, before and after."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from efreg.groups import unwrap
from efreg.pruning.running import count_macs, device_of, evaluation, forward


@dataclass(frozen=True)
class Figures:
    """One model's size and cost.

    macs: multiply-accumulates of a forward pass of the example inputs, of convolutions and linear layers.
    parameters: how many numbers are trained. bytes: of parameters and buffers. latency: milliseconds, median.
    """

    macs: int
    parameters: int
    bytes: int
    latency: float


@dataclass(frozen=True)
class Report:
    """Two models side by side; `str` gives a table."""

    before: Figures
    after: Figures

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

    def __str__(self) -> str:
        b, a = self.before, self.after
        rows = [
            ("", "before", "after", "ratio"),
            ("MACs", f"{b.macs:,}", f"{a.macs:,}", f"{self.speedup:.3f}"),
            ("parameters", f"{b.parameters:,}", f"{a.parameters:,}", f"{self.compression:.3f}"),
            ("bytes", f"{b.bytes:,}", f"{a.bytes:,}", f"{b.bytes / a.bytes:.3f}"),
            ("latency, ms", f"{b.latency:.2f}", f"{a.latency:.2f}", f"{self.measured_speedup:.3f}"),
        ]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join(_line(row, widths) for row in rows)


def report(before: nn.Module, after: nn.Module, *, example_inputs: Any, repeats: int = 20) -> Report:
    """Compares two models on the example inputs, in eval mode without gradients; both stay as they were.

    Latency is the median of `repeats` runs of each, taken in turns after a warm-up, so that a drift of the
    machine's speed falls on both.

    example_inputs: a tensor, a tuple of arguments or a dict of keyword arguments, on the models' device.

    Raises ValueError naming the shapes where a model cannot take the example inputs.
    """
    models = unwrap(before), unwrap(after)
    counts = [macs(model, example_inputs) for model in models]
    latencies = _latencies(models, example_inputs, repeats)
    return Report(*map(_figures, models, counts, latencies))


def macs(model: nn.Module, example_inputs: Any) -> int:
    """Multiply-accumulates of one forward pass in eval mode: half the FLOPs of torch's FlopCounterMode.

    Biases, norms and activations are free. Raises ValueError naming the shapes where the model cannot take
    the example inputs.
    """
    return count_macs(unwrap(model), example_inputs)


def _figures(model: nn.Module, macs: int, latency: float) -> Figures:
    parameters, buffers = list(model.parameters()), list(model.buffers())
    size = sum(tensor.numel() * tensor.element_size() for tensor in parameters + buffers)
    return Figures(macs, sum(parameter.numel() for parameter in parameters), size, latency)


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
