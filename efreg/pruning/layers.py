"""What each layer of a network costs."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

from torch import nn

from efreg.pruning.running import macs_by_module


@dataclass(frozen=True)
class Layer:
    """What a module does itself, and not those inside it.

    name: the qualified name; empty for the network. macs: multiply-accumulates of a forward pass of the
    example inputs. parameters: how many numbers are trained.
    """

    name: str
    macs: int
    parameters: int


def layers_of(model: nn.Module, example_inputs: Any) -> tuple[Layer, ...]:
    """The modules that cost something, in the network's order.

    Raises ValueError naming the shapes where the model cannot take the example inputs.
    """
    macs, parameters = macs_by_module(model, example_inputs), Counter[str]()
    for name, parameter in model.named_parameters():
        parameters[name.rpartition(".")[0]] += parameter.numel()
    names = [name for name, _ in model.named_modules() if macs[name] or parameters[name]]
    return tuple(Layer(name, macs[name], parameters[name]) for name in names)
