"""A training step as one CUDA graph: the host launches it once, not operation by operation."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

WARM_UP = 3
"""Steps before the capture: they choose algorithms, make the optimizer's state and take the charges."""


class GraphedStep:
    """`step`, a function like `engine.train_step`, captured once and replayed for batches of `size` images.

    The first WARM_UP steps and those on batches of another size are taken as they are. The optimizer must
    read a learning rate that lies on the device, as fused SGD does. What is returned is good until the next
    step.
    """

    def __init__(self, step: Callable[..., Tensor], size: int):
        self._step, self._size, self._warm = step, size, 0
        self._replay: Callable[[], None] | None = None

    def __call__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, inputs: Tensor, labels: Tensor, *more: Any
    ) -> Tensor:
        if len(labels) != self._size:
            return self._step(model, optimizer, inputs, labels, *more)
        if self._warm < WARM_UP:
            self._warm += 1
            return aside(lambda: self._step(model, optimizer, inputs, labels, *more))
        if self._replay is None:
            self._inputs, self._labels = inputs.clone(), labels.clone()
            self._rate = torch.zeros((), dtype=torch.float32, device=inputs.device)
            self._replay = capture(lambda: self._take(model, optimizer, *more))
        self._inputs.copy_(inputs)
        self._labels.copy_(labels)
        self._rate.fill_(optimizer.param_groups[0]["lr"])
        self._replay()
        return self._logits

    def _take(self, model: nn.Module, optimizer: torch.optim.Optimizer, *more: Any) -> None:
        """The step on what the graph reads: its own batch, and its own learning rate for all parameters."""
        rates = [group["lr"] for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            group["lr"] = self._rate
        self._logits = self._step(model, optimizer, self._inputs, self._labels, *more)
        for group, rate in zip(optimizer.param_groups, rates):
            group["lr"] = rate


def capture(work: Callable[[], None]) -> Callable[[], None]:
    """What launches again all that `work` would have launched on the GPU."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # loaders pin memory in other threads
        work()
    return graph.replay


def aside(work: Callable[[], Tensor]) -> Tensor:
    """What `work` returns, launched on another stream, as work has to be that is captured later."""
    here, stream = torch.cuda.current_stream(), torch.cuda.Stream()
    stream.wait_stream(here)
    with torch.cuda.stream(stream):
        made = work()
    here.wait_stream(stream)
    return made
