"""Proof: the pruned network computes what the given one does when nobody reads what was removed."""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from traceback import walk_tb
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.utils.hooks import RemovableHandle

from efreg.pruning.cutting import cut
from efreg.pruning.running import (
    HALVES,
    Mode,
    PruningError,
    Stilled,
    arguments,
    calls,
    copy_of,
    device_of,
    forward,
    fresh_inputs,
    schema_name,
    tensors,
    twin,
    twin_inputs,
)
from efreg.pruning.units import Network
from efreg.pruning.watching import Mask

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-9}
"""How far outputs may lie apart, relative to max|output|; what float32 leaves in doubt float64 decides."""

ROUNDINGS = 2.0**-48
"""Sixteen roundings in float64. Outputs may lie as far apart as the network's own move when each of its
parameters moves by up to this share of itself, if that is not over the tolerance in float32.
"""


CALL = nn.Module.__call__.__code__
"""What runs where a module is called."""


class Unprovable(PruningError):
    """Outputs that say nothing about the network, so that nothing can be proven with them.

    constant: whether they are the same whatever the inputs.
    """

    def __init__(self, reason: str, remedy: str, *, constant: bool = False):
        super().__init__(f"the network cannot be proven: {reason}. {remedy}")
        self.constant = constant


OTHER_INPUTS = "Give other example_inputs"
FEWER = "Remove fewer units, or give other example_inputs"
A_PART = "Give inputs on which they are not, or prune the part that makes them, such as model.backbone"


@dataclass(frozen=True)
class Failure:
    """Why the two do not agree; the module where it shows first, and whether the pruned network broke down in
    it.
    """

    reason: str
    module: str | None = None
    broken: bool = False


class Masked(Mode):
    """The given network without what is read other than by weights: zeros there, norms over what stays."""

    def __init__(self, masks: Sequence[Mask], network: Network, gone: np.ndarray):
        super().__init__()
        self._masks: dict[tuple[str, int], list[tuple[Mask, dict]]] = {}
        for mask in masks:
            stays = {
                name: {i: torch.from_numpy(network.kept(axis, gone)) for i, axis in axes.items()}
                for name, axes in mask.arguments.items()
            }
            if any(not x.all() for axes in stays.values() for x in axes.values()):
                self._masks.setdefault(mask.operation, []).append((mask, stays))
        self._operations: Counter[str] = Counter()

    def see(self, function: OpOverload, args: tuple, kwargs: dict[str, Any]) -> Any:
        name = schema_name(function)
        self._operations[name] += 1
        found = self._masks.get((name, self._operations[name]))
        if not found:
            return function(*args, **kwargs)
        given = arguments(function, args, kwargs)
        for mask, stays in found:
            if mask.norm:
                return _over_what_stays(function, given, stays)
            for name, axes in stays.items():
                for i, stay in axes.items():
                    given[name] = given[name].index_fill(i, _gone(stay, given[name]), 0)
        return function(**given)


def _gone(stay: Tensor, like: Tensor) -> Tensor:
    return stay.logical_not().nonzero().flatten().to(like.device)


def _over_what_stays(function: OpOverload, given: dict[str, Any], stays: dict[str, dict[int, Tensor]]) -> Any:
    """The norm of the entries that stay, in their places; zeros in the others'."""
    first = next(name for name in given if isinstance(given[name], Tensor))
    whole, axes = function(**given), stays[first]
    for name, found in stays.items():
        for i, stay in found.items():
            given[name] = given[name].index_select(i, stay.nonzero().flatten().to(given[name].device))
    if "normalized_shape" in given:
        given["normalized_shape"] = list(given[first].shape[-len(given["normalized_shape"]) :])
    if "C" in given:
        given["C"], given["group"] = _groups_left(given["group"], axes[1])
    out = function(**given)

    def spread(y: Any, like: Any) -> Any:
        if not isinstance(y, Tensor) or y.ndim != given[first].ndim:
            return y
        for i, stay in axes.items():
            if like.shape[i] == len(stay):  # else it is a number for all of them
                shape = list(y.shape)
                shape[i] = len(stay)
                y = y.new_zeros(shape).index_copy(i, stay.nonzero().flatten().to(y.device), y)
        return y

    return tuple(map(spread, out, whole)) if isinstance(out, tuple) else spread(out, whole)


