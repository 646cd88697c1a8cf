"""The tables of accuracies in Markdown, published figures beside ours."""

from collections.abc import Iterable, Sequence
from math import isfinite, isnan

from bench.paper.choice import NO_FORCE, Choice, choices, way_of
from bench.paper.jobs import Outcome
from bench.paper.latency import Latency
from bench.paper.means import OURS, Mean, figure, grouped, over_seeds
from bench.paper.recipes import RANDOM, Group
from bench.tables import markdown
from efreg.lab import engine

ACCURACIES = {
    "accuracy": "right after pruning",
    "recalibrated": "batch-norm statistics re-estimated",
    "repaired": "repaired without training",
}
"""The accuracies of a cut that figure 2 can show, and how each is called."""

NEAR = 0.03
"""Speedups that differ by at most this share stand in one column of what was lost."""


def fine_tuned(heading: str, means: Sequence[Mean]) -> str:
    """Tables 4 to 6, by speedup, ours in bold; a footnote for each drop that the paper prints otherwise."""
    means = sorted(means, key=lambda mean: (isnan(mean.speedup), round(mean.speedup, 2)))
    network = next(mean.network for mean in means if mean.source != OURS)
    noted = [mean for mean in means if not isnan(mean.printed_drop)]
    marks = {id(mean): f"[{number}]" for number, mean in enumerate(noted, 1)}
    head = ["method", "base %", "pruned %", "drop", "speedup", "right after pruning %", "n", "epochs", "on"]
    body = [_fine_tuned_cells(mean, network, marks.get(id(mean), "")) for mean in means]
    note = (
        "Ours in bold: means over n seeds, ± standard deviation, from pretrained (p) or random (r) weights. "
        "Base: with us the network that was trained with the force, before it is cut. The drop is base − "
        "pruned, computed here."
    )
    footnotes = [f"{marks[id(mean)]} The paper prints {mean.printed_drop:.2f}." for mean in noted]
    return "\n\n".join([f"### {heading}", markdown(head, body), note, *footnotes])


def _fine_tuned_cells(mean: Mean, network: str, mark: str) -> list[str]:
    """network: that of the table; ours of another is named."""
    speedup = "" if isnan(mean.speedup) else f"{mean.speedup:.2f}×"
    figures = [figure(mean.before), mean.cell("fine_tuned"), figure(mean.drop) + mark, speedup]
    if mean.source != OURS:
        return [mean.run, *figures, *[""] * 4]
    name = mean.run if mean.network == network else f"{mean.network}: {mean.run}"
    return [f"**{name}**", *figures, figure(mean.accuracy), mean.seeds, mean.epochs, mean.on]


def lost(heading: str, means: Sequence[Mean]) -> str:
    """Points lost right after pruning: a table for each network, what is published first, ours in bold."""
    parts = [f"### {heading}"]
    for network, own in grouped(means, lambda mean: mean.network).items():
        parts += [f"{network}: points lost right after pruning", _lost_table(own)]
    note = (
        "Ours in bold: means over n seeds, ± standard deviation, from pretrained (p), the same for all "
        "seeds, or random (r) weights. Torch-Pruning's figures are of its published logs; it prunes channels "
        "that residuals couple too, so equal speedups come from other widths. Where a speedup is not that of "
        "the column, it stands beside the figure."
    )
    return "\n\n".join([*parts, note])


def _lost_table(means: Sequence[Mean]) -> str:
    columns = _columns(mean.speedup for mean in sorted(means, key=lambda mean: mean.source))
    methods = grouped(means, lambda mean: (mean.source, mean.run, mean.epochs))
    head = ["method", "before %", *(f"{column:.2f}×" for column in columns), "n", "epochs", "on"]
    return markdown(head, [_lost_cells(found, columns) for found in methods.values()])


def _columns(speedups: Iterable[float]) -> list[float]:
    """The speedups above 1 that there is to show; of those that are nearly the same the first."""
    columns: list[float] = []
    for speedup in speedups:
        if speedup > 1 and not any(_near(speedup, column) for column in columns):
            columns.append(speedup)
    return sorted(columns)


def _near(speedup: float, column: float) -> bool:
    return abs(speedup - column) <= NEAR * column


def _lost_cells(found: Sequence[Mean], columns: Sequence[float]) -> list[str]:
    first = found[0]
    before = ", ".join(dict.fromkeys(figure(mean.before) for mean in found if not isnan(mean.before)))
    kept = [_lost_cell(found, column) for column in columns]
    if first.source != OURS:
        return [first.run, before, *kept, "", "", ""]
    return [f"**{first.run}**", before or "diverged", *kept, first.seeds, first.epochs, first.on]


def _lost_cell(found: Sequence[Mean], column: float) -> str:
    """Of the figures that are near the column's speedup the one that is nearest."""
    near = [mean for mean in found if _near(mean.speedup, column)]
    if not near:
        return ""
    mean = min(near, key=lambda mean: abs(mean.speedup - column))
    other = "" if round(mean.speedup, 2) == round(column, 2) else f" ({mean.speedup:.2f}×)"
    return mean.cell("lost") + other


def shown(means: Iterable[Mean], recalibrated: bool) -> list[str]:
    """The accuracies that figure 2 shows: repairs where something was repaired."""
    wanted = {
        "accuracy": True,
        "recalibrated": recalibrated,
        "repaired": any(isfinite(mean.repaired) for mean in means),
    }
    return [what for what in ACCURACIES if wanted[what]]


