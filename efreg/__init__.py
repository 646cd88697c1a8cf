"""Electrostatic force regularization: train a network so that its filters can be pruned.

plan = efreg.plan(model, ratio=0.5, example_inputs=x)
force = efreg.attach(model, alpha=1e-12, layers=plan)     # train as before
small = efreg.prune(model, plan, example_inputs=x)
"""

from efreg.backends.native import BackendUnavailable
from efreg.force import schedules
from efreg.force.attachment import Attachment, attach
from efreg.force.laws import (
    L1,
    LAWS,
    Charges,
    Electrostatic,
    Fade,
    Gravity,
    GReg1,
    GReg2,
    GroupLasso,
    Ladder,
    Law,
    Torque,
    resolve,
)
from efreg.force.penalty import measure, penalty
from efreg.groups import Group, Member
from efreg.pruning.compensating import compensate
from efreg.pruning.files import load, save
from efreg.pruning.inspecting import Inspection, inspect
from efreg.pruning.nesting import Nesting, Ranking, nested
from efreg.pruning.planning import plan
from efreg.pruning.plans import Plan
from efreg.pruning.recalibrating import recalibrate
from efreg.pruning.removing import prune
from efreg.pruning.reporting import Report, macs, report
from efreg.pruning.running import PruningError

__version__ = "0.2.0"

__all__ = [
    "L1",
    "LAWS",
    "Attachment",
    "BackendUnavailable",
    "Charges",
    "Electrostatic",
    "Fade",
    "GReg1",
    "GReg2",
    "Gravity",
    "Group",
    "GroupLasso",
    "Inspection",
    "Ladder",
    "Law",
    "Member",
    "Nesting",
    "Plan",
    "PruningError",
    "Ranking",
    "Report",
    "Torque",
    "attach",
    "compensate",
    "inspect",
    "load",
    "macs",
    "measure",
    "nested",
    "penalty",
    "plan",
    "prune",
    "recalibrate",
    "report",
    "resolve",
    "save",
    "schedules",
]
