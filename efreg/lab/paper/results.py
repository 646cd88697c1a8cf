"""What a study's runs gave: rows of its CSV, their means over seeds, and the strength that is chosen."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import isnan, nan, sqrt
from pathlib import Path

from efreg.lab.logs import read_csv

RATIOS = (0.0, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
"""Before pruning, and the ratios over whose mean the strength of a force is chosen."""


@dataclass(frozen=True)
class Result:
    """A trained candidate cut at one ratio: one row of the CSV. Accuracies are in percent.

    chosen_by: on the held-out training images. accuracy, recalibrated: on the test images, right after
    pruning and with re-estimated batch-norm statistics; NaN where the training diverged. macs: of an image,
    through the network that is left. dead, macs_without: the dead filters of the network before it was
    pruned, and its MACs without them.
    """

    force: str
    scope: str
    update: str
    alpha: float
    seed: int
    ratio: float
    chosen_by: float
    accuracy: float
    recalibrated: float
    macs: int
    dead: int
    macs_without: int
    epochs: int
    dtype: str
    device: str


def read(path: str | Path) -> list[Result]:
    """The results of one run, or of several. Raises ValueError for a file that is not whole."""
    results = read_csv(path, Result)
    if not results or [r.ratio for r in results] != [*RATIOS] * (len(results) // len(RATIOS)):
        raise ValueError(f"{path} is not whole: remove it, and it is made again")
    return results


@dataclass(frozen=True)
class Line:
    """A way at one strength over its seeds: mean and standard deviation at each ratio.

    way: force, scope, update. chosen_by: of each seed the mean held-out accuracy over the ratios from 0.3 up.
    """

    way: tuple[str, str, str]
    alpha: float
    chosen_by: Mapping[int, float]
    accuracy: tuple[tuple[float, float], ...]
    recalibrated: tuple[tuple[float, float], ...]
    dead: float
    macs_without: float

    @property
    def seeds(self) -> int:
        """How many there are."""
        return len(self.chosen_by)

    @property
    def diverged(self) -> bool:
        """Whether the training of a seed did."""
        return isnan(self.accuracy[0][0])


def lines(results: Iterable[Result]) -> list[Line]:
    """The results, seeds taken together."""
    groups: dict[tuple, list[Result]] = {}
    for r in results:
        groups.setdefault((r.force, r.scope, r.update, r.alpha), []).append(r)
    return [_line(key, found) for key, found in groups.items()]


def _line(key: tuple, results: Sequence[Result]) -> Line:
    def spread(figure: str) -> tuple[tuple[float, float], ...]:
        at = ([getattr(r, figure) for r in results if r.ratio == ratio] for ratio in RATIOS)
        return tuple(map(_mean_and_deviation, at))

    *way, alpha = key
    held = {
        seed: statistics.mean(r.chosen_by for r in results if r.seed == seed and r.ratio)
        for seed in sorted({r.seed for r in results})
    }
    return Line(
        way=tuple(way),
        alpha=alpha,
        chosen_by=held,
        accuracy=spread("accuracy"),
        recalibrated=spread("recalibrated"),
        dead=statistics.mean(r.dead for r in results),
        macs_without=statistics.mean(r.macs_without for r in results),
    )


def _mean_and_deviation(values: Sequence[float]) -> tuple[float, float]:
    if any(map(isnan, values)):  # statistics.stdev takes no NaN
        return nan, nan
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0


@dataclass(frozen=True)
class Best:
    """Of one way the strength that is chosen, and where in the row of those tried it lies."""

    line: Line
    tried: tuple[float, ...]

    @property
    def end(self) -> str:
        """An arrow where a larger, or a smaller, α might keep more: it is the last that was tried."""
        if len(self.tried) == 1 or self.tried[0] < self.line.alpha < self.tried[-1]:
            return ""
        return "↑" if self.line.alpha == self.tried[-1] else "↓"


def best(found: Iterable[Line], images: int) -> list[Best]:
    """Of each way the weakest strength that keeps as much as any, as far as so many held-out images can tell.

    That is at most one standard error, √(p (1 − p) / images), below the share p that the best strength keeps
    of them on average over the ratios: the one-standard-error rule (Breiman et al., Classification and
    Regression Trees, 1984). Strengths are compared on the seeds that all of them have.
    """
    ways: dict[tuple, list[Line]] = {}
    for line in found:
        ways.setdefault(line.way, []).append(line)
    return [
        Best(_weakest_of_the_best(lines, images), tuple(sorted(line.alpha for line in lines)))
        for lines in ways.values()
    ]


def _weakest_of_the_best(lines: Sequence[Line], images: int) -> Line:
    kept = _kept_on(lines)
    most = max(map(kept, lines))
    error = sqrt(most * (100 - most) / images)
    return min((line for line in lines if kept(line) >= most - error), key=lambda line: line.alpha)


def _kept_on(lines: Sequence[Line]):
    """What a line keeps on the seeds that all of the lines have; nothing where its training diverged."""
    common = set.intersection(*(set(line.chosen_by) for line in lines))

    def kept(line: Line) -> float:
        mean = statistics.mean(line.chosen_by[seed] for seed in common)
        return 0.0 if isnan(mean) else mean

    return kept
