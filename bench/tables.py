"""Tables in Markdown."""

from collections.abc import Iterable, Sequence


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A head, and rows as long."""
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows])


def page(heading: str, *parts: str) -> str:
    """A heading, and what stands below it."""
    return "\n\n".join([f"### {heading}", *parts])


def counted(number: int, what: str) -> str:
    """So many, with an s in the plural."""
    return f"{number} {what}{'s' * (number > 1)}"
