"""What serves what here, and why: the text of `efreg env`."""

import os
import platform
from importlib import metadata

import torch

import efreg
from efreg import backends
from efreg.backends import native

PACKAGES = ("torch", "triton", "safetensors", "ninja", "torchvision")


def describe() -> str:
    """Versions, devices, and for each device the backend that `auto` takes and why the others do not serve.

    Builds the C++ operations where that has not been done yet.
    """
    lines = [f"efreg {efreg.__version__} on Python {platform.python_version()}, {platform.platform()}"]
    lines += [f"  {name:<14} {_version(name)}" for name in PACKAGES]
    if chosen := os.environ.get("EFREG_BACKEND"):
        lines.append(f"EFREG_BACKEND={chosen}: it alone serves")
    for device in _devices():
        lines.append(f"{device}: {_device_name(device)}")
        lines += [f"  {name:<14} {_state(name, device)}" for name in backends.BACKENDS]
        lines.append(f"  {'auto':<14} {_automatic(device)}")
    return "\n".join(lines)


def _automatic(device: torch.device) -> str:
    try:
        return f"takes {backends.select('auto', device).name}"
    except (ValueError, native.BackendUnavailable) as error:
        return f"takes nothing: {error}"


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _devices() -> list[torch.device]:
    return [torch.device("cpu"), *(torch.device("cuda", i) for i in range(torch.cuda.device_count()))]


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"


def _state(name: str, device: torch.device) -> str:
    try:
        backends.select(name, device)
    except native.BackendUnavailable as error:
        return f"does not serve: {error}"
    for extension in (native.CPP, native.CUDA):
        if name == extension.name:
            return "serves, " + ("built ahead" if native.prebuilt(extension) else "built at first use")
    return "serves"
