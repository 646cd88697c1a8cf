"""Numbers on their way to a GPU: nobody waits for them, and a captured graph finds them at every replay."""

from collections.abc import Sequence

import torch
from torch import Tensor

ARENA_BYTES = 1 << 20

_arena: list[Tensor] = []
"""Pinned memory not yet given away, as one tensor of bytes."""

_captured: list = []
"""What graphs read at every replay: nobody says when a graph is gone, so it stays until the process ends."""


def capturing(device: torch.device) -> bool:
    """Whether what is launched on `device` now is captured into a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def keep_if_captured(device: torch.device, *read: object) -> None:
    """Keeps what a launch reads alive if that launch is captured."""
    if capturing(device):
        _captured.append(read)


def send(numbers: Sequence | Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """`numbers` as a new tensor on `device`, copied without a synchronisation."""
    host = torch.as_tensor(numbers, dtype=dtype, device="cpu")
    if device.type == "cpu":
        return host.contiguous()
    if capturing(device):
        host = _pinned_for_ever(host)
    else:
        _fill_arena()
        host = host.pin_memory()
    return host.to(device, non_blocking=True)


class Sent:
    """Numbers on a device that are sent again when they change, to a tensor of their own each time.

    last: what was sent last, if anything was. A copy that a graph captured is not made until the graph is
    replayed, so it is never taken for one that is there already.
    """

    last: Tensor

    def __init__(self, dtype: torch.dtype, device: torch.device):
        self._dtype, self._device = dtype, device
        self._numbers: list | None = None

    def __call__(self, numbers: list) -> Tensor:
        if numbers == self._numbers:
            return self.last
        sent = send(numbers, self._dtype, self._device)
        if not capturing(self._device):
            self.last, self._numbers = sent, numbers
        return sent


_constants: dict[tuple, Tensor] = {}


def constant(value: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A number on a device, 0-dim, made once."""
    key = (value, dtype, device)
    if key in _constants:
        return _constants[key]
    with torch.inference_mode(False):
        made = torch.full((), value, dtype=dtype, device=device)
    if not capturing(device):
        _constants[key] = made
    return made


def on_device(factor: float | Tensor, like: Tensor) -> Tensor:
    """A number, or a 0-dim tensor, of the dtype of `like` and where it lies; nobody waits for the device."""
    if isinstance(factor, Tensor) and factor.device.type != "cpu":
        return factor.to(like, non_blocking=True).reshape(())
    return constant(float(factor), like.dtype, like.device)


def _fill_arena() -> None:
    """Pins memory ahead, because during a capture CUDA pins none."""
    if not _arena or _arena[0].numel() < ARENA_BYTES // 2:
        _arena[:] = [torch.empty(ARENA_BYTES, dtype=torch.uint8, device="cpu", pin_memory=True)]


def _pinned_for_ever(host: Tensor) -> Tensor:
    """A pinned copy that no later capture shares: the graph reads it at every replay."""
    size = -(-host.nbytes // 64) * 64
    free = _arena[0] if _arena else torch.empty(0, dtype=torch.uint8, device="cpu")
    if free.numel() < size:
        raise RuntimeError("the memory for captures is used up: take one step outside a capture, then go on")
    mine, _arena[0] = free[: host.nbytes], free[size:]
    _captured.append(mine)
    return mine.view(host.dtype).view(host.shape).copy_(host)
