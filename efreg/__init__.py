"""Electrostatic force regularization: train a network so that its filters can be pruned.

plan = efreg.plan(model, ratio=0.5, example_inputs=x)
force = efreg.attach(model, alpha=1e-12, layers=plan)     # train as before
small = efreg.prune(model, plan, example_inputs=x)
"""

from efreg import schedules
from efreg.attachment import Attachment, attach
from efreg.laws import L1, LAWS, Charges, Electrostatic, GroupLasso, Ladder, Law
from efreg.native import BackendUnavailable
from efreg.ops import measure, penalty
from efreg.planning import Plan, plan
from efreg.reporting import Report, macs, report
from efreg.store import load, save
from efreg.surgery import PruningError, prune, recalibrate

__version__ = "0.1.0"

__all__ = [
    "L1",
    "LAWS",
    "Attachment",
    "BackendUnavailable",
    "Charges",
    "Electrostatic",
    "GroupLasso",
    "Ladder",
    "Law",
    "Plan",
    "PruningError",
    "Report",
    "attach",
    "load",
    "macs",
    "measure",
    "penalty",
    "plan",
    "prune",
    "recalibrate",
    "report",
    "save",
    "schedules",
]
