"""MACs and parameters of the paper's networks, whole and at every cut that it names; nothing is trained."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import isnan, nan

import torch

import efreg
from bench.paper.means import published
from bench.paper.recipes import Group, build
from bench.tables import markdown
from efreg.lab import engine
from efreg.lab.sweep import pruned


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


def measure(group: Group, device: torch.device) -> list[Size]:
    """The whole network, and its cuts in the order in which they are published."""
    model, example = build(group.base)
    whole = efreg.macs(model.eval(), example[:1])
    cuts = {cut.ratio: cut.speedup for cut in published("speedups") if cut.network == group.title}
    found = []
    for name, speedup in {"0.0": nan, **cuts}.items():
        ratio = name if name.startswith("[") else float(name)
        left = pruned(model, ratio, example, engine.planning(group.base))
        macs, parameters = efreg.macs(left, example[:1]), sum(p.numel() for p in left.parameters())
        found.append(Size(group.title, name, macs, parameters, whole / macs, speedup))
    return found


def table(heading: str, sizes: Sequence[Size]) -> str:
    """Markdown: what a cut leaves, and the speedup beside the one that the paper prints."""
    head = ["network", "removed", "MACs", "parameters", "speedup", "the paper's"]
    note = (
        "MACs of the convolutions and the classifier, for one image. ⌈ratio · N⌉ filters of each layer are "
        "removed; of ResNet-34 five blocks stay whole, as in GReg's code."
    )
    return "\n\n".join([f"### {heading}", markdown(head, map(_cells, sizes)), note])


def _cells(size: Size) -> list[str]:
    counts = [f"{size.macs:,}", f"{size.parameters:,}"]
    if isnan(size.published):
        return [size.network, "", *counts, "", ""]
    return [size.network, size.ratio, *counts, f"{size.speedup:.3f}×", f"{size.published:.2f}×"]
