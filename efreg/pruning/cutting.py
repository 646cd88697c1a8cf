"""Taking units out of a network: tensors are sliced, and the numbers that modules keep follow."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from efreg.groups import CONVOLUTIONS, TRANSPOSED, tensor_of
from efreg.pruning.attention import as_pruned
from efreg.pruning.numbers import Source, plain_numbers
from efreg.pruning.units import Network

Kept = dict[str, dict[int, Tensor]]
"""Of each tensor that shrinks the positions that stay, along each axis that does. int64"""


def kept_of(network: Network, gone: np.ndarray) -> Kept:
    """What stays where the classes with these roots go."""
    kept: Kept = {}
    for name, axes in network.watched.tensors.items():
        for axis, ids in enumerate(axes):
            if ids is not None and not (stays := network.kept(ids, gone)).all():
                kept.setdefault(name, {})[axis] = torch.from_numpy(np.flatnonzero(stays))
    return kept


def cut(model: nn.Module, network: Network, gone: np.ndarray) -> nn.Module:
    """Takes the units with these roots from the model, in place. Returns it."""
    kept = kept_of(network, gone)
    followed = dict(_followed(model, network, gone))
    attentions = {
        path: module
        for path, module in model.named_modules()
        if type(module) is nn.MultiheadAttention and any(name.startswith(f"{path}.") for name in kept)
    }
    replace(model, {name: sliced(tensor_of(model, name), axes) for name, axes in kept.items()})
    for path, numbers in followed.items():
        if path not in attentions:
            vars(model.get_submodule(path)).update(numbers)
    for path in dict.fromkeys(name.rpartition(".")[0] for name in kept):
        refit(model.get_submodule(path))
    for path, module in attentions.items():
        as_pruned(module, _heads_left(module, kept.get(f"{path}.out_proj.weight", {}).get(1)))
    return model


def _heads_left(attention: nn.MultiheadAttention, kept: Tensor | None) -> int:
    """How many heads keep channels, of those that the output projection reads; None where it keeps all."""
    return attention.num_heads if kept is None else len(torch.unique(kept // attention.head_dim))


def sliced(tensor: Tensor, axes: Mapping[int, Tensor]) -> Tensor:
    """The positions that stay, along each of the axes."""
    for axis, positions in axes.items():
        tensor = tensor.index_select(axis, positions.to(tensor.device))
    return tensor


def refit(module: nn.Module) -> None:
    """Sets the counts of channels that a module keeps to what its tensors have."""
    for name, count in counts(module).items():
        setattr(module, name, count)
    if isinstance(module, nn.RNNBase):
        module.flatten_parameters()  # in one piece, as cuDNN wants them


def counts(module: nn.Module) -> dict[str, Any]:
    """The counts of channels that a module of a known kind keeps, read off its tensors."""
    weight = getattr(module, "weight", None)
    if isinstance(module, nn.RNNBase):
        gates = {"LSTM": 4, "GRU": 3}.get(module.mode, 1)
        reader, recurrent = (getattr(module, f"weight_{what}_l0") for what in ("ih", "hh"))
        return {"input_size": reader.shape[1], "hidden_size": len(recurrent) // gates}
    if isinstance(module, _NormBase):
        tensors = [x for x in (weight, module.bias, module.running_mean) if x is not None]
        return {"num_features": len(tensors[0])} if tensors else {}
    if weight is None:
        return {}
    if isinstance(module, CONVOLUTIONS):
        return {"in_channels": weight.shape[1] * module.groups, "out_channels": weight.shape[0]}
    if isinstance(module, TRANSPOSED):
        return {"in_channels": weight.shape[0], "out_channels": weight.shape[1] * module.groups}
    if isinstance(module, nn.Linear):
        return {"out_features": weight.shape[0], "in_features": weight.shape[1]}
    if isinstance(module, nn.PReLU):
        return {"num_parameters": len(weight)}
    if isinstance(module, nn.GroupNorm):
        return {"num_channels": len(weight)}
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        return {"normalized_shape": tuple(weight.shape)}
    if isinstance(module, nn.Embedding):
        return {"embedding_dim": weight.shape[1]}
    return {}


def replace(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Puts tensors in the places of those with these names, wherever the model has them, in their manner.

    A buffer is persistent from then on: nobody can compute it from how the network was built.
    """
    named = _named(model, tensors)  # alive until the end: an id that is free would be given away
    new = {id(old): in_the_manner_of(old, tensors[name]) for name, old in named}
    for module in model.modules():
        for own in (module._parameters, module._buffers):
            for key, old in list(own.items()):
                if id(old) in new:
                    setattr(module, key, new[id(old)])
                    module._non_persistent_buffers_set.discard(key)


def _named(model: nn.Module, names: Iterable[str]) -> list[tuple[str, Tensor]]:
    return [(name, tensor_of(model, name)) for name in names]


def in_the_manner_of(old: Tensor, new: Tensor) -> Tensor:
    """`new` with the dtype, device, memory format and requires_grad of `old`, without its gradient."""
    new = new.detach().to(old.device, old.dtype).contiguous(memory_format=_memory_format(old))
    return nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new


def _memory_format(tensor: Tensor) -> torch.memory_format:
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    last = formats.get(tensor.ndim, torch.contiguous_format)
    if tensor.is_contiguous() or not tensor.is_contiguous(memory_format=last):
        return torch.contiguous_format
    return last


def _followed(model: nn.Module, network: Network, gone: np.ndarray) -> Iterator[tuple[str, dict[str, Any]]]:
    """Of each module the integers, and lists of them, that are the lengths of axes which shrink, as they
    become.

    A number whose way was followed is known; another follows where all axes of that length which operations
    of the module were given agree.
    """
    known: dict[Source, set[int]] = defaultdict(set)
    guessed: dict[str, dict[int, set[int]]] = defaultdict(lambda: defaultdict(set))
    for size in network.watched.sizes.values():
        stays = int(network.kept(size.axis, gone).sum())
        if size.number is None:
            guessed[size.module][len(size.axis)].add(stays)
        else:
            known[size.number.source].add(int(stays / size.number.factor))
    for path in {*guessed, *(source.module for source in known)}:
        found = {}
        for name, value in plain_numbers(model.get_submodule(path)):
            places = enumerate(value) if isinstance(value, (list, tuple)) else [(None, value)]
            each = [_becomes(x, known.get(Source(path, name, i)), guessed[path].get(x)) for i, x in places]
            new = each[0] if isinstance(value, int) else type(value)(each)
            if new != value:
                found[name] = new
        yield path, found


def _becomes(number: int, known: set[int] | None, guessed: set[int] | None) -> int:
    agreed = known or guessed or {number}
    return next(iter(agreed)) if len(agreed) == 1 else number
