"""Tells its subscribers of every outermost optimizer step in the process, whatever steps are nested in it."""

import sys
import threading
from types import FrameType
from typing import Protocol

import torch
from torch.optim import optimizer as torch_optimizer


class Subscriber(Protocol):
    def before_step(self, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """Called before the step; returns the arguments that the step is to have."""

    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Called after the step, unless it raised."""


_subscribers: list[Subscriber] = []
_handles: list = []


class _Running(threading.local):
    """The frames of this thread's steps that are under way, outermost first."""

    def __init__(self):
        self.frames: list[FrameType] = []


_running = _Running()


def subscribe(subscriber: Subscriber) -> None:
    """From now on `subscriber` hears of every outermost step."""
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
    frame = _step_frame()
    while _running.frames and not _encloses(_running.frames[-1], frame):
        _running.frames.pop()  # a step that raised and so never came to its post hook
    _running.frames.append(frame)
    if len(_running.frames) == 1:
        for subscriber in tuple(_subscribers):
            args, kwargs = subscriber.before_step(optimizer, args, kwargs)
    return args, kwargs


def _after(optimizer, args, kwargs):
    frame = _step_frame()
    if frame not in _running.frames:
        return
    del _running.frames[_running.frames.index(frame) :]
    if not _running.frames:
        for subscriber in tuple(_subscribers):
            subscriber.after_step(optimizer)


def _step_frame() -> FrameType:
    """The frame of torch's wrapper around `Optimizer.step` that runs the hooks now."""
    frame = sys._getframe(1)
    while frame.f_code.co_filename != torch_optimizer.__file__:
        frame = frame.f_back
    return frame


def _encloses(outer: FrameType, inner: FrameType) -> bool:
    frame = inner.f_back
    while frame is not None and frame is not outer:
        frame = frame.f_back
    return frame is outer
