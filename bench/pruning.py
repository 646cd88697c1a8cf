"""What pruning costs: seconds beside Torch-Pruning, watching beside a forward pass, memory beside training's.

    python bench/pruning.py [--only NAME ...] [--rounds N] [--limit SECONDS] [--csv FILE]

Two images of 128 × 128, each measurement in a process of its own, the kinds in turns; a tiny network goes
first, so that nothing is imported while the clock runs. Seconds are CPU time of one thread.
"""

import argparse
import json
import math
import resource
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import peers
import rows
import torch
import zoo
from torch import nn

import efreg

NETWORKS = (
    "torchvision:resnet50",
    "torchvision:densenet201",
    "torchvision:mobilenet_v2",
    "torchvision:efficientnet_b0",
    "torchvision:regnet_y_400mf",
    "timm:rexnet_100",
    "timm:hrnet_w18_small",
    "torchvision:convnext_tiny",
)

Build = Callable[[], tuple[nn.Module, torch.Tensor]]


def ours(build: Build) -> dict[str, float]:
    """Seconds of plan, prune and proof; MACs before / after."""
    model, x = build()
    start = time.process_time()
    plan = efreg.plan(model, ratio=0.5, example_inputs=x)
    efreg.prune(model, plan, example_inputs=x)
    return {"s": time.process_time() - start, "x fewer MACs": plan.speedup}


def theirs(build: Build) -> dict[str, float]:
    """Seconds of Torch-Pruning; MACs before / after."""
    model, x = build()
    before = efreg.macs(model, x)
    start = time.process_time()
    peers.torch_pruning_half(model, x)
    return {"s": time.process_time() - start, "x fewer MACs": before / efreg.macs(model, x)}


def watching(build: Build) -> dict[str, float]:
    """Watching in forward passes without gradients, and what is over three of them as microseconds an id."""
    from efreg.pruning.watching import watch

    model, x = build()

    def timed(function: Callable) -> float:
        taken = []
        for _ in range(5):
            start = time.process_time()
            function(model, x)
            taken.append(time.process_time() - start)
        return statistics.median(taken)

    forward, watched = timed(torch.no_grad()(nn.Module.__call__)), timed(watch)
    ids = len(watch(model, x).ids)
    return {"forward passes": watched / forward, "us an id beyond 3": 1e6 * (watched - 3 * forward) / ids}


def memory_of_plan(build: Build) -> dict[str, float]:
    """The peak in MB while a network is built and planned."""
    model, x = build()
    efreg.plan(model, ratio=0.5, example_inputs=x)
    return {"MB": grown()}


def memory_of_a_step(build: Build) -> dict[str, float]:
    """The peak in MB while a network is built and run forward with gradients."""
    model, x = build()
    y = model(x)
    assert y.requires_grad
    return {"MB": grown()}


KINDS = {
    "plan, prune, proof": ("efreg", ours),
    "plan, prune": ("torch-pruning", theirs),
    "watching": ("efreg", watching),
    "memory of plan": ("efreg", memory_of_plan),
    "memory of a forward pass with gradients": ("torch", memory_of_a_step),
}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    options.add_argument("--only", nargs="+", default=NETWORKS, metavar="NAME")
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--limit", type=int, default=120, help="seconds that a measurement may take")
    options.add_argument("--csv", type=Path, default=rows.RESULTS / "pruning.csv")
    options.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    given = options.parse_args()
    torch.set_num_threads(1)
    if given.one:
        print(json.dumps(one(*given.one, given.limit)))
        return
    found = []
    for name in given.only:
        taken = [{kind: in_a_process(name, kind, given.limit) for kind in KINDS} for _ in range(given.rounds)]
        new = [row for kind in KINDS for row in rows_of(name, kind, [t[kind] for t in taken], given.limit)]
        for row in new:
            print(*(row[key] for key in ("shape", "what", "backend", "p50", "unit")), sep="  ", flush=True)
        found += new
        rows.write(given.csv, found)


def in_a_process(name: str, kind: str, limit: int) -> dict[str, float] | None:
    """What was measured, by unit; None where it takes too long."""
    command = [sys.executable, __file__, "--limit", str(limit), "--one", name, kind]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode == -signal.SIGXCPU:
        return None
    done.check_returncode()
    return json.loads(done.stdout.splitlines()[-1])


def rows_of(name: str, kind: str, taken: list[dict | None], limit: int) -> list[dict]:
    """A row for each unit; one that says so where the limit was reached."""
    backend, shape = KINDS[kind][0], f"{name}, 2 × 128²"
    known = {}
    if backend == "torch-pruning":
        known["versions"] = f"{rows.versions('cpu')}, torch-pruning {metadata.version('torch-pruning')}"
    if None in taken:
        known |= dict.fromkeys(("p20", "p50", "p80"), f"> {limit}")
        return [rows.row(kind, backend, shape, [limit, limit], "s") | known]
    several = taken * 2 if len(taken) == 1 else taken
    values = {unit: [each[unit] for each in several] for unit in several[0]}
    return [rows.row(kind, backend, shape, found, unit) | known for unit, found in values.items()]


def one(name: str, kind: str, limit: int) -> dict[str, float]:
    """One measurement, in this process, which is ended after so many seconds of it."""
    measured = KINDS[kind][1]

    def tiny() -> tuple[nn.Module, torch.Tensor]:
        layers = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Flatten()
        return nn.Sequential(*layers, nn.Linear(64, 2)).eval(), torch.randn(2, 3, 8, 8)

    case = zoo.cases()[name]
    measured(tiny)
    most = limit + math.ceil(time.process_time())
    resource.setrlimit(resource.RLIMIT_CPU, (most, resource.RLIM_INFINITY))
    from_here()
    return measured(lambda: (case.build(), case.inputs()))


def from_here() -> None:
    """Peaks of memory count from here on."""
    global _before
    Path("/proc/self/clear_refs").write_text("5")
    _before = resident("VmRSS")


def grown() -> float:
    """By how many MB the peak is over what there was."""
    return resident("VmHWM") - _before


def resident(key: str) -> float:
    """A figure of this process, in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 1024


_before = 0.0

if __name__ == "__main__":
    main()
