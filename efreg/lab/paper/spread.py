"""Figures over seeds: their mean and spread, and how many trainings diverged."""

import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from math import isnan, nan


@dataclass(frozen=True)
class Spread:
    """Mean and standard deviation of n figures, NaN of too few; `diverged` ones are left out."""

    mean: float
    deviation: float
    n: int
    diverged: int


def spread(figures: Iterable[float]) -> Spread:
    """Of figures one a seed, NaN where its training diverged."""
    figures = list(figures)
    kept = [figure for figure in figures if not isnan(figure)]
    return Spread(
        mean=statistics.mean(kept) if kept else nan,
        deviation=statistics.stdev(kept) if len(kept) > 1 else nan,
        n=len(kept),
        diverged=len(figures) - len(kept),
    )
