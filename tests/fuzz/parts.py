"""How much is tried: parts of examples of their own, the same at every run, the most of them slow."""

from collections import Counter

import pytest
from hypothesis import HealthCheck, Phase, seed, settings

QUICK, ALL = 8, 200

PARTS = [*range(QUICK), *(pytest.param(n, marks=pytest.mark.slow) for n in range(QUICK, ALL))]
"""With 250 examples a part 2,000, and 50,000 with the slow ones."""


def settled(examples: int, **options) -> settings:
    """So many examples, none of them from another run; those that fail are made smaller."""
    return settings(
        max_examples=examples,
        deadline=None,
        database=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
        **options,
    )


def part(number: int, examples: int = 250):
    """A decorator: the test tries the examples of this part."""
    return lambda test: seed(number)(settled(examples)(test))


def recorded(counts: Counter, record_property) -> None:
    """Puts counts where the summary finds them."""
    for what, count in counts.items():
        record_property(what, count)
