"""Tells its subscribers of every optimizer step in the process, and how the steps are nested."""

import sys
from types import FrameType
from typing import Protocol

import torch
from torch.optim import Optimizer
from torch.optim import optimizer as torch_optimizer

WRAPPER = Optimizer.profile_hook_step(lambda self: None).__code__
"""The code of torch's wrapper around `Optimizer.step`, which calls the hooks."""


class Subscriber(Protocol):
    def before_step(
        self, optimizer: Optimizer, args: tuple, kwargs: dict, *, step: int, outermost: bool
    ) -> tuple[tuple, dict]:
        """Called before a step, numbered `step` while it lasts; returns the arguments that it is to have."""

    def after_step(self, optimizer: Optimizer, step: int) -> None:
        """Called after the step, unless it raised."""


_subscribers: list[Subscriber] = []
_handles: list = []


def subscribe(subscriber: Subscriber) -> None:
    """From now on `subscriber` hears of every step."""
    if not _subscribers:
        # Hidden from Dynamo: traced, the hooks would be compiled anew at every step.
        before, after = torch.compiler.disable(_before), torch.compiler.disable(_after)
        _handles.append(torch_optimizer.register_optimizer_step_pre_hook(before))
        _handles.append(torch_optimizer.register_optimizer_step_post_hook(after))
    _subscribers.append(subscriber)


def unsubscribe(subscriber: Subscriber) -> None:
    """Ends `subscribe`; does nothing where there is nothing to end."""
    if subscriber in _subscribers:
        _subscribers.remove(subscriber)
    if not _subscribers:
        while _handles:
            _handles.pop().remove()


def _before(optimizer: Optimizer, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    step = _step_around(sys._getframe(1))
    assert step is not None  # the wrapper calls it
    outermost = _step_around(step.f_back) is None
    for subscriber in tuple(_subscribers):
        args, kwargs = subscriber.before_step(optimizer, args, kwargs, step=id(step), outermost=outermost)
    return args, kwargs


def _after(optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
    step = id(_step_around(sys._getframe(1)))
    for subscriber in tuple(_subscribers):
        subscriber.after_step(optimizer, step)


def _step_around(frame: FrameType | None) -> FrameType | None:
    """The innermost step that `frame` runs in, by the frame of its wrapper; None outside any."""
    while frame is not None and frame.f_code is not WRAPPER:
        frame = frame.f_back
    return frame
