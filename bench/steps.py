"""Steps of training, and what they take when they are timed in turns."""

import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy


def training_step(
    model: nn.Module, images: Tensor, labels: Tensor, after_backward: Callable[[], None] = lambda: None
) -> Callable[[], None]:
    """A step of SGD with momentum on one batch."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad()
        cross_entropy(model(images), labels).backward()
        after_backward()
        optimizer.step()

    return step


def in_turns(
    functions: Mapping[str, Callable[[], None]], rounds: int, device: torch.device
) -> dict[str, list[float]]:
    """Seconds of each function in each round, so that whatever the machine does falls on all of them.

    A round more, the first, warms up and is left out.
    """
    taken: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds + 1):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if device.type != "cpu":
                torch.accelerator.synchronize(device)
            taken[name].append(time.perf_counter() - start)
    return {name: seconds[1:] for name, seconds in taken.items()}
