"""Tables 4 to 6, of pruned and fine-tuned networks: what is published, and ours beside it."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import isnan, nan

from efreg.lab.paper import markdown
from efreg.lab.paper.cuts import Outcome
from efreg.lab.paper.published import TABLE4, TABLE5, TABLE6
from efreg.lab.paper.spread import spread

PUBLISHED = {"table4": TABLE4, "table5": TABLE5, "table6": TABLE6}
NETWORKS = {"table4": "ResNet-56, CIFAR-10", "table5": "VGG-19, CIFAR-100", "table6": "ResNet-34, ImageNet"}


@dataclass(frozen=True)
class Line:
    """A line of a table. Accuracies are in percent, drop in points; of ours means over seeds.

    base: before pruning, with us of the network that was trained with the force. right_after: right after
    pruning. pruned: fine-tuned. n: seeds that did not diverge. A line of the paper's has printed_drop where
    that is not base − pruned.
    """

    method: str
    source: str
    base: float
    pruned: float
    drop: float
    speedup: float
    deviation: float = nan
    right_after: float = nan
    n: int = 0
    diverged: int = 0
    epochs: str = ""
    on: str = ""
    printed_drop: float | None = None


def lines(what: str, titles: Mapping[str, str], outcomes: Iterable[Outcome]) -> list[Line]:
    """Published and ours, by speedup. titles: of each group the network and its images."""
    theirs = [Line(source="paper", drop=row.base - row.pruned, **vars(row)) for row in PUBLISHED[what]]
    ours = []
    for found in seeds_together(outcomes):
        title = titles[found[0].group]
        ours.append(_line(found, "" if title == NETWORKS[what] else f"{title}: "))
    return sorted([*theirs, *ours], key=lambda line: (isnan(line.speedup), round(line.speedup, 2)))


def seeds_together(outcomes: Iterable[Outcome]) -> list[list[Outcome]]:
    """Those of the same run and cut, one a seed."""
    groups: dict[tuple, list[Outcome]] = {}
    for outcome in outcomes:
        groups.setdefault((outcome.group, outcome.run, outcome.ratio), []).append(outcome)
    return list(groups.values())


def _line(found: Sequence[Outcome], network: str) -> Line:
    """Over the seeds that were fine-tuned to the end, where there are any."""
    tuned = [x for x in found if not isnan(x.fine_tuned)]
    lost, found = len(found) - len(tuned), tuned or found
    base, after = spread(x.before for x in found), spread(x.accuracy for x in found)
    pruned, drop = spread(x.fine_tuned for x in found), spread(x.before - x.fine_tuned for x in found)
    return Line(
        method=network + found[0].run,
        source="ours",
        base=base.mean,
        pruned=pruned.mean,
        drop=drop.mean,
        speedup=spread(x.speedup for x in found).mean,
        deviation=pruned.deviation,
        right_after=after.mean,
        n=pruned.n,
        diverged=lost,
        epochs=found[0].epochs,
        on=found[0].on,
    )


def table(heading: str, lines: Sequence[Line]) -> str:
    """The lines in Markdown, ours in bold, a footnote for each drop that the paper prints otherwise."""
    notes = [line for line in lines if line.printed_drop is not None]
    marks = {id(line): f"[{number}]" for number, line in enumerate(notes, 1)}
    head = ["method", "base %", "pruned %", "drop", "speedup", "right after pruning %", "n", "epochs", "on"]
    body = [_cells(line, marks.get(id(line), "")) for line in lines]
    footnotes = [f"{marks[id(line)]} The paper prints {line.printed_drop:.2f}." for line in notes]
    return "\n\n".join(
        [
            f"### {heading}",
            markdown.table(head, body),
            "Ours in bold: means over n seeds, ± standard deviation, from pretrained (p) or random (r) "
            "weights. Base: with us the network that was trained with the force, before it is cut. The drop "
            "is base − pruned, computed here.",
            *footnotes,
        ]
    )


def _cells(line: Line, mark: str) -> list[str]:
    speedup = "" if isnan(line.speedup) else f"{line.speedup:.2f}×"
    pruned, right_after = markdown.figure(line.pruned, line.deviation), markdown.figure(line.right_after)
    figures = [markdown.figure(line.base), pruned, markdown.figure(line.drop) + mark, speedup]
    if line.source == "paper":
        return [line.method, *figures, *[""] * 4]
    return [
        f"**{line.method}**",
        *figures,
        right_after,
        markdown.seeds(line.n, line.diverged),
        line.epochs,
        line.on,
    ]
