"""Tells its subscribers of every optimizer step in the process, and how the steps are nested."""

import sys
import threading
import weakref
from types import FrameType
from typing import NamedTuple, Protocol

import torch
from torch.optim import optimizer as torch_optimizer


class Subscriber(Protocol):
    def before_step(
        self, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict, *, step: int, outermost: bool
    ) -> tuple[tuple, dict]:
        """Called before a step, numbered `step` while it lasts; returns the arguments that it is to have."""

    def after_step(self, optimizer: torch.optim.Optimizer, step: int) -> None:
        """Called after the step, unless it raised."""


class _Arguments(dict):
    """The keyword arguments of a step under way: they live exactly as long as the step's frame."""


class _Step(NamedTuple):
    """A step under way: the id of its frame, which is its own while the arguments live."""

    frame: int
    arguments: weakref.ref

    def encloses(self, frame: FrameType) -> bool:
        """Whether `frame` runs within this step."""
        outer = frame.f_back if self.arguments() is not None else None
        while outer is not None and id(outer) != self.frame:
            outer = outer.f_back
        return outer is not None


class _Running(threading.local):
    """This thread's steps that are under way, outermost first."""

    def __init__(self):
        self.steps: list[_Step] = []


_subscribers: list[Subscriber] = []
_handles: list = []
_running = _Running()


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


def _before(optimizer, args, kwargs):
    frame, steps = _step_frame(), _running.steps
    while steps and not steps[-1].encloses(frame):
        steps.pop()  # a step that raised and so never came to its post hook
    outermost = not steps
    for subscriber in tuple(_subscribers):
        args, kwargs = subscriber.before_step(optimizer, args, kwargs, step=id(frame), outermost=outermost)
    kwargs = _Arguments(kwargs)
    steps.append(_Step(id(frame), weakref.ref(kwargs)))
    return args, kwargs


def _after(optimizer, args, kwargs):
    frame, steps = id(_step_frame()), _running.steps
    if frame not in (step.frame for step in steps):
        return  # it began before anyone subscribed
    while steps.pop().frame != frame:
        pass
    for subscriber in tuple(_subscribers):
        subscriber.after_step(optimizer, frame)


def _step_frame() -> FrameType:
    """The frame of torch's wrapper around `Optimizer.step` that runs the hooks now."""
    frame = sys._getframe(1)
    while frame.f_code.co_filename != torch_optimizer.__file__:
        frame = frame.f_back
    return frame
