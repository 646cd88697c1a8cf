"""The command `laws`: the forces there are, with formulas."""

from argparse import Namespace

import efreg
from efreg.cli.commands import Command


def _laws(arguments: Namespace) -> None:
    """Name, parameters and formula of each law, and the sentence that its docstring begins with."""
    for name, law in efreg.LAWS.items():
        given = ",".join(f"{key}={default}" for key, default in law.parameters().items())
        along = {"sign": "sgn(w)", "radial": "w/‖w_n‖₂", "share": "w"}[law.direction]
        summary = " ".join((law.__doc__ or "").partition("\n\n")[0].split())
        print(
            f"{name}{':' + given if given else ''}\n    c_n = {law.formula}, along {along}\n    {summary}\n"
        )
    print(
        "Take one as --law NAME:PARAMETER=VALUE,..., or a class of your own as --law package.module.Class;\n"
        "in Python law='ladder:power=4', or an instance: efreg.Ladder(alpha, power=4)."
    )


COMMANDS = (
    Command(
        "laws",
        "the forces there are, with their formulas and parameters",
        ("efreg laws",),
        _laws,
        needs_lab=lambda arguments: False,
    ),
)
