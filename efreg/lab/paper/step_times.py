"""Table 3: what a force costs, as the ratio of a training step with it to one without, timed in turns."""

import copy
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import isnan, nan

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import efreg
from efreg.lab import models
from efreg.lab.paper import loops, markdown
from efreg.lab.paper.published import TABLE3

LADDER_ALPHA = 1e-4
DENSE = "dense"
PUBLISHED = {DENSE: "dense", "L1 through autograd": "l1", "electrostatic, the paper's loop": "electrostatic"}
"""The column of Table 3 that a method stands beside."""


@dataclass(frozen=True)
class Network:
    """A network as Table 3 has it, at the batch size of the paper."""

    title: str
    build: Callable[[], nn.Module]
    channels: int
    batch_size: int


NETWORKS = {
    "resnet56-mnist": Network("ResNet-56, MNIST", lambda: models.resnet56(in_channels=1), 1, 256),
    "resnet56-cifar10": Network("ResNet-56, CIFAR-10", models.resnet56, 3, 128),
    "vgg19-cifar10": Network("VGG-19, CIFAR-10", lambda: models.vgg19(num_classes=10), 3, 128),
}


@dataclass(frozen=True)
class StepTime:
    """Of so many steps the median time in milliseconds, and the median ratio to the dense step beside it.

    low, high: the 20th and the 80th percentile of the ratio. paper_hours, paper_ratio: of the paper's
    training, NaN for what it does not have.
    """

    network: str
    method: str
    milliseconds: float
    ratio: float
    low: float
    high: float
    steps: int
    batch_size: int
    device: str
    threads: int
    paper_hours: float = nan
    paper_ratio: float = nan


def methods(network: Network, device: torch.device) -> dict[str, Callable[[], None]]:
    """A training step without a force and with each, every one on its own copy of the network."""
    torch.manual_seed(0)
    first = network.build().to(device)
    forces = {
        DENSE: None,
        "L1 through autograd": loops.l1_autograd,
        "electrostatic, the paper's loop": loops.paper_loop,
        "electrostatic, efreg": None,
        "electrostatic, efreg, each step": None,
        "ladder on the whole filter, efreg": None,
    }
    nets = {name: copy.deepcopy(first) for name in forces}
    example = torch.zeros(2, network.channels, 32, 32, device=device)
    plan = efreg.plan(first, ratio=0.5, coupled=False, example_inputs=example)
    efreg.attach(nets["electrostatic, efreg"], law=loops.LAW, layers=plan)
    efreg.attach(nets["electrostatic, efreg, each step"], law=loops.LAW, layers=plan, refresh=1)
    ladder = nets["ladder on the whole filter, efreg"]
    efreg.attach(ladder, LADDER_ALPHA, law="ladder", layers=plan, scope="filter")
    images = torch.randn(network.batch_size, network.channels, 32, 32, device=device)
    labels = torch.randint(10, (network.batch_size,), device=device)
    return {name: _step(net, list(plan), images, labels, forces[name]) for name, net in nets.items()}


def _step(
    model: nn.Module, layers: Sequence[str], images: Tensor, labels: Tensor, force: Callable | None
) -> Callable[[], None]:
    """A step of SGD; the force takes the layers' weights and adds to their gradients."""
    weights = [model.get_submodule(layer).weight for layer in layers]
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad()
        cross_entropy(model(images), labels).backward()
        if force:
            force(weights)
        optimizer.step()

    return step


def measure(network: Network, device: torch.device, steps: int, tick: Callable[[], None]) -> list[StepTime]:
    """Every method's step in turns, so that what the machine does falls on all of them."""
    found = methods(network, device)
    taken: dict[str, list[float]] = {name: [] for name in found}
    for _ in range(steps + 1):
        for name, step in found.items():
            taken[name].append(_seconds(step, device))
        tick()
    return [_step_time(network, name, taken, device) for name in found]


def _seconds(step: Callable[[], None], device: torch.device) -> float:
    start = time.perf_counter()
    step()
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter() - start


def _step_time(network: Network, name: str, taken: dict[str, list[float]], device: torch.device) -> StepTime:
    own, dense = taken[name][1:], taken[DENSE][1:]  # the first is a warm-up
    ratios = [a / b for a, b in zip(own, dense, strict=True)]
    fifths = statistics.quantiles(ratios, n=5)
    hours = next(row for row in TABLE3 if row.network == network.title)
    paper_hours = getattr(hours, PUBLISHED[name]) if name in PUBLISHED else nan
    return StepTime(
        network=network.title,
        method=name,
        milliseconds=1e3 * statistics.median(own),
        ratio=statistics.median(ratios),
        low=fifths[0],
        high=fifths[-1],
        steps=len(own),
        batch_size=network.batch_size,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        threads=torch.get_num_threads(),
        paper_hours=paper_hours,
        paper_ratio=paper_hours / hours.dense,
    )


def table(heading: str, found: Sequence[StepTime]) -> str:
    """Markdown: the paper's hours and their ratios, and our step times and theirs."""
    head = ["network", "method", "paper: hours", "ratio", "ours: ms a step", "ratio", "20 to 80 %"]
    first = found[0]
    threads = f", {first.threads} thread{'s' * (first.threads > 1)}" if first.device == "cpu" else ""
    return "\n\n".join(
        [
            f"### {heading}",
            markdown.table(head, map(_cells, found)),
            f"Ours: medians of {first.steps} steps timed in turns on {first.device}{threads}, float32, "
            "batches of 256 (MNIST) and 128; every force on the layers that a plan prunes. The paper: on an "
            "NVIDIA T600; its loop is here as its Algorithm 1 has it, not its authors' code.",
        ]
    )


def _cells(time: StepTime) -> list[str]:
    published = [f"{time.paper_hours:.2f}", f"×{time.paper_ratio:.2f}"]
    return [
        time.network,
        time.method,
        *(["", ""] if isnan(time.paper_hours) else published),
        f"{time.milliseconds:.0f}",
        f"×{time.ratio:.3f}",
        f"{time.low:.3f} to {time.high:.3f}",
    ]
