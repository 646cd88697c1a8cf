"""Moving an optimizer to a pruned model: its state is sliced as the parameters are."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

from efreg.pruning.cutting import Kept, in_the_manner_of, sliced
from efreg.pruning.running import PruningError


class Move:
    """The state of an optimizer for the parameters of a model, ready to be put on a pruned one.

    Tensors of a parameter's shape, such as momentum and moments, are sliced along its axes; numbers are
    handed on.
    Raises PruningError, having changed nothing, for state of another shape; ValueError for an optimizer that
    steps none of the model's parameters.
    """

    def __init__(self, optimizer: Optimizer, model: nn.Module, kept: Kept):
        self._optimizer = optimizer
        names = {parameter: name for name, parameter in model.named_parameters()}
        self._names = {
            parameter: names[parameter]
            for group in optimizer.param_groups
            for parameter in group["params"]
            if parameter in names
        }
        if not self._names:
            raise ValueError(
                f"{type(optimizer).__name__} steps none of the model's parameters: give the one that does"
            )
        self._require_no_other_place()
        self._states = {
            parameter: {key: self._moved(parameter, name, key, value, kept) for key, value in state.items()}
            for parameter, name in self._names.items()
            if (state := optimizer.state.get(parameter))
        }

    def to(self, pruned: nn.Module) -> None:
        """Puts the pruned model's parameters in the place of the given one's."""
        new = {parameter: pruned.get_parameter(name) for parameter, name in self._names.items()}
        for group in self._optimizer.param_groups:
            group["params"] = [new.get(parameter, parameter) for parameter in group["params"]]
        for parameter in new:
            self._optimizer.state.pop(parameter, None)
        for parameter, state in self._states.items():
            self._optimizer.state[new[parameter]] = state

    def _require_no_other_place(self) -> None:
        """Raises PruningError where the optimizer knows its parameters from elsewhere too, as L-BFGS does."""
        for attribute, value in vars(self._optimizer).items():
            known = [] if attribute in ("param_groups", "state") else tree_leaves(value)
            if any(isinstance(x, Tensor) and x in self._names for x in known):
                raise PruningError(
                    f"{type(self._optimizer).__name__} keeps parameters in {attribute!r}, which cannot be "
                    "moved: make a new optimizer for the pruned model"
                )

    def _moved(self, parameter: Tensor, name: str, key: str, value: Any, kept: Kept) -> Any:
        if (
            not isinstance(value, Tensor)
            or value.ndim == 0
            or (name not in kept and value.shape == parameter.shape)
        ):
            return value
        if value.shape != parameter.shape:
            if name not in kept:
                return value
            raise PruningError(
                f"{type(self._optimizer).__name__} keeps {key!r} of shape {tuple(value.shape)} for {name!r} "
                f"of shape {tuple(parameter.shape)}, which cannot be cut with it: make a new optimizer for "
                "the pruned model"
            )
        with torch.no_grad():
            return in_the_manner_of(value, sliced(value, kept[name]))
