"""Tables 4 to 6, of pruned and fine-tuned networks: what is published, and ours beside it."""

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import isnan, nan

from efreg.lab.paper import markdown
from efreg.lab.paper.cuts import Row
from efreg.lab.paper.published import TABLE4, TABLE5, TABLE6
from efreg.lab.paper.published import Row as Published

PUBLISHED = {"table4": TABLE4, "table5": TABLE5, "table6": TABLE6}


@dataclass(frozen=True)
class Line:
    """A line of a table. Accuracies are in percent, drop in points; of ours means over n seeds.

    base: before pruning, with us of the network that was trained with the force. right_after: right after
    pruning. pruned: fine-tuned. A line of the paper's has printed_drop where that is not base − pruned.
    """

    method: str
    source: str
    base: float
    pruned: float
    speedup: float
    deviation: float = nan
    right_after: float = nan
    n: int = 0
    epochs: str = ""
    on: str = ""
    printed_drop: float | None = None

    @property
    def drop(self) -> float:
        """Points lost."""
        return self.base - self.pruned


def lines(published: Iterable[Published], rows: Iterable[Row]) -> list[Line]:
    """Published and ours, by speedup; last what diverged."""
    theirs = [Line(source="paper", **vars(row)) for row in published]
    ours = [_line(found) for found in seeds_together(rows)]
    return sorted([*theirs, *ours], key=lambda line: (isnan(line.speedup), round(line.speedup, 2)))


def seeds_together(rows: Iterable[Row]) -> list[list[Row]]:
    """Rows of the same run and cut, one a seed."""
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        groups.setdefault((row.group, row.run, row.ratio), []).append(row)
    return list(groups.values())


def _line(rows: Sequence[Row]) -> Line:
    first, pruned = rows[0], [row.fine_tuned for row in rows]
    return Line(
        method=first.run,
        source="ours",
        base=statistics.mean(row.before for row in rows),
        pruned=statistics.mean(pruned),
        speedup=first.speedup,
        deviation=statistics.stdev(pruned) if len(rows) > 1 else nan,
        right_after=statistics.mean(row.accuracy for row in rows),
        n=len(rows),
        epochs=f"{first.epochs} + {first.fine_tune_epochs}",
        on=f"{first.dtype}, {first.device}",
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
            "Ours in bold: means over n seeds, ± standard deviation. Base: with us the network that was "
            "trained with the force, before it is cut. The drop is base − pruned, computed here.",
            *footnotes,
        ]
    )


def _cells(line: Line, mark: str) -> list[str]:
    if line.source == "ours" and isnan(line.pruned):
        return [f"**{line.method}**", "diverged", *[""] * 4, str(line.n), line.epochs, line.on]
    accuracies = [f"{line.base:.2f}", f"{line.pruned:.2f}", f"{line.drop:.2f}{mark}", f"{line.speedup:.2f}×"]
    if line.source == "paper":
        return [line.method, *accuracies, *[""] * 4]
    if not isnan(line.deviation):
        accuracies[1] += f" ± {line.deviation:.2f}"
    return [f"**{line.method}**", *accuracies, f"{line.right_after:.2f}", str(line.n), line.epochs, line.on]
