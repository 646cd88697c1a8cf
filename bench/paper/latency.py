"""How long a cut network takes for one image, and for many."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

import efreg
from bench.paper import runs
from bench.paper.recipes import Group, build
from efreg.lab import engine
from efreg.lab.logs import read_csv, write_csv
from efreg.lab.sweep import pruned

REPEATS = {1: 200, 128: 20}
"""How often the latency of so many images at once is taken."""


@dataclass(frozen=True)
class Latency:
    """Milliseconds that so many images take together through the network pruned at `ratio`, in float32."""

    ratio: float
    images: int
    milliseconds: float
    device: str
    threads: int


def measure(group: Group, folder: Path) -> list[Latency]:
    """Of every number of images at all of the group's cuts: measured once, and kept in the folder."""
    path = folder / f"{runs.stem(f'{group.name} latency', group.base, group.cuts)}.csv"
    runs.once(path, lambda: write_csv(path, map(asdict, _measured(group))))
    return read_csv(path, Latency)


def _measured(group: Group) -> Iterator[Latency]:
    base, device = group.base, engine.device_named(group.base.device)
    model, example = build(base)
    example = example[:1].expand(max(REPEATS), -1, -1, -1).contiguous()
    layout = torch.channels_last if base.channels_last else torch.contiguous_format
    model, example = (x.to(device, memory_format=layout) for x in (model.eval(), example))
    for images, repeats in REPEATS.items():
        for ratio in group.cuts:
            small = pruned(model, ratio, example[:2], engine.planning(base))
            report = efreg.report(model, small, example_inputs=example[:images], repeats=repeats)
            yield Latency(ratio, images, report.after.latency, device.type, torch.get_num_threads())
