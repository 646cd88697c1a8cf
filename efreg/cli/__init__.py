"""The console script `efreg`: any network inspected, planned, pruned; trainings; laws and env."""

import argparse
import importlib.util
import logging
import shlex
import sys
from typing import NoReturn

import efreg
from efreg.cli import lab, laws, networks, pages
from efreg.cli.commands import Command

LAB = ("torchvision", "sklearn", "matplotlib", "jinja2", "rich", "tensorboard")

COMMANDS = (*networks.COMMANDS, *lab.COMMANDS, *laws.COMMANDS)
MOVED = "the paper's tables are made in a checkout of the repository: python -m bench.paper"


def main(argv: list[str] | None = None) -> int:
    """Runs one command. Returns 0, 2 for bad input (one line on stderr), 130 after Ctrl-C; exits on usage."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["paper"]:
        return _fail(MOVED)
    arguments = _parser().parse_args(argv)
    arguments.line = shlex.join(["efreg", *argv])
    command: Command = arguments.of
    if arguments.verbose:
        logging.basicConfig(level=logging.INFO, format="%(message)s")
    missing = [name for name in LAB if not importlib.util.find_spec(name)]
    if missing and command.needs_lab(arguments):
        return _fail(f'{command.name} needs {", ".join(missing)}: pip install "efreg[lab]"')
    try:
        pages.check(arguments)
        command.run(arguments)
    except KeyboardInterrupt:
        remedy = command.to_go_on(arguments)
        print(f"efreg: interrupted{f'; {remedy}' if remedy else ''}", file=sys.stderr)
        return 130
    except (ValueError, OSError, RuntimeError) as error:
        if arguments.verbose:
            raise
        return _fail(" ".join(str(error).split()))
    return 0


def _fail(message: str) -> int:
    print(f"efreg: error: {message}", file=sys.stderr)
    return 2


class _Parser(argparse.ArgumentParser):
    """Wrong usage gets one line, as all bad input does."""

    def error(self, message: str) -> NoReturn:
        self.exit(_fail(f"{message}; see {self.prog} --help"))


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="efreg", description="Train networks so that their filters can be removed, and remove them."
    )
    parser.add_argument("--version", action="version", version=f"efreg {efreg.__version__}")
    added = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in COMMANDS:
        one = added.add_parser(
            command.name,
            help=command.summary,
            description=command.summary[0].upper() + command.summary[1:] + ".",
            epilog="\n  ".join(["example:", *command.examples]),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        one.set_defaults(of=command)
        one.add_argument("-v", "--verbose", action="store_true", help="log more, show where an error arose")
        command.options(one)
    return parser
