"""Networks right after pruning, one at every ratio, nothing trained again: points lost, by speedup."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import isnan, nan

from efreg.lab.paper import markdown
from efreg.lab.paper.cuts import Outcome
from efreg.lab.paper.published import UNAIDED
from efreg.lab.paper.spread import spread
from efreg.lab.paper.tables import seeds_together

NEAR = 0.03
"""Speedups that differ by at most this share stand in one column."""


@dataclass(frozen=True)
class Line:
    """A method at one speedup. Accuracies are in percent, drop in points; of ours means over seeds.

    before: NaN where the paper does not tell. n: seeds that did not diverge.
    """

    network: str
    method: str
    source: str
    speedup: float
    before: float
    right_after: float
    drop: float
    deviation: float = nan
    fine_tuned: float = nan
    n: int = 0
    diverged: int = 0
    epochs: str = ""
    on: str = ""


def lines(titles: Mapping[str, str], outcomes: Iterable[Outcome]) -> list[Line]:
    """Published and ours. titles: of each group the network and its images."""
    theirs = [
        Line(
            network=u.network,
            method=u.method,
            source="published",
            speedup=u.speedup,
            before=nan if u.before is None else u.before,
            right_after=nan if u.before is None else u.before - u.drop,
            drop=u.drop,
            fine_tuned=nan if u.fine_tuned is None else u.fine_tuned,
        )
        for u in UNAIDED
    ]
    return [*theirs, *(_line(titles[found[0].group], found) for found in seeds_together(outcomes))]


def _line(network: str, found: Sequence[Outcome]) -> Line:
    drop = spread(x.before - x.accuracy for x in found)
    return Line(
        network=network,
        method=found[0].run,
        source="ours",
        speedup=spread(x.speedup for x in found).mean,
        before=spread(x.before for x in found).mean,
        right_after=spread(x.accuracy for x in found).mean,
        drop=drop.mean,
        deviation=drop.deviation,
        n=drop.n,
        diverged=drop.diverged,
        epochs=found[0].epochs,
        on=found[0].on,
    )


def table(heading: str, lines: Sequence[Line]) -> str:
    """A table in Markdown for each network, the published figures first, ours in bold."""
    parts = [f"### {heading}"]
    for network in dict.fromkeys(line.network for line in lines):
        parts += [
            f"{network}: points lost right after pruning",
            _table([x for x in lines if x.network == network]),
        ]
    parts += [
        "Ours in bold: means over n seeds, ± standard deviation, from pretrained (p), the same for all "
        "seeds, or random (r) weights. Torch-Pruning's figures are of its published logs; it prunes channels "
        "that residuals couple too, so equal speedups come from other widths. Where a speedup is not that of "
        "the column, it stands beside the figure."
    ]
    return "\n\n".join(parts)


def _table(lines: Sequence[Line]) -> str:
    columns = _columns(line.speedup for line in sorted(lines, key=lambda line: line.source))
    methods: dict[tuple, list[Line]] = {}
    for line in lines:
        methods.setdefault((line.source, line.method, line.epochs), []).append(line)
    head = ["method", "before %", *(f"{column:.2f}×" for column in columns), "n", "epochs", "on"]
    return markdown.table(head, [_cells(found, columns) for found in methods.values()])


def _columns(speedups: Iterable[float]) -> list[float]:
    """The speedups above 1 that there is to show; of those that are nearly the same the first."""
    columns: list[float] = []
    for speedup in speedups:
        if speedup > 1 and not any(_near(speedup, column) for column in columns):
            columns.append(speedup)
    return sorted(columns)


def _near(speedup: float, column: float) -> bool:
    return abs(speedup - column) <= NEAR * column


def _cells(found: Sequence[Line], columns: Sequence[float]) -> list[str]:
    first = found[0]
    before = ", ".join(dict.fromkeys(f"{line.before:.2f}" for line in found if not isnan(line.before)))
    if first.source == "published":
        return [first.method, before, *(_cell(found, column) for column in columns), "", "", ""]
    kept = [before or "diverged", *(_cell(found, column) for column in columns)]
    seeds = markdown.seeds(first.n, first.diverged)
    return [f"**{first.method}**", *kept, seeds, first.epochs, first.on]


def _cell(found: Sequence[Line], column: float) -> str:
    """Of the lines that are near the column's speedup the one that is nearest."""
    near = [line for line in found if _near(line.speedup, column)]
    if not near:
        return ""
    line = min(near, key=lambda line: abs(line.speedup - column))
    other = "" if round(line.speedup, 2) == round(column, 2) else f" ({line.speedup:.2f}×)"
    return markdown.figure(line.drop, line.deviation) + other
