"""Means over seeds, the published figures beside them, their tables, and figure 2."""

import statistics
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from math import isfinite, isnan, nan
from pathlib import Path
from typing import TypeVar

from bench.paper.jobs import Outcome
from bench.paper.recipes import NOTES, Group
from bench.tables import markdown, page
from efreg.lab import figures
from efreg.lab.logs import read_csv
from efreg.lab.sweep import ACCURACIES
from efreg.lab.ways import way_of

T, K = TypeVar("T"), TypeVar("K", bound=Hashable)

PUBLISHED = Path(__file__).with_name("published.csv")
"""Figures of the paper (arXiv 2411.11079: Tables 4 to 6, section 6.1, speedups) and of Torch-Pruning's logs.

Right after pruning the paper tells what L1 loses beyond the electrostatic force: here is the sum.
Torch-Pruning's VGG-19 pools once less than the paper's and is left out.
"""

OURS = "ours"
MEANS = ("speedup", "before", "macs", "macs_alive", "dead")
SPREADS = ("accuracy", "lost", "recalibrated", "repaired", "fine_tuned")
"""What has a mean, and what a standard deviation too."""

ORIGIN = ["n", "epochs", "on"]
"""The heads of `Mean.origin`."""

NEAR = 0.03
"""Speedups that differ by at most this share stand in one column of what was lost."""


@dataclass(frozen=True)
class Mean:
    """A run at one cut over its n seeds that did not diverge; or a published figure, its group a command.

    Figures are those of `Outcome`; deviations are standard ones, NaN of one seed. printed_drop: what the
    paper prints where it is not before − fine_tuned.
    """

    group: str
    network: str
    run: str
    ratio: str = ""
    speedup: float = nan
    before: float = nan
    accuracy: float = nan
    accuracy_deviation: float = nan
    lost: float = nan
    lost_deviation: float = nan
    recalibrated: float = nan
    recalibrated_deviation: float = nan
    repaired: float = nan
    repaired_deviation: float = nan
    fine_tuned: float = nan
    fine_tuned_deviation: float = nan
    macs: float = nan
    macs_alive: float = nan
    dead: float = nan
    n: int = 0
    diverged: int = 0
    epochs: str = ""
    on: str = ""
    source: str = OURS
    printed_drop: float = nan

    @property
    def removed(self) -> float:
        """Percent of the filters of each layer, where the ratio is one share."""
        return 100 * float(self.ratio)

    @property
    def drop(self) -> float:
        """Points lost by pruning and fine-tuning."""
        return self.before - self.fine_tuned

    @property
    def seeds(self) -> str:
        """How many of ours."""
        if self.source != OURS:
            return ""
        return f"{self.n} ({self.diverged} diverged)" if self.diverged else str(self.n)

    @property
    def origin(self) -> list[str]:
        """The last cells of a row: seeds, epochs, and what computed."""
        return [self.seeds, self.epochs, self.on]

    def name(self, network: str) -> str:
        """In a table of this network, ours in bold; of another one that is named."""
        name = self.run if self.network == network else f"{self.network}: {self.run}"
        return f"**{name}**" if self.source == OURS else name

    def cell(self, what: str, digits: int = 2, *, spread: bool = True) -> str:
        """The figure, with its standard deviation where there is one; of ours NaN is what diverged."""
        mean, deviation = getattr(self, what), getattr(self, f"{what}_deviation", nan)
        if isnan(mean):
            return "diverged" if self.source == OURS else ""
        cell = f"{mean:.{digits}f}"
        return f"{cell} ± {deviation:.{digits}f}" if spread and not isnan(deviation) else cell


def published(what: str) -> list[Mean]:
    """Of a command the published figures."""
    return [mean for mean in read_csv(PUBLISHED, Mean) if mean.group == what]