def by_ratio(heading: str, means: Sequence[Mean], recalibrated: bool) -> str:
    """Figure 2: of each network a table for each of the accuracies that are shown."""
    parts = [f"### {heading}"]
    for network, own in grouped(means, lambda mean: mean.network).items():
        for what in shown(own, recalibrated):
            parts += [f"{network}: accuracy in %, {ACCURACIES[what]}", _ratio_table(own, what)]
    return "\n\n".join([*parts, "Means over n seeds, ± standard deviation, on the whole test set."])


def _ratio_table(means: Sequence[Mean], what: str) -> str:
    speedups = {mean.ratio: mean.speedup for mean in sorted(means, key=lambda mean: mean.n)}
    runs = grouped(means, lambda mean: (mean.group, mean.run))
    body = [_ratio_cells(found, speedups, what) for found in runs.values()]
    costs = ["speedup", *(f"{speedup:.2f}×" for speedup in speedups.values()), "", "", ""]
    return markdown(["run", *speedups, "n", "epochs", "on"], [*body, costs])


def _ratio_cells(found: Sequence[Mean], ratios: Iterable[str], what: str) -> list[str]:
    first, cells = found[0], {mean.ratio: mean.cell(what) for mean in found}
    kept = [cells.get(ratio, "") for ratio in ratios]
    return [first.run, *kept, first.seeds, first.epochs, first.on]


def forces(group: Group, outcomes: Sequence[Outcome], latencies: Sequence[Latency]) -> str:
    """Each way at its best strength, right after pruning and with re-estimated statistics."""
    base, chosen = group.base, choices(group, outcomes)
    cuts = grouped(over_seeds(outcomes, {group.name: group.title}), lambda mean: mean.run)
    after = [[*_force_cells(c, cuts[c.run.name], "accuracy"), *_left(cuts[c.run.name][0])] for c in chosen]
    again = [_force_cells(c, cuts[c.run.name], "recalibrated") for c in chosen]
    ratios = [f"{100 * cut:.0f} %" if cut else "before" for cut in group.cuts]
    head = ["force", "acts on", "update", "α", "n", *ratios]
    costs = _costs(max(cuts.values(), key=lambda means: means[0].n), latencies)
    title = (
        f"{base.model} on {base.dataset}, {base.epochs} epoch{'s' * (base.epochs > 1)}, "
        f"{outcomes[0].on.replace(', ', ' on ', 1)}: "
        "accuracy in % on the test images, mean ± standard deviation"
    )
    return "\n\n".join(
        [
            f"### {title}",
            f"{_course(group)} Right after pruning, nothing re-trained and nothing re-estimated. dead: "
            "filters that are zero before anything is cut; M left: millions of MACs without them.",
            markdown([*head, "dead", "M left"], [*after, *costs]),
            f"{_choice(group, chosen)}{_seen(group)}",
            "Batch-norm statistics re-estimated:",
            markdown(head, again),
        ]
    )


def _force_cells(choice: Choice, cuts: Sequence[Mean], what: str) -> list[str]:
    forced = choice.way.force != NO_FORCE
    named = [*choice.way, choice.strength] if forced else [NO_FORCE, "", "", ""]
    return [*named, cuts[0].seeds, *(cut.cell(what, 1) for cut in cuts)]


def _left(mean: Mean) -> list[str]:
    return [f"{mean.dead:.0f}", f"{mean.macs_alive / 1e6:.1f}"]


def _costs(cuts: Sequence[Mean], latencies: Sequence[Latency]) -> list[list[str]]:
    """What is left to compute of every cut network, and how long that takes."""
    first = latencies[0]
    where = f"float32, {first.device}, {first.threads} thread{'s' * (first.threads > 1)}"
    rows = {"MACs, millions": [f"{cut.macs / 1e6:.1f}" for cut in cuts]}
    for images, found in grouped(latencies, lambda latency: latency.images).items():
        name = f"ms for {images} image{'s' * (images > 1)} ({where})"
        rows[name] = [f"{latency.milliseconds:.2f}" for latency in found]
    return [[name, *[""] * 4, *figures, "", ""] for name, figures in rows.items()]


def _course(group: Group) -> str:
    """How the networks were trained."""
    base = group.base
    start = group.weights or "random weights"
    if names := [r.start for r in group.recipes if r.start not in (None, RANDOM)]:
        first = group.recipe(names[0]).settings
        force = way_of(first).force
        told = "without a force" if force == NO_FORCE else f"with {force}"
        start = f"a network trained {told} over {first.epochs} epochs"
    course = f"Trained from {start}, learning rate {engine.start_lr(base):g}, {base.schedule}"
    if base.alpha_schedule != "constant":
        course += f"; α's schedule is {base.alpha_schedule}, over {base.alpha_until:.0%} of the steps"
    return f"{course}."


def _choice(group: Group, chosen: Sequence[Choice]) -> str:
    """How the strengths were chosen."""
    if all(len(choice.tried) == 1 for choice in chosen):
        return "One strength of each, none was chosen."
    return (
        "Where several strengths were tried α is the weakest that keeps as much as any, within one standard "
        f"error, of {group.base.held_out} training images that were held out, on average over the ratios; "
        "↑ ↓: the largest, the smallest of them. The CSV has all."
    )


def _seen(group: Group) -> str:
    seen = " The public weights were trained on all training images, those held out too."
    return seen if group.weights else ""
