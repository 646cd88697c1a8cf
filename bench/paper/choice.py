"""What a force is called, and which of its strengths is chosen, by images that were not trained on."""

import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from math import isnan, sqrt
from typing import NamedTuple

from bench.paper.jobs import Outcome
from bench.paper.means import grouped
from bench.paper.recipes import Group, Recipe
from efreg.lab import engine
from efreg.lab.checkpoints import Settings

NO_FORCE = "no force"
FORCES = {
    "fade": {"law": "fade"},
    "fade, forgetting": {"law": "fade:forget=true"},
    "ladder, sparing": {"law": "ladder:power=4,spare=0.3"},
    "ladder, p = 4": {"law": "ladder:power=4"},
    "ladder": {"law": "ladder"},
    "electrostatic, each step": {"law": "electrostatic", "refresh": 1},
    "electrostatic, once": {"law": "electrostatic"},
    "group lasso": {"law": "group_lasso"},
    "L1": {"law": "l1"},
}
"""The settings that make a force, by what it is called."""


class Way(NamedTuple):
    """A force, what it pulls, and how."""

    force: str
    scope: str
    update: str


def way_of(settings: Settings) -> Way:
    """How a network is trained; "nested" is a force here, beside which there may be another."""
    force = NO_FORCE
    if settings.epochs and (settings.alpha or engine.fades(settings)):
        told = vars(settings).items()
        force = next((name for name, makes in FORCES.items() if makes.items() <= told), settings.law)
    if settings.nested:
        force = "nested" if force == NO_FORCE else f"nested, {force.partition(',')[0]}"
    law = engine.force_options(settings, steps=1)["law"]
    return Way(force, settings.scope or law.scope, settings.update or law.update)


@dataclass(frozen=True)
class Choice:
    """Of a way the run at the strength that is chosen, and the strengths that were tried."""

    way: Way
    run: Recipe
    tried: tuple[float, ...]

    @property
    def strength(self) -> str:
        """α; an arrow where a larger, or a smaller, one might keep more: it is the last that was tried."""
        alpha = self.run.settings.alpha
        if len(self.tried) == 1 or min(self.tried) < alpha < max(self.tried):
            return f"{alpha:g}"
        return f"{alpha:g} {'↑' if alpha == max(self.tried) else '↓'}"


def choices(group: Group, outcomes: Iterable[Outcome]) -> list[Choice]:
    """Of each way the weakest strength that keeps as much as any, as far as the held-out images can tell.

    That is at most one standard error, √(p (1 − p) / images), below the share p that the best strength keeps
    of them on average over the cuts: the one-standard-error rule (Breiman et al., Classification and
    Regression Trees, 1984). Strengths are compared on the seeds that all of them have; one that diverged
    keeps nothing.
    """
    kept = _kept(outcomes)
    there = [recipe for recipe in group.recipes if recipe.name in kept]
    ways = grouped(there, lambda recipe: way_of(recipe.settings))
    return [
        Choice(
            way,
            _weakest_of_the_best(tried, kept, group.base.held_out),
            tuple(recipe.settings.alpha for recipe in tried),
        )
        for way, tried in ways.items()
    ]


def _kept(outcomes: Iterable[Outcome]) -> dict[str, dict[int, float]]:
    """Of each run and seed the mean over the cuts of what is kept of the held-out images, in percent."""
    kept: dict[str, dict[int, float]] = {}
    cut = [outcome for outcome in outcomes if float(outcome.ratio)]
    for (run, seed), found in grouped(cut, lambda outcome: (outcome.run, outcome.seed)).items():
        kept.setdefault(run, {})[seed] = statistics.mean(outcome.held_out for outcome in found)
    return kept


def _weakest_of_the_best(tried: list[Recipe], kept: dict[str, dict[int, float]], images: int) -> Recipe:
    common = set.intersection(*(set(kept[recipe.name]) for recipe in tried))
    means = {r.name: statistics.mean(kept[r.name][seed] for seed in common) for r in tried}
    means = {name: 0.0 if isnan(mean) else mean for name, mean in means.items()}
    most = max(means.values())
    error = sqrt(most * (100 - most) / images)
    best = [recipe for recipe in tried if means[recipe.name] >= most - error]
    return min(best, key=lambda recipe: recipe.settings.alpha)
