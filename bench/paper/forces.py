"""Which force keeps most: strengths chosen by images that were not trained on, their table and picture."""

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import isnan, sqrt
from pathlib import Path

from bench.paper.accuracies import Mean, grouped, over_seeds
from bench.paper.costs import Latency
from bench.paper.jobs import Outcome
from bench.paper.recipes import NOTES, RANDOM, Group, Recipe
from bench.tables import counted, markdown, page
from efreg.lab import engine, figures
from efreg.lab.ways import NO_FORCE, Way, way_of


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
    cut = (outcome for outcome in outcomes if float(outcome.ratio))
    runs = grouped(cut, lambda outcome: (outcome.run, outcome.seed))
    kept = {key: statistics.mean(outcome.held_out for outcome in found) for key, found in runs.items()}
    there = [recipe for recipe in group.recipes if recipe.name in {run for run, _ in kept}]
    ways = grouped(there, lambda recipe: way_of(recipe.settings))
    return [_choice(way, tried, kept, group.base.held_out) for way, tried in ways.items()]


def _choice(way: Way, tried: list[Recipe], kept: dict[tuple[str, int], float], images: int) -> Choice:
    """kept: of each run and seed the percent of the held-out images that its cuts keep on average."""
    common = set.intersection(*({seed for run, seed in kept if run == r.name} for r in tried))
    means = {r.name: statistics.mean(kept[r.name, seed] for seed in common) for r in tried}
    means = {name: 0.0 if isnan(mean) else mean for name, mean in means.items()}
    most = max(means.values())
    error = sqrt(most * (100 - most) / images)
    best = [recipe for recipe in tried if means[recipe.name] >= most - error]
    chosen = min(best, key=lambda recipe: recipe.settings.alpha)
    return Choice(way, chosen, tuple(recipe.settings.alpha for recipe in tried))


def table(group: Group, outcomes: Sequence[Outcome], latencies: Sequence[Latency]) -> str:
    """Each way at its best strength, right after pruning and with re-estimated statistics."""
    base, chosen = group.base, choices(group, outcomes)
    cuts = grouped(over_seeds(outcomes, {group.name: group.title}), lambda mean: mean.run)
    after, again = [], []
    for choice in chosen:
        own = cuts[choice.run.name]
        left = [f"{own[0].dead:.0f}", f"{own[0].macs_alive / 1e6:.1f}"]
        after.append([*_force_cells(choice, own, "accuracy"), *left])
        again.append(_force_cells(choice, own, "recalibrated"))
    costs = _costs(max(cuts.values(), key=lambda means: means[0].n), latencies)
    ratios = [f"{100 * cut:.0f} %" if cut else "before" for cut in group.cuts]
    head = ["force", "acts on", "update", "α", "n", *ratios]
    on, epochs = outcomes[0].on.replace(", ", " on ", 1), counted(base.epochs, "epoch")
    return page(
        NOTES["of_group"].format(model=base.model, dataset=base.dataset, epochs=epochs, on=on),
        _trained(group),
        markdown([*head, "dead", "M left"], [*after, *costs]),
        _chosen(group, chosen),
        "Batch-norm statistics re-estimated:",
        markdown(head, again),
    )


def _force_cells(choice: Choice, cuts: Sequence[Mean], what: str) -> list[str]:
    forced = choice.way.force != NO_FORCE
    named = [*choice.way, choice.strength] if forced else [NO_FORCE, "", "", ""]
    return [*named, cuts[0].seeds, *(cut.cell(what, 1) for cut in cuts)]


def _costs(cuts: Sequence[Mean], latencies: Sequence[Latency]) -> list[list[str]]:
    """What is left to compute of every cut network, and how long that takes."""
    where = f"float32, {latencies[0].device}, {counted(latencies[0].threads, 'thread')}"
    rows = {"MACs, millions": [f"{cut.macs / 1e6:.1f}" for cut in cuts]}
    for images, found in grouped(latencies, lambda latency: latency.images).items():
        name = f"ms for {counted(images, 'image')} ({where})"
        rows[name] = [f"{latency.milliseconds:.2f}" for latency in found]
    return [[name, *[""] * 4, *figures, "", ""] for name, figures in rows.items()]


def _trained(group: Group) -> str:
    """How the networks were trained, and what the table shows of them."""
    base, start = group.base, group.weights or "random weights"
    if names := [r.start for r in group.recipes if r.start not in (None, RANDOM)]:
        first = group.recipe(names[0]).settings
        force = way_of(first).force
        told = "without a force" if force == NO_FORCE else f"with {force}"
        start = f"a network trained {told} over {first.epochs} epochs"
    schedule = base.schedule
    if base.alpha_schedule != "constant":
        schedule += f"; α's schedule is {base.alpha_schedule}, over {base.alpha_until:.0%} of the steps"
    return NOTES["forces"].format(start=start, lr=engine.start_lr(base), schedule=schedule)


def _chosen(group: Group, chosen: Sequence[Choice]) -> str:
    """How the strengths were chosen."""
    several = any(len(choice.tried) > 1 for choice in chosen)
    told = NOTES["chosen"].format(images=group.base.held_out) if several else NOTES["not_chosen"]
    return told + (NOTES["public_weights"] if group.weights else "")


def picture(stem: Path, heading: str, group: Group, outcomes: Sequence[Outcome]) -> str:
    """Accuracy before, against accuracy without half of the filters, of every run. Names the file."""
    chosen = {choice.run.name for choice in choices(group, outcomes)}
    points = [
        figures.Point(*way_of(group.recipe(m.run).settings), m.before, m.accuracy, m.run in chosen)
        for m in over_seeds(outcomes, {group.name: group.title})
        if m.ratio == "0.5" and m.n
    ]
    subtitle = NOTES["tried"].format(model=group.base.model, dataset=group.base.dataset)
    figures.draw_trade(stem.with_name(f"{stem.name}.png"), points, heading, subtitle)
    return f"{stem.name}.png"
