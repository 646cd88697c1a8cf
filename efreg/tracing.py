"""Running a model on example inputs, leaving no trace on it, and counting what it does."""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

HALVES = (torch.float16, torch.bfloat16)


def forward(model: nn.Module, example_inputs: Any) -> Any:
    """The model's output on a tensor, a tuple or list of arguments, or a dict of keyword arguments.

    Raises ValueError naming the shapes where the model cannot take them.
    """
    try:
        if isinstance(example_inputs, Mapping):
            return model(**example_inputs)
        if isinstance(example_inputs, (tuple, list)):
            return model(*example_inputs)
        return model(example_inputs)
    except Exception as error:
        raise ValueError(
            f"{type(model).__name__} cannot take example_inputs of {_shapes(example_inputs)}: {error}"
        ) from error


def tensors(output: Any) -> list[Tensor]:
    """The floating-point tensors in a model's output, whatever tuples, lists and dicts they are in."""
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    if isinstance(output, Mapping):
        output = list(output.values())
    if isinstance(output, (tuple, list)):
        return [tensor for item in output for tensor in tensors(item)]
    return []


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
def full_precision(device_type: str) -> Iterator[None]:
    """float32 arithmetic as written, whatever the caller has set: no autocast, no TF32, no inference mode."""
    backends = torch.backends
    switches = (backends.cuda.matmul, backends.cudnn.conv, backends.mkldnn.matmul, backends.mkldnn.conv)
    before = [switch.fp32_precision for switch in switches]
    try:
        for switch in switches:
            switch.fp32_precision = "ieee"
        with torch.inference_mode(False), torch.autocast(device_type, enabled=False):
            yield
    finally:
        for switch, precision in zip(switches, before, strict=True):
            switch.fp32_precision = precision


def device_of(model: nn.Module) -> torch.device:
    """Where the model's first parameter lies; the CPU where it has none."""
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def twin(model: nn.Module) -> nn.Module:
    """A copy in eval mode and at least float32, to try things on."""
    model = copy.deepcopy(model).eval()
    halves = any(parameter.dtype in HALVES for parameter in model.parameters())
    return model.float() if halves else model


def twin_inputs(example_inputs: Any) -> Any:
    """A copy of the example inputs for a `twin`."""
    if isinstance(example_inputs, Tensor):
        copied = example_inputs.detach().clone()
        return copied.float() if copied.dtype in HALVES else copied
    if isinstance(example_inputs, Mapping):
        return {name: twin_inputs(value) for name, value in example_inputs.items()}
    if isinstance(example_inputs, (tuple, list)):
        return [twin_inputs(value) for value in example_inputs]
    return example_inputs


def count_macs(model: nn.Module, example_inputs: Any) -> tuple[int, dict[str, int]]:
    """Multiply-accumulates of one forward pass in eval mode: of the whole model, and of each module by name.

    They are half of the FLOPs that torch's FlopCounterMode counts: biases, norms and activations are free.
    Raises ValueError naming the shapes where the model cannot take the example inputs.
    """
    from torch.utils.flop_counter import FlopCounterMode

    with evaluation(model), FlopCounterMode(display=False) as counter:
        forward(model, example_inputs)
    counted = counter.get_flop_counts()
    flops = {name: counted.get(f"{type(model).__name__}.{name}", {}) for name, _ in model.named_modules()}
    return counter.get_total_flops() // 2, {name: sum(f.values()) // 2 for name, f in flops.items()}


def _shapes(example_inputs: Any) -> str:
    if isinstance(example_inputs, Tensor):
        return f"shape {tuple(example_inputs.shape)} and {example_inputs.dtype}"
    if isinstance(example_inputs, Mapping):
        return ", ".join(f"{name}: {_shapes(value)}" for name, value in example_inputs.items())
    if isinstance(example_inputs, (tuple, list)):
        return ", ".join(_shapes(value) for value in example_inputs)
    return f"type {type(example_inputs).__name__}"
