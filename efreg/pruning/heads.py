"""What timm's models say of their widths, for whoever puts a new classifier on them (`reset_classifier`)."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from efreg.pruning.numbers import Source

WIDTHS = ("num_features", "in_features", "embed_dim", "head_hidden_size", "hidden_size")
"""Attributes of the model, and of the head in it, that are the width of its features or of its classifier's
input.

Nothing that runs is given them, so that they cannot be followed as other numbers are.
"""


@contextmanager
def features_of(model: nn.Module) -> Iterator[list[Any]]:
    """Keeps in a list what the model's `forward_features`, where it has one, returns inside."""
    seen: list[Any] = []
    original = getattr(model, "forward_features", None)
    if original is None:
        yield seen
        return

    def kept(*args: Any, **kwargs: Any) -> Any:
        seen.append(original(*args, **kwargs))
        return seen[-1]

    vars(model)["forward_features"] = kept
    try:
        yield seen
    finally:
        del vars(model)["forward_features"]


def widths(run: Any, model: nn.Module, features: list[Any]) -> Iterator[tuple[Source, np.ndarray]]:
    """The numbers that say how wide the features and the classifier's input are, each with its axis."""
    names = {module: name for name, module in model.named_modules()}
    wide = [axis for x in tree_leaves(features) if isinstance(x, Tensor) for axis in run.axes(x)]
    for classifier in _classifiers(model):
        hidden = run.axes(classifier.weight)[1]
        path = names[classifier].split(".")
        for owner in (".".join(path[:depth]) for depth in range(len(path))):
            for name in WIDTHS:
                before = name in ("in_features", "embed_dim") or (name, owner) == ("num_features", "")
                axes = [*wide, hidden] if before else [hidden, *wide]
                length = vars(model.get_submodule(owner)).get(name)
                axis = next((axis for axis in axes if axis is not None and len(axis) == length), None)
                if axis is not None:
                    yield Source(owner, name, None), axis


def _classifiers(model: nn.Module) -> list[nn.Module]:
    """The layers that give the classes, as `get_classifier` names them."""
    get_classifier = getattr(model, "get_classifier", None)
    found = None if get_classifier is None else get_classifier()
    heads = [x for x in (found if isinstance(found, tuple) else (found,)) if isinstance(x, nn.Module)]
    layers = [[m for m in head.modules() if isinstance(m, (nn.Linear, nn.Conv2d))] for head in heads]
    return [each[-1] for each in layers if each]
