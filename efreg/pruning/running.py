"""Running a model on example inputs, leaving no trace on it, and opening what it returns."""

import copy
import sys
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping, Set
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import fields, is_dataclass
from enum import Enum
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

HALVES = (torch.float16, torch.bfloat16)
SIMPLE = {type(None), bool, int, float, str}
PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size, Enum, type)


class PruningError(RuntimeError):
    """A network that cannot be pruned as planned. The message names the layer."""


def calls(example_inputs: Any) -> list[Any]:
    """The calls that example inputs stand for: a list is several, anything else is one.

    Raises ValueError where there is none, or where its tensors hold no numbers.
    """
    if example_inputs is None:
        raise ValueError(
            "example_inputs are missing: give a tensor, a tuple of arguments or a dict of keywords"
        )
    found = example_inputs if isinstance(example_inputs, list) else [example_inputs]
    if not found:
        raise ValueError("example_inputs is an empty list: give at least one call")
    for call in found:
        given = [x for x in tree_leaves(call) if isinstance(x, Tensor)]
        if given and not any(x.numel() for x in given):
            raise ValueError(f"example_inputs of {shapes(call)} hold no numbers: give a batch of one")
    return found


def forward(model: nn.Module, call: Any) -> Any:
    """The model's output on a tensor, a tuple of arguments or a dict of keyword arguments.

    Raises ValueError naming the shapes where the model cannot take them.
    """
    torch.clear_autocast_cache()  # a network with an autocast of its own keeps its weights' casts there
    try:
        if isinstance(call, Mapping):
            return model(**call)
        if isinstance(call, tuple):
            return model(*call)
        return model(call)
    except PruningError:
        raise
    except Exception as error:
        raise ValueError(
            f"{type(model).__name__} cannot take example_inputs of {shapes(call)}{_elsewhere(model, call)}: "
            f"{error or type(error).__name__}"
        ) from error


def _elsewhere(model: nn.Module, call: Any) -> str:
    places = {x.device for x in tree_leaves(call) if isinstance(x, Tensor)}
    home = device_of(model)
    return f" on {places.pop()}, with its parameters on {home}" if places and home not in places else ""


def tensors_in(given: Any) -> list[Tensor]:
    """The tensors among an operation's arguments, or in what it returns; in lists, tuples and dicts of them
    too.
    """
    if isinstance(given, Tensor):
        return [given]
    if isinstance(given, dict):
        given = given.values()
    elif not isinstance(given, (tuple, list)):
        return []
    return [x for item in given if type(item) not in SIMPLE for x in tensors_in(item)]


@cache
def schema_name(function: OpOverload) -> str:
    """What ATen's schema calls an operation. To ask it makes new objects each time."""
    return function._schema.name


@cache
def argument_names(function: OpOverload) -> tuple[str, ...]:
    """What ATen's schema calls an operation's arguments."""
    return tuple(argument.name for argument in function._schema.arguments)