def _groups_left(groups: int, stay: Tensor) -> tuple[int, int]:
    """How many channels and how many groups of a group norm stay."""
    return int(stay.sum()), int(stay.reshape(groups, -1).any(1).sum())


def disagreement(
    model: nn.Module,
    network: Network,
    gone: np.ndarray,
    example_inputs: Any,
    *,
    dead: bool = False,
    quick: bool = False,
    ours: bool = False,
) -> Failure | None:
    """How the network without these units differs from the given one in which nobody reads them; None where
    not.

    Compared are eval mode on the example inputs and on fresh random ones of the same shape, and train mode,
    where the network has it, on the fresh ones; random numbers are held still. Where float32 leaves a doubt,
    float64 decides. dead: compared with the given network as it is. quick: not on the example inputs. ours:
    the given network is a copy that may be worked on, which saves another; its columns are given back.

    Raises `Unprovable` where outputs do not depend on inputs, are empty, random or not finite.
    """
    generator = torch.Generator().manual_seed(0)
    examples = calls(example_inputs)
    fresh = [fresh_inputs(call, generator) for call in examples]
    compared, seen = _Compared(model, network, gone, dead, ours), []
    try:
        for training, inputs in ((False, examples), (False, fresh), (True, fresh)):
            for number, call in enumerate(inputs):
                if quick and inputs is examples:
                    continue
                failure, outputs = compared.on(call, number, training)
                if failure is not None:
                    return failure
                if not training:
                    seen.append((number, call, outputs))
    finally:
        compared.give_back()
    if not quick:
        _require_dependence(model, seen)
    return None


