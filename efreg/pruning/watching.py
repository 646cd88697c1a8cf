"""Watching a network run: every ATen operation is seen, and says by its rule what goes together.

The idea is in `efreg/pruning/rules`: a rule hands the ids along the axes of an operation's inputs on to those
of its output, unites those that are the same channel and freezes those that cannot go.
"""

import logging
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.utils._pytree import tree_leaves

from efreg.pruning.heads import features_of, widths
from efreg.pruning.ids import Axis, Ids
from efreg.pruning.numbers import Given, Tracked, tracked
from efreg.pruning.running import (
    Mode,
    PruningError,
    arguments,
    calls,
    forward,
    located,
    schema_name,
    tensors,
    tensors_in,
    throws_dice,
    twin,
    twin_inputs,
)

logger = logging.getLogger("efreg")


@dataclass(frozen=True)
class Cost:
    """Multiply-accumulates: `macs` a combination of positions along these axes."""

    macs: int
    axes: tuple[np.ndarray, ...]


@dataclass(frozen=True)
class Size:
    """An operation in `module` was given the length of this axis: as this number, where that is known."""

    module: str
    axis: np.ndarray
    number: Tracked | None


@dataclass(frozen=True)
class Mask:
    """What an operation takes in without a weight whose columns could be zeroed.

    operation: its name, and how many of that name came before it in the run. arguments: the name of an
        argument and the axes of it that
    have ids. norm: whether it is to be taken over the channels that stay, instead of zeros for the others.
    """

    operation: tuple[str, int]
    arguments: dict[str, dict[int, np.ndarray]]
    norm: bool


@dataclass
class Watched:
    """What watching a network found.

    tensors: of each parameter and buffer the ids along its axes, under its first name. aliases: its others.
    parameters: which of them are parameters.
    writes, reads, carries: ids of weights' axes in the part that they play; taken: ids that something reads.
    costs: in eval mode. masks: of each run. unseen: parameters that took part in no operation. dice: whether
        an operation may throw some.
    """

    ids: Ids = field(default_factory=Ids)
    tensors: dict[str, list[Axis]] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    parameters: set[str] = field(default_factory=set)
    writes: list[np.ndarray] = field(default_factory=list)
    reads: list[np.ndarray] = field(default_factory=list)
    carries: list[np.ndarray] = field(default_factory=list)
    taken: list[np.ndarray] = field(default_factory=list)
    costs: list[Cost] = field(default_factory=list)
    sizes: dict[tuple, Size] = field(default_factory=dict)
    masks: dict[tuple[bool, int], list[Mask]] = field(default_factory=dict)
    unseen: set[str] = field(default_factory=set)
    dice: bool = False


def watch(model: nn.Module, example_inputs: Any) -> Watched:
    """Runs a twin of the model on the example inputs, in eval mode and then in train mode where it can.

    Raises ValueError where the model cannot take the inputs, PruningError where it cannot be copied or
    returns something that cannot be opened.
    """
    found = Watched()
    examples = calls(example_inputs)
    _require_plain_tensors(model)
    copied = twin(model)
    copied.requires_grad_(True)
    named = _register(found, copied)
    found.parameters = {name for name, _ in copied.named_parameters()}
    found.unseen = set(found.parameters)
    stack: list[str] = []
    with located(copied, stack), tracked(copied):
        for training in (False, True):
            copied.train(training)
            for number, call in enumerate(examples):
                try:
                    run = _ran(Run(found, named, training, stack), copied, twin_inputs(call))
                except ValueError as error:
                    if not training:
                        raise
                    logger.info("not watched in train mode: %s", error)
                    found.dice = True  # nobody knows
                    return found
                found.masks[training, number] = run.masks + run.of_written()
                found.unseen -= run.seen
    return found


def _ran(run: "Run", model: nn.Module, call: Any) -> "Run":
    """The run, once it has seen a forward pass; what the pass kept for its gradients is gone."""
    found = run.found
    run.start(call)
    with torch.enable_grad(), features_of(model) as features, run.given, run:
        output = forward(model, call)
    for tensor in tensors(output):
        for axis in run.axes(tensor):
            found.ids.freeze(axis, "an output of the network has them")
    for source, axis in widths(run, model, features):
        found.sizes[source] = Size(source.module, axis, Tracked.of(len(axis), source))
    run.forget()
    return run


