"""The force keeps and takes little memory: at most 64 bytes a filter beyond the weights."""

from itertools import accumulate

import pytest
import torch

import efreg
from efreg.lab import models


def peak(function):
    """The most bytes that `function` holds at a time beyond those that were there before."""
    with torch.profiler.profile(profile_memory=True) as profile:
        function()
    memory = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    sizes = [event.nbytes() for event in sorted(memory, key=lambda event: event.start_ns())]
    return max(accumulate(sizes, initial=0))


@pytest.mark.parametrize("refresh", [None, 1])
@pytest.mark.parametrize("update", ["gradient", "proximal"])
def test_bytes_a_filter(refresh, update):
    model = models.vgg19()
    force = efreg.attach(model, 1e-12, refresh=refresh, update=update, backend="cpp", check=None)
    filters = sum(len(c.magnitude) for c in force.charges().values())
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def hooks():
        force._serving.before_step(optimizer, (optimizer,), {}, step=0, outermost=True)
        force._serving.after_step(optimizer, 0)

    first, later = peak(hooks), peak(hooks)
    assert first > 0 and first + later <= 64 * filters
