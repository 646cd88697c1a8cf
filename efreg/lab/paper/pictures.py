"""Figures 2 and 3, a picture for each group of recipes, as PNG and SVG."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

import torch

from efreg.lab import data, engine, figures
from efreg.lab.paper import cuts, markdown, runs
from efreg.lab.paper.curves import SHOWN, Point, known
from efreg.lab.paper.cuts import Job, Say
from efreg.lab.paper.recipes import Group, Recipe
from efreg.lab.paper.studies import force_of, scope_of

LAYERS = 2
"""Figure 3 shows as many, the first that the force acts on."""

SHARES = (0.01, 0.1, 0.5)
"""Of a layer's largest norm: figure 3's table counts the filters below."""


def accuracies(stem: Path, heading: str, group: Group, points: Sequence[Point], shown: Iterable[str]) -> str:
    """Figure 2: these accuracies against the ratio, the first against the speedup too. Names the files."""
    looks = looks_of(group)
    panels = [_accuracies(points, looks, SHOWN[what], what) for what in known(points, shown)]
    panels.insert(1, _accuracies(points, looks, "the same, over the speedup", "accuracy", over_speedup=True))
    subtitle = f"{group.title}, whole test set: {_epochs(group)}, {_seeds(points)}"
    return _draw(stem, panels, heading, subtitle)


def _epochs(group: Group) -> str:
    return f"{max(recipe.settings.epochs for recipe in group.recipes)} epochs with each force"


def _seeds(points: Sequence[Point]) -> str:
    tried = {point.n + point.diverged for point in points}
    least, most = min(tried), max(tried)
    if most == 1:
        return "one seed"
    return f"means of {least} to {most} seeds" if least < most else f"means of {most} seeds"


def looks_of(group: Group) -> dict[str, figures.Look]:
    """Of each run the colour of its force, the mark of what that pulls; the strongest of a kind is solid."""
    kinds: dict[tuple[str, str], list[Recipe]] = {}
    for recipe in sorted(group.recipes, key=lambda recipe: -recipe.settings.alpha):
        kind = force_of(recipe.settings).name, scope_of(recipe.settings)
        kinds.setdefault(kind, []).append(recipe)
    return {
        recipe.name: figures.look_of(force, scope, style)
        for (force, scope), recipes in kinds.items()
        for recipe, style in zip(recipes, cycle(figures.STYLES), strict=False)
    }


def _accuracies(
    points: Sequence[Point],
    looks: Mapping[str, figures.Look],
    heading: str,
    what: str,
    *,
    over_speedup: bool = False,
) -> figures.Panel:
    """Of each run the cuts that take one share of every layer."""
    curves: dict[str, list[tuple[float, float]]] = {}
    for point in points:
        if point.n and not point.ratio.startswith("["):
            removed = point.speedup if over_speedup else 100 * float(point.ratio)
            curves.setdefault(point.run, []).append((removed, getattr(point, what)))
    label = "speedup: MACs before / MACs after" if over_speedup else figures.REMOVED
    return figures.Panel(heading, label, _curves(curves, looks), speedups=over_speedup)


def _curves(
    runs: Mapping[str, Sequence[tuple[float, float]]], looks: Mapping[str, figures.Look]
) -> list[figures.Curve]:
    return [figures.Curve(run, *zip(*found, strict=True), look=looks[run]) for run, found in runs.items()]


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


def norms_of(job: Job, say: Say, tick: runs.Tick) -> list[Norm]:
    """Of the first planned layers of the trained network; none where it diverged."""
    try:
        network = cuts.train(job, tick)
    except engine.Diverged as error:
        say(f"{job}: {error}")
        return []
    shape = data.info(job.settings.dataset, job.settings.data).shape
    example = torch.zeros(2, *shape, device=next(network.parameters()).device)
    layers = list(engine.plan(network, job.settings, example))[:LAYERS]
    return [
        Norm(job.group.name, job.recipe.name, layer, place, norm, job.course, job.on)
        for layer in layers
        for place, norm in enumerate(_sorted_norms(network.get_submodule(layer).weight))
    ]


@torch.no_grad()
def _sorted_norms(weight: torch.Tensor) -> list[float]:
    norms = weight.flatten(1).abs().sum(1).sort(descending=True).values
    return (norms / norms[0].clamp_min(torch.finfo(norms.dtype).tiny)).tolist()


def norms(stem: Path, heading: str, group: Group, found: Sequence[Norm]) -> str:
    """Figure 3: a panel for each layer. Names the files."""
    looks = looks_of(group)
    panels = [
        _norms([n for n in found if n.layer == layer], looks)
        for layer in dict.fromkeys(n.layer for n in found)
    ]
    subtitle = f"{group.title}: {_epochs(group)}, seed 0"
    return _draw(stem, panels, heading, subtitle, y_label="‖w‖₁ / largest ‖w‖₁", top=1)


def norms_table(heading: str, titles: Mapping[str, str], found: Iterable[Norm]) -> str:
    """Markdown: of each layer how many filters have a norm below these shares of the largest."""
    layers: dict[tuple[str, str, str, str, str], list[float]] = {}
    for n in found:
        layers.setdefault((titles[n.group], n.run, n.layer, n.epochs, n.on), []).append(n.norm)
    below = [
        [*key[:3], str(len(norms)), *(str(sum(norm < share for norm in norms)) for share in SHARES), *key[3:]]
        for key, norms in layers.items()
    ]
    shares = [f"below {100 * share:g} %" for share in SHARES]
    head = ["network", "run", "layer", "filters", *shares, "epochs", "on"]
    note = "How many filters have an L1 norm below these shares of the layer's largest, seed 0."
    return "\n\n".join([f"### {heading}", markdown.table(head, below), note])


def _norms(found: Sequence[Norm], looks: Mapping[str, figures.Look]) -> figures.Panel:
    curves: dict[str, list[tuple[int, float]]] = {}
    for n in found:
        curves.setdefault(n.run, []).append((n.place, n.norm))
    return figures.Panel(found[0].layer, "filter, the largest first", _curves(curves, looks))


def _draw(stem: Path, panels: Sequence[figures.Panel], heading: str, subtitle: str, **options) -> str:
    for suffix in (".png", ".svg"):
        figures.draw_panels(stem.with_name(stem.name + suffix), panels, heading, subtitle, **options)
    return f"{stem.name}.png, {stem.name}.svg"
