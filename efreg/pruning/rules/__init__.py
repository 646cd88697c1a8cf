"""What goes together, by kind of operation: one small function a kind, in one table.

A rule gets the run that is watched, the operation's output and its arguments under the names that ATen's
schema has for them. It calls `run.name(out, axes)` with the ids along each axis of the output, and before
that whatever else is to be said: `run.same(a, b)` unites two axes, `run.freeze(axis, why)` keeps one,
`run.contract` and `run.write` say what reads and what writes.
"""

from collections.abc import Callable
from importlib import import_module

from torch import Tag, Tensor
from torch._ops import OpOverload

from efreg.pruning.running import schema_name

Rule = Callable[..., None]

Outputs = tuple[Tensor, ...]
"""What an operation gives that has several outputs."""

RULES: dict[str, Rule] = {}
"""By the name of the ATen operation; one in place, with a trailing underscore, has the rule of its twin."""


ALWAYS: set[str] = set()
"""The operations that are followed though none of their inputs has ids: they give ids to axes along which all
numbers are alike, or have a cost.
"""


def rule(*operations: str, always: bool = False) -> Callable[[Rule], Rule]:
    """Registers a function as the rule of these operations. always: see `ALWAYS`."""

    def register(function: Rule) -> Rule:
        for operation in operations:
            assert operation not in RULES, f"{operation} has two rules"
            RULES[operation] = function
        ALWAYS.update(operations if always else ())
        return function

    return register


def is_always(operation: OpOverload) -> bool:
    """Whether an operation is followed though none of its inputs has ids."""
    return schema_name(operation).removeprefix("aten::") in ALWAYS


def name_of(operation: OpOverload) -> str:
    """What an ATen operation is called in a message."""
    return schema_name(operation).removeprefix("aten::").strip("_")


KINDS = "pointwise views indexing contractions norms reductions spatial recurrent unknown"

for kind in KINDS.split():
    import_module(f"efreg.pruning.rules.{kind}")


def rule_of(operation: OpOverload) -> Rule:
    """The rule of an ATen operation; `unknown` where the table has none."""
    name = schema_name(operation).removeprefix("aten::")
    for known in (name, name.removesuffix("_")):
        if known in RULES:
            return RULES[known]
    return RULES["pointwise" if Tag.pointwise in operation.tags else "unknown"]
