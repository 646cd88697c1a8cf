"""Figure 3: the L1 norms of the filters of the first layers that the force acts on."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from bench.paper import jobs, runs
from bench.paper.accuracies import draw, epochs_of, grouped, looks_of
from bench.paper.jobs import Job
from bench.paper.recipes import NOTES, Group, build
from bench.tables import markdown, page
from efreg.lab import engine, figures

LAYERS = 2
"""How many layers are shown."""

SHARES = (0.01, 0.1, 0.5)
"""Of a layer's largest norm: the table counts the filters below."""


@dataclass(frozen=True)
class Norm:
    """The L1 norm of the filter at `place`, the largest being at 0, as a share of its layer's largest."""

    group: str
    run: str
    layer: str
    place: int
    norm: float
    epochs: str
    on: str


def measure(job: Job, watch: runs.Watch) -> list[Norm]:
    """Of the first planned layers of the trained network; none where it diverged."""
    network = jobs.train(job, watch)
    if network is None:
        return []
    example = build(job.settings)[1].to(next(network.parameters()).device)
    return [
        Norm(job.group.name, job.recipe.name, layer, place, norm, job.course, job.on)
        for layer in list(engine.plan(network, job.settings, example))[:LAYERS]
        for place, norm in enumerate(sorted_norms(network.get_submodule(layer).weight))
    ]


@torch.no_grad()
def sorted_norms(weight: torch.Tensor) -> list[float]:
    """Of each filter, as shares of the largest, which comes first."""
    norms = weight.flatten(1).abs().sum(1).sort(descending=True).values
    return (norms / norms[0].clamp_min(torch.finfo(norms.dtype).tiny)).tolist()


def table(heading: str, titles: Mapping[str, str], found: Iterable[Norm]) -> str:
    """Markdown: of each layer how many filters have a norm below these shares of the largest."""
    head = ["network", "run", "layer", "filters", *(f"below {100 * share:g} %" for share in SHARES)]
    layers = grouped(found, lambda n: (titles[n.group], n.run, n.layer, n.epochs, n.on))
    body = []
    for (*named, epochs, on), norms in layers.items():
        below = [sum(n.norm < share for n in norms) for share in SHARES]
        body.append([*named, *map(str, (len(norms), *below)), epochs, on])
    return page(heading, markdown([*head, "epochs", "on"], body), NOTES["norms"])


def picture(stem: Path, heading: str, group: Group, found: Sequence[Norm]) -> str:
    """A panel for each layer. Names the files."""
    panels = []
    for layer, own in grouped(found, lambda norm: norm.layer).items():
        curves = figures.curves(grouped(own, lambda norm: norm.run), "place", "norm", looks_of(group))
        panels.append(figures.Panel(layer, "filter, the largest first", curves))
    subtitle = f"{group.title}: {epochs_of(group)}, seed 0"
    return draw(stem, panels, heading, subtitle, y_label="‖w‖₁ / largest ‖w‖₁", top=1)
