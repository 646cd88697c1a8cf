"""Tables in Markdown, and how figures stand in them."""

from collections.abc import Iterable, Sequence
from math import isnan, nan


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A head, and rows as long."""
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows])


def figure(mean: float, deviation: float = nan) -> str:
    """To two decimals, with the standard deviation where there is one; NaN is what diverged."""
    if isnan(mean):
        return "diverged"
    return f"{mean:.2f}" + ("" if isnan(deviation) else f" ± {deviation:.2f}")


def seeds(n: int, diverged: int) -> str:
    """How many."""
    return f"{n} ({diverged} diverged)" if diverged else str(n)
