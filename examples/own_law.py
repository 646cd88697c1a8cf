"""A force of your own: from statistics of a group's units to a coefficient for each.

In Python:       force = efreg.attach(model, law=Crowd(1e-3, sharpness=2), layers=plan)
At the console:  PYTHONPATH=examples efreg train --law own_law.Crowd:sharpness=2 --alpha 1e-3 --out runs/crowd
"""

from dataclasses import dataclass

import efreg


@dataclass(frozen=True)
class Crowd(efreg.Law):
    """The smaller a unit is beside its group's mean, the harder the pull: α · (mean m / m_n)^sharpness."""

    sharpness: float = 1.0

    def coefficients(self, charges):
        m = charges.magnitude  # [G, N]: a group a row, NaN behind its last unit
        return self.alpha * (m.nanmean(-1, keepdim=True) / m) ** self.sharpness
