"""Everything else: frozen, by the operation's name."""

from typing import Any

from torch import Tensor
from torch._ops import OpOverload
from torch.utils._pytree import tree_leaves

from efreg.pruning.rules import name_of, rule
from efreg.pruning.watching import Run


@rule("unknown")
def unknown(run: Run, out: object, function: OpOverload, **given: Any) -> None:
    """Nobody knows what becomes of the ids that come in, and none come out."""
    for x in tree_leaves(given):
        if isinstance(x, Tensor):
            for axis in run.axes(x):
                run.freeze(axis, f"the operation {name_of(function)} has no rule for them")