def arguments(function: OpOverload, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """An operation's arguments by the names that ATen's schema gives them."""
    return dict(zip(argument_names(function), args)) | kwargs


def tensors(output: Any) -> list[Tensor]:
    """The tensors in a model's output, whatever tuples, mappings, dataclasses and objects they are in.

    Raises PruningError for what cannot be looked into: functions, generators, objects without attributes, and
    tensors that are sparse or nested.
    """
    return list(_opened(output, {}))


def _opened(output: Any, seen: dict[int, Any]) -> Iterator[Tensor]:
    """The tensors in an output; seen: the objects that have been opened, by identity."""
    if isinstance(output, PLAIN) or id(output) in seen:
        return
    seen[id(output)] = output
    if isinstance(output, Tensor):
        if output.is_nested or output.layout != torch.strided:
            kind = "nested" if output.is_nested else output.layout
            raise PruningError(
                f"the network returns a {kind} tensor, which cannot be proven: return it dense"
            )
        yield output
        return
    for item in _items(output):
        yield from _opened(item, seen)


def _items(output: Any) -> list[Any]:
    if isinstance(output, Mapping):
        return list(output.values())
    if isinstance(output, (tuple, list, Set)):
        return list(output)
    if is_dataclass(output):
        return [getattr(output, field.name) for field in fields(output)]
    slots = [name for kind in type(output).__mro__ for name in getattr(kind, "__slots__", ())]
    attributes = {**{name: getattr(output, name, None) for name in slots}, **getattr(output, "__dict__", {})}
    if callable(output) or not attributes:
        raise PruningError(
            f"the network returns a {type(output).__name__}, which cannot be opened to see what must stay: "
            "return tensors, tuples, dicts or dataclasses"
        )
    return list(attributes.values())


@contextmanager
def evaluation(*models: nn.Module) -> Iterator[None]:
    """Eval mode without gradients; every submodule's own training flag is restored after."""
    flags = [(module, module.training) for model in models for module in model.modules()]
    for model in models:
        model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in flags:
            module.training = training


@contextmanager
def quietly(model: nn.Module) -> Iterator[None]:
    """Where the model is: float32 arithmetic as written, nothing compiled, whatever the caller has set.

    No autocast, no TF32, no inference mode; torch.compile'd parts run as they are written.
    """
    device, cudnn, mkldnn = device_of(model).type, torch.backends.cudnn, torch.backends.mkldnn
    switches: tuple[Any, ...] = (
        *(torch.backends.cuda.matmul, cudnn.conv, cudnn.rnn),  # type: ignore[attr-defined]
        *(mkldnn.matmul, mkldnn.conv, mkldnn.rnn),  # type: ignore[attr-defined]
    )
    before = [switch.fp32_precision for switch in switches]
    try:
        for switch in switches:
            switch.fp32_precision = "ieee"
        with (
            torch.inference_mode(False),
            torch.autocast(device, enabled=False)
            if torch.amp.is_autocast_available(device)
            else nullcontext(),
            _uncompiled(),
        ):
            yield
    finally:
        for switch, precision in zip(switches, before, strict=True):
            switch.fp32_precision = precision


def _uncompiled() -> AbstractContextManager:
    """torch.compile'd parts run as they are written; where nothing was compiled, nothing is imported."""
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()


DICE = (
    "rand",
    "bernoulli",
    "normal",
    "uniform",
    "exponential",
    "log_normal",
    "cauchy",
    "geometric",
    "poisson",
    "binomial",
    "_standard_gamma",
)

WITHOUT = {"dropout_p": 0.0, "training": False}
"""Arguments of random operations by which they are none."""


@cache
def throws_dice(function: OpOverload) -> bool:
    """Whether an operation gives something else each time."""
    return torch.Tag.nondeterministic_seeded in function.tags


class Mode(TorchDispatchMode):
    """A dispatch mode that gets operations taken apart, also where inference mode hands them over whole.

    Dynamo is not told to leave it alone: to tell it is to import it, which takes seconds.
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    def __torch_dispatch__(
        self, function: OpOverload, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if _is_composite(function):
            with self:
                return function.decompose(*args, **(kwargs or {}))
        return self.see(function, args, kwargs or {})

    def see(self, function: OpOverload, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Carries the operation out."""
        raise NotImplementedError


@cache
def _is_composite(function: OpOverload) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(function.name(), "CompositeImplicitAutograd")


class Stilled(Mode):
    """A network's function without the dice: dropout hands its input on, random numbers are 1/2.

    To that is added what their distribution is made of, such as the means and deviations of `torch.normal`.
    """

    def see(self, function: OpOverload, args: tuple, kwargs: dict[str, Any]) -> Any:
        if not throws_dice(function):
            return function(*args, **kwargs)
        if function is torch.ops.aten.native_dropout.default:
            return args[0].clone(), torch.ones_like(args[0], dtype=torch.bool)
        args = tuple(WITHOUT.get(name, x) for name, x in zip(argument_names(function), args))
        kwargs = kwargs | {name: value for name, value in WITHOUT.items() if name in kwargs}
        out = function(*args, **kwargs)
        name = schema_name(function).removeprefix("aten::")
        if name.startswith(DICE) and isinstance(out, Tensor) and out.is_floating_point():
            made_of = [] if "_like" in name else [x for x in args if isinstance(x, Tensor) and x is not out]
            out.fill_(0.5)
            for x in made_of:
                out += x
        return out


def device_of(model: nn.Module) -> torch.device:
    """Where the model's first parameter lies; the CPU where it has none."""
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def twin(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """A copy in eval mode to try things on, of this dtype, else at least float32.

    Raises PruningError where the model cannot be copied.
    """
    try:
        copied = copy_of(model).eval()
    except Exception as error:
        raise PruningError(f"{type(model).__name__} cannot be copied: {error}") from error
    if dtype is None and any(parameter.dtype in HALVES for parameter in model.parameters()):
        dtype = torch.float32
    return copied if dtype is None else copied._apply(lambda x: _as(x, dtype))


def _as(x: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor of numbers in this precision; complex ones stay complex, integers as they are."""
    return x.to(dtype.to_complex()) if x.is_complex() else x.to(dtype) if x.is_floating_point() else x


def copy_of(model: nn.Module) -> nn.Module:
    """A deep copy; tensors that modules have computed and kept are copied without their history, and
    empty dicts, of which a module has a dozen for its hooks, are made anew, which is quicker.

    Recurrent layers' weights lie in one piece where cuDNN wants that.
    """
    held = [x for module in model.modules() for x in vars(module).values() if type(x) not in SIMPLE]
    copies: dict[int, Any] = {id(x): type(x)() for x in held if type(x) in (dict, OrderedDict) and not x}
    full = [x for x in held if id(x) not in copies]
    copies |= {id(x): x.detach().clone() for x in tensors_in(full) if not x.is_leaf}
    copied = copy.deepcopy(model, copies)
    for parameter in copied.parameters():
        if not parameter.is_leaf:  # of a scripted module
            parameter.detach_().requires_grad_()
    for module in copied.modules():
        if isinstance(module, nn.RNNBase):
            module.flatten_parameters()
    return copied


def twin_inputs(call: Any, dtype: torch.dtype | None = None) -> Any:
    """A copy of one call's inputs for a `twin`."""

    def copied(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        x = x.detach().clone()
        wanted = dtype or (torch.float32 if x.dtype in HALVES else None)
        return x if wanted is None else _as(x, wanted)

    return tree_map(copied, call)


def fresh_inputs(call: Any, generator: torch.Generator) -> Any:
    """Random inputs of the same shapes, dtypes and ranges: numbers drawn anew, integers shuffled."""

    def drawn(x: Any) -> Any:
        if not isinstance(x, Tensor) or x.is_complex() or x.dtype == torch.bool or not x.numel():
            return x
        values = x.detach().cpu().flatten()
        if not x.is_floating_point():
            return values[torch.randperm(len(values), generator=generator)].reshape(x.shape).to(x.device)
        noise = torch.randn(values.shape, generator=generator, dtype=torch.float64)
        low, high = values.min().double(), values.max().double()
        if low >= 0 and high > low:
            noise = low + (high - low) * noise.erf().abs()
        elif high > low:
            noise = values.double().mean() + values.double().std() * noise
        return noise.to(x.dtype).reshape(x.shape).to(x.device)

    return tree_map(drawn, call)


@contextmanager
def located(model: nn.Module, stack: list[str], turn: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Keeps in `stack` the names of the modules that are running, the innermost last.

    turn: called before each change.
    """

    def enter(name: str) -> None:
        turn()
        stack.append(name)

    def leave(*_: object) -> None:
        turn()
        stack.pop()

    with ExitStack() as hooks:
        for name, module in model.named_modules():
            if not isinstance(module, torch.jit.ScriptModule):
                before = module.register_forward_pre_hook(lambda *_, name=name: enter(name), prepend=True)
                after = module.register_forward_hook(leave, always_call=True)
                hooks.callback(before.remove)
                hooks.callback(after.remove)
        yield


def macs_by_module(model: nn.Module, example_inputs: Any) -> Counter[str]:
    """Multiply-accumulates of one forward pass in eval mode, of all calls together, by the innermost module.

    They are half of the FLOPs that torch's FlopCounterMode counts: biases, norms and activations are free.
    Raises ValueError naming the shapes where the model cannot take the example inputs.
    """
    from torch.utils.flop_counter import FlopCounterMode

    stack, found = [""], Counter[str]()

    def settle() -> None:
        found[stack[-1]] += counter.get_total_flops() // 2 - found.total()

    with (
        evaluation(model),
        in_the_open(),
        FlopCounterMode(display=False) as counter,
        located(model, stack, settle),
    ):
        for call in calls(example_inputs):
            forward(model, call)
    settle()
    return found


@contextmanager
def in_the_open() -> Iterator[None]:
    """Attention as single matrix products: torch fuses it into operations that a counter does not know."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def shapes(call: Any) -> str:
    """The shapes of a call's tensors, for a message."""
    if isinstance(call, Tensor):
        return f"shape {tuple(call.shape)} and {call.dtype}"
    if isinstance(call, Mapping):
        return ", ".join(f"{name}: {shapes(value)}" for name, value in call.items()) or "no arguments"
    if isinstance(call, (tuple, list)):
        return ", ".join(shapes(value) for value in call) or "no arguments"
    return f"type {type(call).__name__}"
