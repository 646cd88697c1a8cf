"""What a way to train is called: the force, what it pulls, and how."""

from typing import Any, NamedTuple

from efreg.lab import engine
from efreg.lab.checkpoints import Settings

NO_FORCE = "no force"
FORCES: dict[str, dict[str, Any]] = {
    "fade": {"law": "fade"},
    "fade, forgetting": {"law": "fade:forget=true"},
    "ladder, sparing": {"law": "ladder:power=4,spare=0.3"},
    "ladder, p = 4": {"law": "ladder:power=4"},
    "ladder": {"law": "ladder"},
    "electrostatic, each step": {"law": "electrostatic", "refresh": 1},
    "electrostatic, once": {"law": "electrostatic"},
    "group lasso": {"law": "group_lasso"},
    "L1": {"law": "l1"},
}
"""The settings that make a force, by what it is called."""


class Way(NamedTuple):
    """A force, what it pulls, and how."""

    force: str
    scope: str
    update: str


def way_of(settings: Settings) -> Way:
    """How a network is trained; "nested" is a force here, beside which there may be another."""
    force = NO_FORCE
    if settings.epochs and (settings.alpha or engine.fades(settings)):
        told = vars(settings).items()
        force = next((name for name, makes in FORCES.items() if makes.items() <= told), settings.law)
    if settings.nested:
        force = "nested" if force == NO_FORCE else f"nested, {force.partition(',')[0]}"
    law = engine.force_options(settings, steps=1)["law"]
    return Way(force, settings.scope or law.scope, settings.update or law.update)