class _Compared:
    """Twins of both networks, in float32 or whatever they are in, and in float64 where that is needed."""

    def __init__(self, model: nn.Module, network: Network, gone: np.ndarray, dead: bool, ours: bool):
        self._model, self._network, self._gone, self._dead = model, network, gone, dead
        self._ours = ours and not any(parameter.dtype in HALVES for parameter in model.parameters())
        self._closed: list[tuple[Tensor, int, Tensor, Tensor]] = []
        self._twins: dict[torch.dtype | None, tuple[nn.Module, nn.Module]] = {}

    def on(self, call: Any, number: int, training: bool) -> tuple[Failure | None, list[Tensor]]:
        """The failure on this call, and the reference's outputs; neither where it has no train mode."""
        failure, expected = self._compare(call, number, training, None)
        if failure is not None and not failure.broken and expected and expected[0].dtype != torch.float64:
            try:
                failure, _ = self._compare(call, number, training, torch.float64)
            except (ValueError, Unprovable):  # a network that insists on float32
                return failure, expected
        return failure, expected

    def _compare(
        self, call: Any, number: int, training: bool, dtype: torch.dtype | None
    ) -> tuple[Failure | None, list[Tensor]]:
        reference, pruned = self._twins_in(dtype)
        try:
            expected = self._outputs(reference, call, number, training, dtype, masked=not self._dead)
        except ValueError:
            if training:
                return None, []
            raise
        try:
            found = self._outputs(pruned, call, number, training, dtype, masked=False)
        except ValueError as error:
            said = f"without them it breaks down: {error.__cause__ or error}"
            return Failure(said, _broken(pruned, error), broken=True), expected
        bounds = _shares(expected, TOLERANCE[dtype or torch.float32])
        reason = _difference(found, expected, bounds)
        if reason is not None and dtype == torch.float64:
            bounds = self._conditioning(call, number, training, expected)
            reason = _difference(found, expected, bounds)
        if reason is not None:
            again = self._outputs(reference, call, number, training, dtype, masked=not self._dead)
            if _difference(again, expected, bounds) is not None:
                raise Unprovable(
                    "its outputs are random, by other dice than torch's", "Fix them while it is pruned"
                )
            module = self._first_difference(call, number, training, dtype)
            return Failure(f"{reason}{' in train mode' if training else ''}", module), expected
        return None, expected

    def _conditioning(self, call: Any, number: int, training: bool, expected: list[Tensor]) -> list[float]:
        """How far the outputs of the reference in float64 may move by roundings alone: a batch norm over two
        values makes much of them.
        """
        moved, generator = copy_of(self._twins_in(torch.float64)[0]), torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in moved.parameters():
                if parameter.is_floating_point():
                    noise = torch.empty(parameter.shape, dtype=torch.float64).uniform_(
                        -1, 1, generator=generator
                    )
                    parameter.mul_(1 + ROUNDINGS * noise.to(parameter.device))
        outputs = self._outputs(moved, call, number, training, torch.float64, masked=not self._dead)
        least, most = (_shares(expected, TOLERANCE[dtype]) for dtype in (torch.float64, torch.float32))
        return [
            min(max(low, _largest(x - y)), high) if y.is_floating_point() and x.shape == y.shape else low
            for x, y, low, high in zip(outputs, expected, least, most)
        ]

    def _first_difference(
        self, call: Any, number: int, training: bool, dtype: torch.dtype | None
    ) -> str | None:
        """The first module to return something of the same shape in both networks that is not the same."""
        reference, pruned = self._twins_in(dtype)
        with Returns(reference) as expected:
            self._outputs(reference, call, number, training, dtype, masked=not self._dead)
        with Returns(pruned) as found:
            self._outputs(pruned, call, number, training, dtype, masked=False)
        for (name, x), (other, y) in zip(found.seen, expected.seen):
            if name != other:
                return None
            if x.shape == y.shape and not torch.allclose(x, y, rtol=0, atol=1e-3 * float(y.abs().max())):
                return name
        return None

    def _twins_in(self, dtype: torch.dtype | None) -> tuple[nn.Module, nn.Module]:
        if dtype not in self._twins:
            pruned = cut(twin(self._model, dtype), self._network, self._gone).requires_grad_(True)
            as_it_is = self._ours and dtype is None
            reference = (self._model if as_it_is else twin(self._model, dtype)).requires_grad_(True)
            if not self._dead:
                self._close_columns(reference)
            self._twins[dtype] = reference, pruned
        return self._twins[dtype]

    @torch.no_grad()
    def _close_columns(self, model: nn.Module) -> None:
        """Nobody reads what goes: columns of readers are zero."""
        named = dict((*model.named_parameters(), *model.named_buffers()))
        for name, axis, positions in self._network.columns(self._gone):
            index = torch.from_numpy(positions).to(named[name].device)
            if model is self._model:
                self._closed.append((named[name], axis, index, named[name].index_select(axis, index)))
            named[name].index_fill_(axis, index, 0)

    @torch.no_grad()
    def give_back(self) -> None:
        """The given network's columns are as they were."""
        for tensor, axis, index, columns in reversed(self._closed):
            tensor.index_copy_(axis, index, columns)
        if self._ours:
            self._model.eval()

    def _outputs(
        self,
        model: nn.Module,
        call: Any,
        number: int,
        training: bool,
        dtype: torch.dtype | None,
        *,
        masked: bool,
    ) -> list[Tensor]:
        model.train(training)
        masks = self._network.watched.masks.get((training, number), []) if masked else []
        inputs = twin_inputs(call, dtype)
        with _same_dice(device_of(model)):
            mask = Masked(masks, self._network, self._gone) if masks else nullcontext()
            still = Stilled() if self._network.watched.dice else nullcontext()
            with torch.enable_grad(), still, mask:
                outputs = tensors(forward(model, inputs))
        return [torch.view_as_real(x.detach()) if x.is_complex() else x.detach() for x in outputs]