def grouped(items: Iterable[T], key: Callable[[T], K]) -> dict[K, list[T]]:
    """The items of each key, in the order in which they come."""
    groups: dict[K, list[T]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups


def over_seeds(outcomes: Iterable[Outcome], titles: Mapping[str, str], ended: str = "accuracy") -> list[Mean]:
    """One for each run and cut, of the seeds that have the figure `ended`; of all where none has it.

    titles: of each group the network and its images.
    """
    runs = grouped(outcomes, lambda outcome: (outcome.group, outcome.run, outcome.ratio))
    return [_mean(titles[group], found, ended) for (group, *_), found in runs.items()]


def _mean(network: str, found: Sequence[Outcome], ended: str) -> Mean:
    kept = [x for x in found if not isnan(getattr(x, ended))]
    told = {what: getattr(found[0], what) for what in ("group", "run", "ratio", "epochs", "on")}
    for what in (*MEANS, *SPREADS):
        figures = [figure for x in kept or found if not isnan(figure := getattr(x, what))]
        told[what] = statistics.mean(figures) if figures else nan
        if what in SPREADS:
            told[f"{what}_deviation"] = statistics.stdev(figures) if len(figures) > 1 else nan
    return Mean(network=network, n=len(kept), diverged=len(found) - len(kept), **told)


def fine_tuned(heading: str, means: Sequence[Mean]) -> str:
    """Tables 4 to 6, by speedup, ours in bold; a footnote for each drop that the paper prints otherwise."""
    head = ["method", "base %", "pruned %", "drop", "speedup", "right after pruning %", *ORIGIN]
    network = next(mean.network for mean in means if mean.source != OURS)
    body, footnotes = [], []
    for mean in sorted(means, key=lambda mean: (isnan(mean.speedup), round(mean.speedup, 2))):
        drop, speedup = mean.cell("drop"), "" if isnan(mean.speedup) else f"{mean.speedup:.2f}×"
        if not isnan(mean.printed_drop):
            mark = f"[{len(footnotes) + 1}]"
            footnotes.append(f"{mark} The paper prints {mean.printed_drop:.2f}.")
            drop += mark
        figures = [mean.cell("before"), mean.cell("fine_tuned"), drop, speedup]
        body.append([mean.name(network), *figures, mean.cell("accuracy", spread=False), *mean.origin])
    return page(heading, markdown(head, body), NOTES["fine_tuned"], *footnotes)


def lost(heading: str, means: Sequence[Mean]) -> str:
    """Points lost right after pruning: a table for each network, what is published first, ours in bold."""
    parts = []
    for network, own in grouped(means, lambda mean: mean.network).items():
        parts += [f"{network}: points lost right after pruning", _lost_table(own)]
    return page(heading, *parts, NOTES["lost"])


def _lost_table(means: Sequence[Mean]) -> str:
    columns = _columns(mean.speedup for mean in sorted(means, key=lambda mean: mean.source))
    body = []
    for found in grouped(means, lambda mean: (mean.source, mean.run, mean.epochs)).values():
        before = ", ".join(dict.fromkeys(filter(None, (mean.cell("before") for mean in found))))
        cells = [_lost_cell(found, column) for column in columns]
        body.append([found[0].name(found[0].network), before, *cells, *found[0].origin])
    return markdown(["method", "before %", *(f"{column:.2f}×" for column in columns), *ORIGIN], body)


def _columns(speedups: Iterable[float]) -> list[float]:
    """The speedups above 1 that there is to show; of those that are nearly the same the first."""
    columns: list[float] = []
    for speedup in speedups:
        if speedup > 1 and not any(_near(speedup, column) for column in columns):
            columns.append(speedup)
    return sorted(columns)


def _near(speedup: float, column: float) -> bool:
    return abs(speedup - column) <= NEAR * column


def _lost_cell(found: Sequence[Mean], column: float) -> str:
    """Of the figures that are near the column's speedup the one that is nearest."""
    near = [mean for mean in found if _near(mean.speedup, column)]
    if not near:
        return ""
    mean = min(near, key=lambda mean: abs(mean.speedup - column))
    other = "" if round(mean.speedup, 2) == round(column, 2) else f" ({mean.speedup:.2f}×)"
    return mean.cell("lost") + other


def shown(means: Iterable[Mean]) -> list[str]:
    """Right after pruning, and of the other accuracies those that there are."""
    rest = [what for what in ACCURACIES if any(isfinite(getattr(mean, what)) for mean in means)]
    return list(dict.fromkeys(("accuracy", *rest)))


def by_ratio(heading: str, means: Sequence[Mean]) -> str:
    """Figure 2: of each network a table for each of the accuracies that there are."""
    parts = []
    for network, own in grouped(means, lambda mean: mean.network).items():
        for what in shown(own):
            parts += [f"{network}: accuracy in %, {ACCURACIES[what]}", _ratio_table(own, what)]
    return page(heading, *parts, NOTES["by_ratio"])


def _ratio_table(means: Sequence[Mean], what: str) -> str:
    speedups = {mean.ratio: mean.speedup for mean in sorted(means, key=lambda mean: mean.n)}
    body = []
    for found in grouped(means, lambda mean: (mean.group, mean.run)).values():
        cells = {mean.ratio: mean.cell(what) for mean in found}
        body.append([found[0].run, *(cells.get(ratio, "") for ratio in speedups), *found[0].origin])
    body.append(["speedup", *(f"{speedup:.2f}×" for speedup in speedups.values()), "", "", ""])
    return markdown(["run", *speedups, *ORIGIN], body)


def picture(stem: Path, heading: str, group: Group, means: Sequence[Mean]) -> str:
    """Figure 2: accuracies against the ratio, the first against the speedup too. Names the files."""
    looks, shares = looks_of(group), [mean for mean in means if not mean.ratio.startswith("[")]
    runs = grouped(shares, lambda mean: mean.run)
    panels = [
        figures.Panel(ACCURACIES[what], figures.REMOVED, figures.curves(runs, "removed", what, looks))
        for what in shown(means)
    ]
    over_speedups = figures.curves(runs, "speedup", "accuracy", looks)
    label = "speedup: MACs before / MACs after"
    panels.insert(1, figures.Panel("the same, over the speedup", label, over_speedups, speedups=True))
    return draw(stem, panels, heading, f"{group.title}, whole test set: {epochs_of(group)}, {_seeds(means)}")


def _seeds(means: Sequence[Mean]) -> str:
    tried = {mean.n + mean.diverged for mean in means}
    least, most = min(tried), max(tried)
    if most == 1:
        return "one seed"
    return f"means of {least} to {most} seeds" if least < most else f"means of {most} seeds"


def epochs_of(group: Group) -> str:
    """How long its networks were trained, as pictures say it."""
    return f"{max(recipe.settings.epochs for recipe in group.recipes)} epochs with each force"


def looks_of(group: Group) -> dict[str, figures.Look]:
    """Of each run the colour of its force, the mark of what that pulls; the strongest of a kind is solid."""
    strongest_first = sorted(group.recipes, key=lambda recipe: -recipe.settings.alpha)
    kinds = grouped(strongest_first, lambda recipe: way_of(recipe.settings)[:2])
    return {
        recipe.name: figures.look_of(force, scope, style)
        for (force, scope), recipes in kinds.items()
        for recipe, style in zip(recipes, cycle(figures.STYLES), strict=False)
    }


def draw(stem: Path, panels: Sequence[figures.Panel], heading: str, subtitle: str, **options) -> str:
    """Writes PNG and SVG. Names the files."""
    for suffix in (".png", ".svg"):
        figures.draw_panels(stem.with_name(stem.name + suffix), panels, heading, subtitle, **options)
    return f"{stem.name}.png, {stem.name}.svg"
