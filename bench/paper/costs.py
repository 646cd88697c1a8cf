"""What networks and forces cost: MACs and latencies of cut networks, and training steps with a force."""

import copy
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from math import isnan, nan
from pathlib import Path

import torch

import efreg
from bench import peers
from bench.paper import runs
from bench.paper.accuracies import published
from bench.paper.recipes import HOURS, NOTES, Group, build
from bench.steps import in_turns, training_step
from bench.tables import counted, markdown, page
from efreg.lab import engine
from efreg.lab.logs import read_csv, write_csv
from efreg.lab.sweep import pruned

REPEATS = {1: 200, 128: 20}
"""How often the latency of so many images at once is taken."""

DENSE = "dense"
LOOPS = {"L1 through autograd": peers.l1_autograd, "electrostatic, the paper's loop": peers.paper_loop}
"""What others do after the backward pass, with the weights of the layers."""

ATTACHED = {
    "electrostatic, efreg": {"law": peers.LAW},
    "electrostatic, efreg, each step": {"law": peers.LAW, "refresh": 1},
    "ladder on the whole filter, efreg": {"law": "ladder", "alpha": 1e-4, "scope": "filter"},
}
STEPS = 10


@dataclass(frozen=True)
class Size:
    """A network cut once, or whole at ratio 0: MACs of one image, and how many times fewer they are.

    published: the speedup that the paper prints, NaN of the whole network.
    """

    network: str
    ratio: str
    macs: int
    parameters: int
    speedup: float
    published: float


def sizes(group: Group) -> Iterator[Size]:
    """Of the whole network, and of its cuts in the order in which they are published; nothing is trained."""
    model, example = build(group.base)
    whole = efreg.macs(model.eval(), example[:1])
    cuts = {cut.ratio: cut.speedup for cut in published("speedups") if cut.network == group.title}
    for name, speedup in {"0.0": nan, **cuts}.items():
        ratio = name if name.startswith("[") else float(name)
        left = pruned(model, ratio, example, engine.planning(group.base))
        macs, parameters = efreg.macs(left, example[:1]), sum(p.numel() for p in left.parameters())
        yield Size(group.title, name, macs, parameters, whole / macs, speedup)


def size_table(heading: str, found: Sequence[Size]) -> str:
    """Markdown: what a cut leaves, and the speedup beside the one that the paper prints."""
    body = []
    for size in found:
        counts, cut = [f"{size.macs:,}", f"{size.parameters:,}"], not isnan(size.published)
        speedups = [f"{size.speedup:.3f}×", f"{size.published:.2f}×"] if cut else ["", ""]
        body.append([size.network, size.ratio if cut else "", *counts, *speedups])
    head = ["network", "removed", "MACs", "parameters", "speedup", "the paper's"]
    return page(heading, markdown(head, body), NOTES["speedups"])


@dataclass(frozen=True)
class Latency:
    """Milliseconds that so many images take together through the network pruned at `ratio`, in float32."""

    ratio: float
    images: int
    milliseconds: float
    device: str
    threads: int


def latencies(group: Group, folder: Path) -> list[Latency]:
    """Of every number of images at all of the group's cuts: measured once, and kept in the folder."""
    path = folder / f"{runs.stem(f'{group.name} latency', group.base, group.cuts)}.csv"
    if not path.exists():
        write_csv(path, _latencies(group))
    return read_csv(path, Latency)


def _latencies(group: Group) -> Iterator[Latency]:
    model, example = build(group.base)
    example = example[:1].expand(max(REPEATS), -1, -1, -1).contiguous()
    model, example = (engine.placed(x, group.base) for x in (model.eval(), example))
    for images, repeats in REPEATS.items():
        for ratio in group.cuts:
            small = pruned(model, ratio, example[:2], engine.planning(group.base))
            report = efreg.report(model, small, example_inputs=example[:images], repeats=repeats)
            yield Latency(ratio, images, report.after.latency, example.device.type, torch.get_num_threads())


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


def step_times(group: Group) -> Iterator[StepTime]:
    """A training step without a force and with each, every one on its own copy of the network, in turns."""
    device = engine.device_named(group.base.device)
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
    return _step_times(group, in_turns(steps, STEPS, device), engine.computer(device))


def _step_times(group: Group, taken: dict[str, list[float]], device: str) -> Iterator[StepTime]:
    hours = HOURS.get(group.title, {})
    for method, seconds in taken.items():
        ratios = [a / b for a, b in zip(seconds, taken[DENSE], strict=True)]
        low, *_, high = statistics.quantiles(ratios, n=5)
        yield StepTime(
            group.title,
            method,
            milliseconds=1e3 * statistics.median(seconds),
            ratio=statistics.median(ratios),
            low=low,
            high=high,
            steps=len(seconds),
            batch_size=group.base.batch_size,
            device=device,
            threads=torch.get_num_threads(),
            paper_hours=hours.get(method, nan),
            paper_ratio=hours.get(method, nan) / hours.get(DENSE, nan),
        )


def step_table(heading: str, found: Sequence[StepTime]) -> str:
    """Markdown: the paper's hours and their ratios, and our step times and theirs."""
    body = []
    for time in found:
        paper = [f"{time.paper_hours:.2f}", f"×{time.paper_ratio:.2f}"]
        paper = ["", ""] if isnan(time.paper_hours) else paper
        ours = [f"{time.milliseconds:.0f}", f"×{time.ratio:.3f}", f"{time.low:.3f} to {time.high:.3f}"]
        body.append([time.network, time.method, *paper, *ours])
    head = ["network", "method", "paper: hours", "ratio", "ours: ms a step", "ratio", "20 to 80 %"]
    where = found[0].device + (f", {counted(found[0].threads, 'thread')}" if found[0].device == "cpu" else "")
    return page(heading, markdown(head, body), NOTES["step_times"].format(steps=found[0].steps, where=where))
