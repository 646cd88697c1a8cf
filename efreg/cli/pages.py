"""The option --html: a page to look at."""

import tempfile
from argparse import ArgumentParser, Namespace
from pathlib import Path


def option(parser: ArgumentParser) -> None:
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page to look at, too (none)")


def check(arguments: Namespace) -> None:
    """Raises OSError, before any work, where the page that is asked for cannot be written."""
    path = getattr(arguments, "html", None)
    if path is None:
        return
    if path.is_dir():
        raise IsADirectoryError(f"--html {path} is a folder: name a file in it, as {path / 'report.html'}")
    try:
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise OSError(
            f"cannot write --html {path} ({error.strerror}): name a file in a folder that can be written"
        ) from error
