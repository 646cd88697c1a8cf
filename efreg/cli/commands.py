"""What a command of the console script is."""

from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Command:
    """A command: its name, what it does in a line, lines that show it, and what carries it out.

    options: adds its own to its parser. needs_lab: whether it needs the extra `lab`, given its arguments.
    to_go_on: what to say after Ctrl-C.
    """

    name: str
    summary: str
    examples: tuple[str, ...]
    run: Callable[[Namespace], None]
    options: Callable[[ArgumentParser], None] = lambda parser: None
    needs_lab: Callable[[Namespace], bool] = lambda arguments: True
    to_go_on: Callable[[Namespace], str] = lambda arguments: ""
