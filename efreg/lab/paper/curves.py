"""Figure 2 in figures: what is left of each network at every ratio, nothing trained again."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite, nan

from efreg.lab.paper import markdown
from efreg.lab.paper.cuts import Outcome
from efreg.lab.paper.spread import spread
from efreg.lab.paper.tables import seeds_together

SHOWN = {
    "accuracy": "right after pruning",
    "recalibrated": "batch-norm statistics re-estimated",
    "repaired": "repaired without training",
}
"""The accuracies of a cut, and how each is called."""


@dataclass(frozen=True)
class Point:
    """A run at one cut: means over the n seeds that did not diverge, in percent, and standard deviations.

    ratio: the share of filters removed, or a list. speedup: MACs before / MACs after.
    """

    group: str
    network: str
    run: str
    ratio: str
    speedup: float
    accuracy: float
    accuracy_deviation: float
    recalibrated: float
    recalibrated_deviation: float
    n: int
    diverged: int
    epochs: str
    on: str
    repaired: float = nan
    repaired_deviation: float = nan


def points(titles: Mapping[str, str], outcomes: Iterable[Outcome]) -> list[Point]:
    """One for each run and cut. titles: of each group the network and its images."""
    return [_point(titles[found[0].group], found) for found in seeds_together(outcomes)]


def _point(network: str, found: Sequence[Outcome]) -> Point:
    first = found[0]
    accuracy, recalibrated, repaired = (spread(getattr(x, what) for x in found) for what in SHOWN)
    return Point(
        group=first.group,
        network=network,
        run=first.run,
        ratio=first.ratio,
        speedup=spread(x.speedup for x in found).mean,
        accuracy=accuracy.mean,
        accuracy_deviation=accuracy.deviation,
        recalibrated=recalibrated.mean,
        recalibrated_deviation=recalibrated.deviation,
        repaired=repaired.mean,
        repaired_deviation=repaired.deviation,
        n=accuracy.n,
        diverged=accuracy.diverged,
        epochs=first.epochs,
        on=first.on,
    )


def known(points: Iterable[Point], shown: Iterable[str]) -> list[str]:
    """The accuracies that are to be shown, without those of repairs where nothing was repaired."""
    repaired = any(isfinite(point.repaired) for point in points)
    return [what for what in shown if repaired or what != "repaired"]


def table(heading: str, points: Sequence[Point], shown: Iterable[str]) -> str:
    """Markdown: of each network a table for each of the accuracies that are to be shown."""
    parts = [f"### {heading}"]
    for network in dict.fromkeys(point.network for point in points):
        own = [point for point in points if point.network == network]
        for what in known(own, shown):
            parts += [f"{network}: accuracy in %, {SHOWN[what]}", _table(own, what)]
    parts += ["Means over n seeds, ± standard deviation, on the whole test set."]
    return "\n\n".join(parts)


def _table(points: Sequence[Point], what: str) -> str:
    speedups = {point.ratio: point.speedup for point in sorted(points, key=lambda point: point.n)}
    runs: dict[tuple[str, str], dict[str, Point]] = {}
    for point in points:
        runs.setdefault((point.group, point.run), {})[point.ratio] = point
    costs = ["speedup", *(f"{speedup:.2f}×" for speedup in speedups.values()), "", "", ""]
    body = [_cells(found, speedups, what) for found in runs.values()]
    return markdown.table(["run", *speedups, "n", "epochs", "on"], [*body, costs])


def _cells(found: Mapping[str, Point], ratios: Iterable[str], what: str) -> list[str]:
    first = next(iter(found.values()))
    kept = [_cell(found[ratio], what) if ratio in found else "" for ratio in ratios]
    return [first.run, *kept, markdown.seeds(first.n, first.diverged), first.epochs, first.on]


def _cell(point: Point, what: str) -> str:
    return markdown.figure(getattr(point, what), getattr(point, f"{what}_deviation"))
