"""Table 3: what a force costs, as the ratio of a training step with it to one without, timed in turns."""

import copy
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from math import isnan, nan

import torch

import efreg
from bench import peers
from bench.paper.recipes import Group, build
from bench.steps import in_turns, training_step
from bench.tables import markdown
from efreg.lab import engine

DENSE, L1, LOOP = "dense", "L1 through autograd", "electrostatic, the paper's loop"
LOOPS = {L1: peers.l1_autograd, LOOP: peers.paper_loop}
"""What others do after the backward pass, with the weights of the layers."""

ATTACHED = {
    "electrostatic, efreg": {"law": peers.LAW},
    "electrostatic, efreg, each step": {"law": peers.LAW, "refresh": 1},
    "ladder on the whole filter, efreg": {"law": "ladder", "alpha": 1e-4, "scope": "filter"},
}
HOURS = {
    "ResNet-56, MNIST": {DENSE: 1.23, L1: 4.34, LOOP: 5.41},
    "ResNet-56, CIFAR-10": {DENSE: 1.05, L1: 3.05, LOOP: 4.91},
    "VGG-19, CIFAR-10": {DENSE: 0.73, L1: 7.42, LOOP: 12.06},
}
"""Of the paper's trainings, on an NVIDIA T600."""

STEPS = 10


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
    paper_hours: float
    paper_ratio: float


def measure(group: Group, device: torch.device) -> list[StepTime]:
    """A training step without a force and with each, every one on its own copy of the network, in turns."""
    first, example = (x.to(device) for x in build(group.base))
    plan = efreg.plan(first, ratio=0.5, **engine.planning(group.base), example_inputs=example)
    images = torch.randn(group.base.batch_size, *example.shape[1:], device=device)
    labels = torch.randint(10, (group.base.batch_size,), device=device)
    steps = {}
    for name in (DENSE, *LOOPS, *ATTACHED):
        network, more = copy.deepcopy(first), {}
        if name in ATTACHED:
            efreg.attach(network, layers=plan, **ATTACHED[name])
        if name in LOOPS:
            weights = [network.get_submodule(layer).weight for layer in plan]
            more["after_backward"] = partial(LOOPS[name], weights)
        steps[name] = training_step(network, images, labels, **more)
    taken = in_turns(steps, STEPS, device)
    return [_step_time(group, name, taken, device) for name in steps]


def _step_time(group: Group, name: str, taken: dict[str, list[float]], device: torch.device) -> StepTime:
    ratios = [a / b for a, b in zip(taken[name], taken[DENSE], strict=True)]
    fifths, hours = statistics.quantiles(ratios, n=5), HOURS.get(group.title, {})
    return StepTime(
        network=group.title,
        method=name,
        milliseconds=1e3 * statistics.median(taken[name]),
        ratio=statistics.median(ratios),
        low=fifths[0],
        high=fifths[-1],
        steps=STEPS,
        batch_size=group.base.batch_size,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        threads=torch.get_num_threads(),
        paper_hours=hours.get(name, nan),
        paper_ratio=hours.get(name, nan) / hours.get(DENSE, nan),
    )


def table(heading: str, found: Sequence[StepTime]) -> str:
    """Markdown: the paper's hours and their ratios, and our step times and theirs."""
    head = ["network", "method", "paper: hours", "ratio", "ours: ms a step", "ratio", "20 to 80 %"]
    first = found[0]
    threads = f", {first.threads} thread{'s' * (first.threads > 1)}" if first.device == "cpu" else ""
    note = (
        f"Ours: medians of {first.steps} steps timed in turns on {first.device}{threads}, float32, batches "
        "of 256 (MNIST) and 128; every force on the layers that a plan prunes. The paper: on an NVIDIA T600; "
        "its loop is here as its Algorithm 1 has it, not its authors' code."
    )
    return "\n\n".join([f"### {heading}", markdown(head, map(_cells, found)), note])


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
