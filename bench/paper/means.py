"""Means over seeds, as tables and pictures show them, and the published figures beside them."""

import statistics
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import isnan, nan
from pathlib import Path
from typing import TypeVar

from bench.paper.jobs import Outcome
from efreg.lab.logs import read_csv

T, K = TypeVar("T"), TypeVar("K", bound=Hashable)

PUBLISHED = Path(__file__).with_name("published.csv")
"""Figures of the paper (arXiv 2411.11079: Tables 4 to 6, section 6.1, speedups) and of Torch-Pruning's logs.

Right after pruning the paper tells what L1 loses beyond the electrostatic force: here is the sum.
Torch-Pruning prunes channels that residuals couple too: equal speedups come from other widths. Its VGG-19
pools once less than the paper's and is left out.
"""

OURS = "ours"
MEANS = ("speedup", "before", "macs", "macs_alive", "dead")
SPREADS = ("accuracy", "lost", "recalibrated", "repaired", "fine_tuned")
"""What has a mean, and what a standard deviation too."""


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
    def drop(self) -> float:
        """Points lost by pruning and fine-tuning."""
        return self.before - self.fine_tuned

    @property
    def seeds(self) -> str:
        """How many."""
        return f"{self.n} ({self.diverged} diverged)" if self.diverged else str(self.n)

    def cell(self, what: str, digits: int = 2) -> str:
        """The figure with its standard deviation, where there is one."""
        deviation = getattr(self, f"{what}_deviation", nan)
        spread = "" if isnan(deviation) else f" ± {deviation:.{digits}f}"
        return figure(getattr(self, what), digits) + spread


def figure(mean: float, digits: int = 2) -> str:
    """As it stands in a table; NaN is what diverged."""
    return "diverged" if isnan(mean) else f"{mean:.{digits}f}"


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
    first, shown = found[0], kept or found
    means = {what: _spread(getattr(x, what) for x in shown) for what in (*MEANS, *SPREADS)}
    return Mean(
        group=first.group,
        network=network,
        run=first.run,
        ratio=first.ratio,
        n=len(kept),
        diverged=len(found) - len(kept),
        epochs=first.epochs,
        on=first.on,
        **{what: mean for what, (mean, _) in means.items()},
        **{f"{what}_deviation": means[what][1] for what in SPREADS},
    )


def _spread(figures: Iterable[float]) -> tuple[float, float]:
    """Mean and standard deviation of those that are no NaN; NaN of too few."""
    kept = [figure for figure in figures if not isnan(figure)]
    mean = statistics.mean(kept) if kept else nan
    return mean, statistics.stdev(kept) if len(kept) > 1 else nan
