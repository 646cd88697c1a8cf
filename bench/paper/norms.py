"""Figure 3: the L1 norms of the filters of the first layers that the force acts on."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from bench.paper import jobs, runs
from bench.paper.jobs import Job, Say
from bench.paper.means import grouped
from bench.paper.recipes import build
from bench.tables import markdown
from efreg.lab import engine

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


def measure(job: Job, say: Say, tick: runs.Tick) -> list[Norm]:
    """Of the first planned layers of the trained network; none where it diverged."""
    try:
        network = jobs.train(job, tick)
    except engine.Diverged as error:
        say(f"{job}: {error}")
        return []
    example = build(job.settings)[1].to(next(network.parameters()).device)
    layers = list(engine.plan(network, job.settings, example))[:LAYERS]
    return [
        Norm(job.group.name, job.recipe.name, layer, place, norm, job.course, job.on)
        for layer in layers
        for place, norm in enumerate(sorted_norms(network.get_submodule(layer).weight))
    ]


@torch.no_grad()
def sorted_norms(weight: torch.Tensor) -> list[float]:
    """Of each filter, as shares of the largest, which comes first."""
    norms = weight.flatten(1).abs().sum(1).sort(descending=True).values
    return (norms / norms[0].clamp_min(torch.finfo(norms.dtype).tiny)).tolist()


def table(heading: str, titles: Mapping[str, str], found: Iterable[Norm]) -> str:
    """Markdown: of each layer how many filters have a norm below these shares of the largest."""
    layers = grouped(found, lambda n: (titles[n.group], n.run, n.layer, n.epochs, n.on))
    below = [
        [*key[:3], str(len(norms)), *(str(sum(n.norm < share for n in norms)) for share in SHARES), *key[3:]]
        for key, norms in layers.items()
    ]
    shares = [f"below {100 * share:g} %" for share in SHARES]
    head = ["network", "run", "layer", "filters", *shares, "epochs", "on"]
    note = "How many filters have an L1 norm below these shares of the layer's largest, seed 0."
    return "\n\n".join([f"### {heading}", markdown(head, below), note])
