"""Tables in Markdown, and how figures stand in them."""

import statistics
from collections.abc import Iterable, Sequence
from math import isnan


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A head, and rows as long."""
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows])


def spread(values: Sequence[float], digits: int = 1) -> str:
    """Mean ± standard deviation, the mean alone of one value; "diverged" where one is NaN."""
    if any(map(isnan, values)):
        return "diverged"
    mean = f"{statistics.mean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean
