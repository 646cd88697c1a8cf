"""Batches of a loader: how a model runs on one, and where its tensors go."""

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from efreg.groups import unwrap

Loader = Iterable[Any]
"""Batches, such as a DataLoader gives: what the model takes of each is in `run_on`."""

Forward = Callable[[nn.Module, Any], Any]
"""Runs a model on a batch."""


def run_on(model: nn.Module, batch: Any) -> Any:
    """The model on the inputs of a batch: a tensor, a dict of keyword arguments, or a tuple or list whose
    first element is the input, a tuple of inputs or a dict of them.

    Raises TypeError where the model does not take them.
    """
    inputs = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
    named = dict(inputs) if isinstance(inputs, Mapping) else {}
    listed = () if named else tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)
    try:
        if not all(isinstance(x, Tensor) for x in listed):
            raise TypeError(f"a batch of type {type(batch).__name__} holds what is no tensor")
        inspect.signature(unwrap(model).forward).bind(*listed, **named)
    except TypeError as error:
        raise TypeError(
            f"{type(unwrap(model)).__name__} does not take these batches ({error}): say how to run one, "
            "forward=lambda model, batch: ..."
        ) from error
    return model(*listed, **named)


def placed(batch: Any, device: torch.device | str) -> Any:
    """The batch with its tensors on the device."""
    return tree_map(lambda x: x.to(device) if isinstance(x, Tensor) else x, batch)