def warn_of_unseen(found: Watched) -> None:
    """Says which parameters never ran: a cut may leave them with the old widths."""
    if found.unseen:
        logger.warning(
            "nobody knows what these read, which never ran: %s; give example_inputs that reach them",
            some(sorted(found.unseen)),
        )


def some(names: Sequence[str], most: int = 3) -> str:
    """The first of them, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _require_plain_tensors(model: nn.Module) -> None:
    """Raises ValueError for lazy tensors, PruningError for a model or tensors that cannot be cut."""
    if isinstance(model, torch.jit.ScriptModule):
        raise PruningError("the network is scripted or traced, which cannot be cut: prune it before that")
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if nn.parameter.is_lazy(tensor):
            raise ValueError(f"{name!r} is lazy and has no numbers yet: run a batch through the model first")
        plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided
        if tensor.is_quantized or not plain:
            raise PruningError(
                f"{name!r} is a {'quantised' if tensor.is_quantized else type(tensor).__name__} tensor, "
                "which cannot be cut: prune the network before it is quantised, sharded or wrapped"
            )


def _register(found: Watched, model: nn.Module) -> dict[int, tuple[str, Tensor]]:
    """Gives every position along every axis of the parameters and buffers an id. Returns their names."""
    memory: dict[int, list[tuple[int, int, str]]] = {}
    named = {}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        axes = [found.ids.fresh(length) if length > 1 else None for length in tensor.shape]
        found.tensors[name] = axes
        named[id(tensor)] = name, tensor
        low, high = _span(tensor)
        taken = memory.setdefault(tensor.untyped_storage()._cdata, [])
        for other in [other for start, end, other in taken if low < end and start < high]:
            for axis in (*axes, *found.tensors[other]):
                found.ids.freeze(axis, f"{other!r} and {name!r} share memory")
        taken.append((low, high, name))
    every = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    found.aliases = {name: named[id(x)][0] for name, x in every if id(x) in named}
    _freeze_scripted(found, model)
    return named


def _span(tensor: Tensor) -> tuple[int, int]:
    """From its first byte to behind its last in its storage."""
    last = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride()))
    first, size = int(tensor.storage_offset()), tensor.element_size()
    return first * size, (first + last + 1) * size if tensor.numel() else first * size


def _freeze_scripted(found: Watched, model: nn.Module) -> None:
    """What lies in a scripted or traced module cannot be replaced."""
    for path, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            for name, axes in found.tensors.items():
                if name.startswith(f"{path}."):
                    for axis in axes:
                        found.ids.freeze(axis, f"{path!r} is scripted or traced")


class Run(Mode):
    """One forward pass that is watched; what rules work with.

    stack: the names of the modules that are running, the innermost last.
    """

    def __init__(
        self,
        found: Watched,
        named: dict[int, tuple[str, Tensor]],
        training: bool,
        stack: Sequence[str],
    ):
        super().__init__()
        from efreg.pruning.rules import RULES, is_always, rule_of

        self.ids = found.ids
        self.stack = stack
        called = weakref.WeakMethod(self._called)  # no cycle: what is kept is as large as a training step

        def tell(*call: Any) -> None:
            if (method := called()) is not None:
                method(*call)

        self.given = Given(tell)
        self.masks: list[Mask] = []
        self._readings: list[tuple[Axis, Mask]] = []
        self._alike: dict[bytes, list[np.ndarray]] = {}
        self.seen: set[str] = set()
        self._rule_of, self._is_always, self._unknown = rule_of, is_always, RULES["unknown"]
        self.found = found
        self._named = named
        self._training = training
        self._own = sum(len(axis) for axes in found.tensors.values() for axis in axes if axis is not None)
        self._axes = {key: found.tensors[name] for key, (name, _) in named.items()}
        self._weights = {key for key, (_, tensor) in named.items() if isinstance(tensor, nn.Parameter)}
        self._moving: set[int] = set()
        self._loud: set[int] = set(named) - self._weights  # nobody zeroes a buffer
        self._alive = {key: tensor for key, (_, tensor) in named.items()}
        self._operations: Counter[str] = Counter()
        self._name = ""

    def see(self, function: OpOverload, args: tuple, kwargs: dict[str, Any]) -> Any:
        out = function(*args, **kwargs)
        self._name = schema_name(function)
        self._operations[self._name] += 1
        self.found.dice |= throws_dice(function)
        given = arguments(function, args, kwargs)
        for name in _written(function):
            given.pop(name, None)
        inputs = tensors_in(given)
        for x in inputs:
            if id(x) in self._named:
                self.seen.add(self._named[id(x)][0])
        self._mark_outputs(out, inputs)
        if self._is_always(function) or any(any(axis is not None for axis in self.axes(x)) for x in inputs):
            self._follow(function, out, given)
        return out

    def _called(self, function: Callable, args: tuple, kwargs: dict[str, Any]) -> None:
        """Attention without a scale makes one from the width, in single products too, which do not say so."""
        if function is nn.functional.scaled_dot_product_attention:
            named = dict(zip(("query", "key", "value", "mask", "dropout", "causal", "scale"), args)) | kwargs
            if named.get("scale") is None:
                width = self.axes(named["query"])[-1]
                self.freeze(width, "the scale of attention is made from their number")

    def _follow(self, function: OpOverload, out: Any, given: dict[str, Any]) -> None:
        """What the operation's rule says; where it does not take these arguments all is frozen, as without
        one.
        """
        try:
            self._rule_of(function)(self, out, function=function, **given)
        except (TypeError, ValueError, LookupError, AttributeError):
            logger.debug("the rule of %s fails", function, exc_info=True)
            self._unknown(self, out, function=function, **given)

    def start(self, call: Any) -> None:
        """What depends on these inputs is no weight."""
        for x in tree_leaves(call):
            if isinstance(x, Tensor):
                self._alive[id(x)] = x
                self._moving.add(id(x))

    def forget(self) -> None:
        """Nothing is kept any more of what was computed."""
        self._alive.clear()

    def _mark_outputs(self, out: Any, inputs: Sequence[Tensor]) -> None:
        """What is computed from weights, and not from the network's inputs, is a weight."""
        moving = any(id(x) in self._moving for x in inputs)
        weights = not moving and any(id(x) in self._weights for x in inputs)
        loud = any(id(x) in self._loud for x in inputs)
        for x in tensors_in(out):
            self._alive[id(x)] = x
            for known, holds in ((self._moving, moving), (self._weights, weights), (self._loud, loud)):
                (known.add if holds else known.discard)(id(x))
            if moving and x._base is not None:  # what is written to in place may be a view
                self._moving.add(id(x._base))

    # What rules ask

    @property
    def where(self) -> str:
        """The innermost module that is running, for a message."""
        return f" in {self.stack[-1]!r}" if self.stack and self.stack[-1] else ""

    def axes(self, tensor: Tensor | None) -> list[Axis]:
        """The ids along each axis of a tensor."""
        if tensor is None:
            return []
        return self._axes.get(id(tensor)) or [None] * tensor.ndim

    def is_weight(self, tensor: Tensor) -> bool:
        """Whether a tensor depends on parameters, and on no input of the network."""
        return id(tensor) in self._weights

    def is_loud(self, tensor: Tensor) -> bool:
        """Whether a channel of it may be non-zero though all that it is written by is zero."""
        return id(tensor) in self._loud or not any(axis is not None for axis in self.axes(tensor))

    def can_go(self, *axes: Axis, own: bool = False) -> bool:
        """Whether some of the ids are not frozen yet; own: of those that lie in the network's tensors."""
        parts = [part for axis in axes if axis is not None for part, _ in self.ids.made_of(axis)]
        if not (parts := [part for part in parts if part is not None]):
            return False
        ids = np.concatenate(parts)
        known = self.ids.find(ids) < self._own if own else True
        return bool((known & ~self.ids.are_frozen(ids, True)).any())

    # What rules say

    def name(self, out: Any, axes: Sequence[Axis], *, loud: bool | None = None) -> None:
        """The axes of an output; of length 1 they have no ids."""
        self._axes[id(out)] = [axis if n > 1 else None for axis, n in zip(axes, out.shape, strict=True)]
        if loud is not None:
            (self._loud.add if loud else self._loud.discard)(id(out))
        if loud and out._base is not None:  # what was written to in place is a view
            self._loud.add(id(out._base))

    def same(self, *axes: Axis) -> Axis:
        """The axes are one."""
        return self.ids.same(axes, f"they meet numbers of a fixed count{self.where}")

    def meet(self, *places: tuple[Tensor, int]) -> Axis:
        """The axes at these places of tensors are one, but for those of length 1."""
        found = [self.axes(x)[i] for x, i in places if x.shape[i] > 1]
        return self.same(*found) if found else None

    def freeze(self, axis: Axis, what: str, *, soft: bool = False) -> None:
        """The ids cannot go because of what this operation does with them."""
        self.ids.freeze(axis, f"{what}{self.where}", soft=soft)

    def contract(self, x: Tensor, i: int, weight: Tensor | None = None, j: int = 0, *, argument: str) -> None:
        """The positions along axis i of x are read, by axis j of a weight where there is one."""
        axis = self.axes(x)[i]
        if weight is not None:
            if x.shape[i] > 1:
                axis = self.same(axis, self.axes(weight)[j])
            self.read(weight, j)
        if axis is None:
            return
        self.take(x, i)
        if weight is None or not self.is_weight(weight):
            self.mask({argument: {i: axis}}, norm=False)
        else:
            self._readings.append((self.axes(weight)[j], self._masked({argument: {i: axis}}, norm=False)))

    def take(self, x: Tensor, i: int) -> None:
        """The positions along axis i of x are read by something."""
        axis = self.axes(x)[i]
        if axis is None:
            return
        self.ids.look_at(axis)
        self.found.taken.append(axis)
        if not self.is_weight(x) and self.is_loud(x):
            self.ids.sound(axis)

    def read(self, weight: Tensor, j: int) -> None:
        """Axis j of a weight reads."""
        axis = self.axes(weight)[j]
        if axis is not None and self.is_weight(weight):
            self.found.reads += self._with_alike(axis)

    def write(self, weight: Tensor, i: int) -> Axis:
        """Axis i of a weight writes: its ids, for the output."""
        axis = self.axes(weight)[i]
        if axis is not None and self.is_weight(weight):
            for part, _ in self.ids.made_of(axis):
                self.found.writes += [] if part is None else self._with_alike(part)
        return axis

    def carry(self, axis: Axis) -> None:
        """The ids are those of a bias, a scale or a shift of channels."""
        if axis is not None:
            self.found.carries.append(axis)

    def mask(self, arguments: dict[str, dict[int, np.ndarray]], *, norm: bool) -> None:
        """See `Mask`."""
        self.masks.append(self._masked(arguments, norm=norm))

    def _masked(self, arguments: dict[str, dict[int, np.ndarray]], *, norm: bool) -> Mask:
        return Mask((self._name, self._operations[self._name]), arguments, norm)

    def of_written(self) -> list[Mask]:
        """Masks for what is read by axes of weights that also write, which cannot be zeroed for the one
        alone.
        """
        written = np.zeros(len(self.ids), bool)
        for axis in self.found.writes:
            written[axis] = True
        return [mask for axis, mask in self._readings if axis is not None and written[axis].any()]

    def alike(self, axes: Sequence[Axis], x: Tensor) -> None:
        """A weight with these axes is computed from x, place by place: what reads or writes the one does the
        other.
        """
        for axis, own in zip(axes, self.axes(x)):
            if axis is not None and own is not None and own is not axis:
                self._alike.setdefault(axis.tobytes(), []).append(own)

    def _with_alike(self, axis: np.ndarray) -> list[np.ndarray]:
        found, new = {}, [axis]
        while new:
            axis = new.pop()
            if axis.tobytes() not in found:
                found[axis.tobytes()] = axis
                new += self._alike.get(axis.tobytes(), ())
        return list(found.values())

    def cost(self, macs: int, *axes: tuple[Axis, int]) -> None:
        """Multiply-accumulates that are proportional to these axes, each with its length."""
        if not self._training:
            parts = [
                part
                for axis, length in axes
                for part in ([(None, length)] if axis is None else self.ids.made_of(axis))
            ]
            known = tuple(axis for axis, _ in parts if axis is not None)
            free = prod(length for axis, length in parts if axis is None)
            self.found.costs.append(Cost(macs * free, known))

    def size(self, axes: Sequence[Axis], lengths: Sequence[int]) -> None:
        """Lengths that the network may have given to this operation as numbers."""
        module = self.stack[-1] if self.stack else ""
        for axis, number in zip(axes, self.given.sources(lengths)):
            if axis is not None and len(axis):
                source = getattr(number, "source", None)
                key = source or module, len(axis), int(axis[0]), int(axis[-1])
                self.found.sizes.setdefault(key, Size(module, axis, number))


@cache
def _written(function: OpOverload) -> frozenset[str]:
    """The arguments that an operation only writes to."""
    return frozenset(argument.name for argument in function._schema.arguments if argument.is_out)