def _broken(model: nn.Module, error: BaseException | None) -> str | None:
    """The innermost module of the model in which the error first came up."""
    names = {
        id(module): name
        for name, module in model.named_modules()
        if not isinstance(module, torch.jit.ScriptModule)
    }
    found = None
    while error is not None:
        frames = [frame for frame, _ in walk_tb(error.__traceback__) if frame.f_code is CALL]
        called = (id(frame.f_locals["self"]) for frame in reversed(frames))
        found = next((names[module] for module in called if module in names), found)
        error = error.__context__
    return found


class Returns:
    """Keeps the tensors that the model's modules return, in the order in which they return them."""

    def __init__(self, model: nn.Module):
        self._model = model
        self._handles: list[RemovableHandle] = []
        self.seen: list[tuple[str, Tensor]] = []

    def __enter__(self) -> "Returns":
        for name, module in self._model.named_modules():
            if name and not isinstance(module, torch.jit.ScriptModule):
                self._handles.append(
                    module.register_forward_hook(lambda m, a, out, name=name: self._keep(name, out))
                )
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _keep(self, name: str, out: Any) -> None:
        out = out[0] if isinstance(out, (tuple, list)) and out else out
        if isinstance(out, Tensor) and out.is_floating_point():
            self.seen.append((name, out.detach().clone()))


@contextmanager
def _same_dice(device: torch.device) -> Iterator[None]:
    """Generators seeded with 0, and after it as they were. `torch.manual_seed` would ask for every GPU."""
    gpus = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=gpus):
        torch.default_generator.manual_seed(0)
        if gpus:
            torch.cuda.manual_seed_all(0)
        yield


def _largest(x: Tensor) -> float:
    """The largest absolute value of those that are finite; 0 where there is none."""
    finite = x[x.isfinite()]
    return finite.abs().max().item() if finite.numel() else 0.0


def _shares(outputs: Sequence[Tensor], share: float) -> list[float]:
    """This share of each output's largest value."""
    return [share * _largest(x) if x.is_floating_point() else 0.0 for x in outputs]


def _difference(found: Sequence[Tensor], expected: Sequence[Tensor], bounds: Sequence[float]) -> str | None:
    """How outputs differ by more than their bounds; None where they do not."""
    if [x.shape for x in found] != [x.shape for x in expected]:
        return "the outputs have another shape without them"
    for x, y, bound in zip(found, expected, bounds, strict=True):
        if not y.is_floating_point():
            if not torch.equal(x, y):
                return "outputs that are no floating-point numbers differ"
            continue
        finite = y.isfinite()
        if y.isnan().any():
            raise Unprovable("its outputs are not finite", OTHER_INPUTS)
        if not torch.equal(x[~finite], y[~finite]):
            return "outputs are infinite in other places"
        error = (x[finite] - y[finite]).abs()
        if not (error <= bound).all():
            return f"outputs differ by {error.max():.3g}, where the largest is {_largest(y):.3g}"
    return None


def _require_dependence(model: nn.Module, seen: Sequence[tuple[int, Any, list[Tensor]]]) -> None:
    """Raises `Unprovable` where outputs are none, empty, or the same whatever the inputs."""
    for number in {number for number, _, _ in seen}:
        given = [call for n, call, _ in seen if n == number]
        runs = [outputs for n, _, outputs in seen if n == number]
        if not any(runs):
            raise Unprovable("it returns no tensors", "Return what it computes as tensors")
        if not any(x.numel() for outputs in runs for x in outputs):
            raise Unprovable("its outputs are empty on these inputs", A_PART)
        if len(runs) > 1 and _equal(*runs):
            with torch.no_grad(), Stilled():
                before = [tensors(forward(twin(model), twin_inputs(call))) for call in given]
            if _equal(*before):
                raise Unprovable("its outputs do not depend on its inputs", OTHER_INPUTS, constant=True)
            raise Unprovable("what is left of it gives the same for all inputs", FEWER, constant=True)


def _equal(some: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    return len(some) == len(others) and all(map(torch.equal, some, others))
