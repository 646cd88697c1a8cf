"""What tests of the console script share."""

import re

from efreg import cli


def files(folder):
    """All that lies in a folder, but for what Python keeps of modules."""
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))
    return [name for name in names if "__pycache__" not in name]


def assert_refused(capsys, arguments, *parts):
    """Status 2 and one line on stderr that holds the parts."""
    try:
        status = cli.main([str(argument) for argument in arguments])
    except SystemExit as error:
        status = error.code
    printed = capsys.readouterr().err
    assert status == 2
    assert re.fullmatch(r"efreg: error: [^\n]+\n", printed), printed
    for part in parts:
        assert str(part) in printed
