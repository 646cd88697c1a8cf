"""Who carries the operations out: the backends, and which of them serves a device."""

import logging
import os
from functools import cache

import torch

from efreg.backends import native
from efreg.backends.cpp import Cpp
from efreg.backends.launched import Cuda, Triton
from efreg.backends.native import BackendUnavailable
from efreg.backends.plain import Reference
from efreg.backends.protocol import Backend

logger = logging.getLogger("efreg")

BACKENDS: dict[str, type[Backend]] = {"triton": Triton, "cuda": Cuda, "cpp": Cpp, "reference": Reference}
"""In the order in which `auto` tries them."""

SERVES: dict[str, tuple[str, ...]] = {"triton": ("cuda", "xpu"), "cuda": ("cuda",), "cpp": ("cpu",)}
"""The device types of each backend; one that is not named serves every device."""


def select(name: str, device: torch.device) -> Backend:
    """The backend that serves `device`: the one asked for by `name` or EFREG_BACKEND, or the first to be had.

    Raises ValueError for an unknown name, BackendUnavailable for one that cannot be had.
    """
    name = (os.environ.get("EFREG_BACKEND") or "auto") if name == "auto" else name
    if name == "auto":
        return _automatic(device)
    if name not in BACKENDS:
        raise ValueError(f"unknown backend {name!r}: there are auto, {', '.join(BACKENDS)}")
    if not serves(name, device.type):
        interpreted = name == "triton" and native.interpreting()
        served = "cpu while TRITON_INTERPRET is set" if interpreted else ", ".join(SERVES[name])
        raise BackendUnavailable(f"backend {name!r} serves {served}; the weights are on {device}")
    return _backend(name, device)


def serves(name: str, device_type: str) -> bool:
    """Whether backend `name` is made for such devices; Triton's interpreter reads the CPU's memory alone."""
    if name == "triton" and native.interpreting():
        return device_type == "cpu"
    return device_type in SERVES.get(name, (device_type,))


def _untried(name: str, device_type: str) -> bool:
    """Whether nobody has run this backend on such devices yet: it serves them by name only."""
    return name == "triton" and (device_type in ("cpu", "xpu") or torch.version.hip is not None)


@cache
def _backend(name: str, device: torch.device) -> Backend:
    return BACKENDS[name](device)


@cache
def _automatic(device: torch.device) -> Backend:
    for name in BACKENDS:
        if serves(name, device.type) and not _untried(name, device.type):
            try:
                backend = _backend(name, device)
                logger.info("backend %r serves %s", name, device)
                return backend
            except BackendUnavailable as error:
                logger.warning("backend %r cannot be had (%s): a slower one serves", name, error)
    raise AssertionError("the reference serves every device")
