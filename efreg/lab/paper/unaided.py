"""Networks right after pruning, one at every ratio, nothing trained again: points lost, by speedup."""

from collections.abc import Iterable, Sequence

from efreg.lab.paper import markdown
from efreg.lab.paper.cuts import Row
from efreg.lab.paper.published import UNAIDED, Unaided

NEAR = 0.03
"""Speedups that differ by at most this share stand in one column."""


def table(heading: str, titles: dict[str, str], rows: Sequence[Row]) -> str:
    """A table in Markdown for each network, the published figures first, ours in bold.

    titles: the network of each group.
    """
    parts = [f"### {heading}"]
    for network in dict.fromkeys([*(u.network for u in UNAIDED), *titles.values()]):
        ours = [row for row in rows if titles[row.group] == network]
        theirs = [u for u in UNAIDED if u.network == network]
        if ours or theirs:
            parts += [f"{network}: points lost", _table(ours, theirs)]
    parts += [
        "Ours in bold: means over n seeds, ± standard deviation. Torch-Pruning's figures are of its "
        "published logs; it prunes channels that residuals couple too, so its equal speedups come from other "
        "widths. Where a speedup is not that of the column, it stands beside the figure."
    ]
    return "\n\n".join(parts)


def _table(ours: Sequence[Row], theirs: Sequence[Unaided]) -> str:
    columns = _columns([*(row.speedup for row in ours), *(u.speedup for u in theirs)])
    head = ["method", "before %", *(f"{column:.2f}×" for column in columns), "n", "epochs", "on"]
    return markdown.table(head, [*_their_lines(theirs, columns), *_our_lines(ours, columns)])


def _columns(speedups: Iterable[float]) -> list[float]:
    """The speedups above 1 that there is to show; one of those that are nearly the same."""
    columns: list[float] = []
    for speedup in speedups:
        if speedup > 1 and not any(_near(speedup, column) for column in columns):
            columns.append(speedup)
    return sorted(columns)


def _near(speedup: float, column: float) -> bool:
    return abs(speedup - column) <= NEAR * column


def _their_lines(theirs: Sequence[Unaided], columns: Sequence[float]) -> Iterable[list[str]]:
    methods: dict[str, list[Unaided]] = {}
    for u in theirs:
        methods.setdefault(u.method, []).append(u)
    for method, found in methods.items():
        before = ", ".join(dict.fromkeys(f"{u.before:.2f}" for u in found if u.before is not None))
        yield [method, before, *(_their_cell(found, column) for column in columns), "", "", ""]


def _their_cell(found: Sequence[Unaided], column: float) -> str:
    return ", ".join(
        f"{u.drop:.2f}{'' if round(u.speedup, 2) == round(column, 2) else f' ({u.speedup:.2f}×)'}"
        for u in found
        if _near(u.speedup, column)
    )


def _our_lines(ours: Sequence[Row], columns: Sequence[float]) -> Iterable[list[str]]:
    runs: dict[tuple[str, str], list[Row]] = {}
    for row in ours:
        runs.setdefault((row.group, row.run), []).append(row)
    for (_, run), found in runs.items():
        whole = list({row.seed: row.before for row in found}.values())
        yield [
            f"**{run}**",
            markdown.spread(whole, 2),
            *(_our_cell(found, column) for column in columns),
            str(len(whole)),
            str(found[0].epochs),
            f"{found[0].dtype}, {found[0].device}",
        ]


def _our_cell(found: Sequence[Row], column: float) -> str:
    """Of the cuts that are near the column's speedup the one that is nearest."""
    near = sorted({row.speedup for row in found if _near(row.speedup, column)}, key=lambda s: abs(s - column))
    return markdown.spread([r.before - r.accuracy for r in found if r.speedup in near[:1]], 2) if near else ""
