"""A picture for each group of recipes: accuracies, norms, and what is traded for what is kept."""

from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path

from bench.paper.choice import choices, way_of
from bench.paper.jobs import Outcome
from bench.paper.means import Mean, grouped, over_seeds
from bench.paper.norms import Norm
from bench.paper.recipes import Group
from bench.paper.tables import ACCURACIES, shown
from efreg.lab import figures

Curves = Mapping[str, Sequence[tuple[float, float]]]
"""Points by the name of their run."""


def accuracies(stem: Path, heading: str, group: Group, means: Sequence[Mean], recalibrated: bool) -> str:
    """Figure 2: accuracies against the ratio, the first against the speedup too. Names the files."""
    looks = looks_of(group)
    panels = [
        figures.Panel(ACCURACIES[what], figures.REMOVED, _drawn(_by_ratio(means, what), looks))
        for what in shown(means, recalibrated)
    ]
    over_speedups = _drawn(_by_ratio(means, "accuracy", over_speedup=True), looks)
    label = "speedup: MACs before / MACs after"
    panels.insert(1, figures.Panel("the same, over the speedup", label, over_speedups, speedups=True))
    return _draw(stem, panels, heading, f"{group.title}, whole test set: {_epochs(group)}, {_seeds(means)}")


def _by_ratio(means: Sequence[Mean], what: str, *, over_speedup: bool = False) -> Curves:
    """Of each run the cuts that take one share of every layer."""
    shares = [mean for mean in means if mean.n and not mean.ratio.startswith("[")]
    return {
        run: [(m.speedup if over_speedup else 100 * float(m.ratio), getattr(m, what)) for m in found]
        for run, found in grouped(shares, lambda mean: mean.run).items()
    }


def _epochs(group: Group) -> str:
    return f"{max(recipe.settings.epochs for recipe in group.recipes)} epochs with each force"


def _seeds(means: Sequence[Mean]) -> str:
    tried = {mean.n + mean.diverged for mean in means}
    least, most = min(tried), max(tried)
    if most == 1:
        return "one seed"
    return f"means of {least} to {most} seeds" if least < most else f"means of {most} seeds"


def looks_of(group: Group) -> dict[str, figures.Look]:
    """Of each run the colour of its force, the mark of what that pulls; the strongest of a kind is solid."""
    strongest_first = sorted(group.recipes, key=lambda recipe: -recipe.settings.alpha)
    kinds = grouped(strongest_first, lambda recipe: way_of(recipe.settings)[:2])
    return {
        recipe.name: figures.look_of(force, scope, style)
        for (force, scope), recipes in kinds.items()
        for recipe, style in zip(recipes, cycle(figures.STYLES), strict=False)
    }


def norms(stem: Path, heading: str, group: Group, found: Sequence[Norm]) -> str:
    """Figure 3: a panel for each layer. Names the files."""
    looks, panels = looks_of(group), []
    for layer, own in grouped(found, lambda norm: norm.layer).items():
        runs = grouped(own, lambda norm: norm.run)
        curves = {run: [(norm.place, norm.norm) for norm in of_run] for run, of_run in runs.items()}
        panels.append(figures.Panel(layer, "filter, the largest first", _drawn(curves, looks)))
    subtitle = f"{group.title}: {_epochs(group)}, seed 0"
    return _draw(stem, panels, heading, subtitle, y_label="‖w‖₁ / largest ‖w‖₁", top=1)


def _drawn(curves: Curves, looks: Mapping[str, figures.Look]) -> list[figures.Curve]:
    return [figures.Curve(run, *zip(*found, strict=True), look=looks[run]) for run, found in curves.items()]


def _draw(stem: Path, panels: Sequence[figures.Panel], heading: str, subtitle: str, **options) -> str:
    for suffix in (".png", ".svg"):
        figures.draw_panels(stem.with_name(stem.name + suffix), panels, heading, subtitle, **options)
    return f"{stem.name}.png, {stem.name}.svg"


def trade(stem: Path, heading: str, group: Group, outcomes: Sequence[Outcome]) -> str:
    """Accuracy before, against accuracy without half of the filters, of every run. Names the file."""
    means = {(mean.run, mean.ratio): mean for mean in over_seeds(outcomes, {group.name: group.title})}
    chosen = {choice.run.name for choice in choices(group, outcomes)}
    points = [
        figures.Point(*way_of(group.recipe(run).settings), mean.before, mean.accuracy, run in chosen)
        for (run, ratio), mean in means.items()
        if ratio == "0.5" and mean.n
    ]
    subtitle = (
        f"{group.base.model} on {group.base.dataset}; all that was tried, large what stands in the table"
    )
    figures.draw_trade(stem.with_name(f"{stem.name}.png"), points, heading, subtitle)
    return f"{stem.name}.png"
