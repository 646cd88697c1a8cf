"""Giving a layer tensors of another size, and the channel counts that go with them."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
RESIZABLE = (*CONVOLUTIONS, nn.Linear, nn.PReLU, _BatchNorm)
"""The layers that `refit` knows."""


def refit(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Puts `tensors` in the place of the module's own of the same names and sets its counts to match.

    Each keeps the dtype, device, memory format and requires_grad of the one it replaces; gradients are
    dropped. A grouped convolution keeps its number of filters a group.
    """
    for name, tensor in tensors.items():
        setattr(module, name, _in_the_manner_of(getattr(module, name), tensor))
    if isinstance(module, CONVOLUTIONS):
        filters, depth = module.weight.shape[:2]
        module.groups = 1 if module.groups == 1 else module.groups * filters // module.out_channels
        module.in_channels, module.out_channels = depth * module.groups, filters
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, nn.PReLU):
        module.num_parameters = len(module.weight)
    else:
        module.num_features = len(next(iter(tensors.values())))


def _in_the_manner_of(old: Tensor, new: Tensor) -> Tensor:
    new = new.detach().to(old.device, old.dtype).contiguous(memory_format=_memory_format(old))
    return nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new


def _memory_format(tensor: Tensor) -> torch.memory_format:
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    last = formats.get(tensor.ndim, torch.contiguous_format)
    if tensor.is_contiguous() or not tensor.is_contiguous(memory_format=last):
        return torch.contiguous_format
    return last
