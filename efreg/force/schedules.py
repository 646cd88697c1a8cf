"""Schedules: functions from the step to α, for `attach(..., alpha=schedule)`."""

import math
from collections.abc import Callable

Schedule = Callable[[int], float]


def constant(alpha: float) -> Schedule:
    """α at every step."""
    return lambda step: alpha


def warmup(alpha: float, steps: int) -> Schedule:
    """Rising in equal parts to α, which is reached after `steps` steps and kept."""
    _check(steps)
    return lambda step: alpha * min(1.0, step / steps)


def cosine(alpha: float, steps: int) -> Schedule:
    """Falling from α to 0 along half a cosine, α · (1 + cos(π · step / steps)) / 2; 0 from `steps` on."""
    _check(steps)
    return lambda step: alpha * (1 + math.cos(math.pi * min(1.0, step / steps))) / 2


def linear(alpha: float, steps: int) -> Schedule:
    """Falling from α to 0 in equal parts; 0 from `steps` on."""
    _check(steps)
    return lambda step: alpha * max(0.0, 1 - step / steps)


def _check(steps: int) -> None:
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps is {steps!r}: a schedule lasts a whole number of steps from 1 up")
